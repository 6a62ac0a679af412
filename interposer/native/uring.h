/* io_uring, which no hook can follow: who has a ring accepts and sends through it, past every hook. */
#ifndef INTERPOSER_URING_H
#define INTERPOSER_URING_H
#include <stdatomic.h>
#include <stdbool.h>

/* The process has, or had, a ring: its sockets are TCP's. */
extern _Atomic bool uring_made;

/* It may make one where no hook sees it: then a listener shows its companions to nobody before the program has waited for
 * a connection by libc's calls. As of the last listener that looked. */
extern _Atomic bool uring_possible;

/* Before a decision: has this process a ring, as far as can be seen now? Every listener looks, connections once a
 * second: one from before the ring goes on as AF_UNIX. */
bool uring_exists(bool listener);
#endif
