/* The original functions behind the hooks: `real.close(fd)` is libc's (or the next preload's) close. Each entry starts
 * as a resolver that finds all originals and calls on, so it is usable before any constructor has run and by many
 * threads at once: resolving twice stores the same values. */
#ifndef INTERPOSER_REAL_H
#define INTERPOSER_REAL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

struct real {
#define HOOK(type, name, parameters, arguments) type(*name) parameters;
#include "hooks.def"
#undef HOOK
};
extern struct real real;
void real_resolve(void);
#endif
