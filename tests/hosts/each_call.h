/* One call of every hooked function, each of which may be the first call of a process, of a thread, or its last. */
#ifndef EACH_CALL_H
#define EACH_CALL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utmp.h>

extern int __open_2(const char *, int), __open64_2(const char *, int);
extern int __openat_2(int, const char *, int), __openat64_2(int, const char *, int);
extern ssize_t __read_chk(int, void *, size_t, size_t);
extern ssize_t __recv_chk(int, void *, size_t, size_t, int);
extern ssize_t __recvfrom_chk(int, void *, size_t, size_t, int, struct sockaddr *, socklen_t *);
extern int __poll_chk(struct pollfd *, nfds_t, int, size_t);
extern int __ppoll_chk(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *, size_t);

static const char each_nowhere[] = "/nowhere/at all";
static char *const each_arguments[] = {(char *)"x", NULL};
static const struct timespec each_moment;
static const sigset_t each_signals;

#define EACH_MAKES(name, arguments)                                                                                    \
    CALL(name, { int fd = name arguments; good = fd >= 0 && close(fd) == 0; })
#define EACH_FAILS(name, arguments, error)                                                                             \
    CALL(name, { errno = 0; good = name arguments == -1 && errno == error; })
#define EACH_GIVES(name, arguments, wanted)                                                                            \
    CALL(name, { errno = 4711; good = name arguments == wanted && errno == 4711; })
#define EACH_PAIRS(name, ...)                                                                                          \
    CALL(name, { int pair[2]; good = name(__VA_ARGS__) == 0 && close(pair[0]) == 0 && close(pair[1]) == 0; })
#define EACH_REOPENS(name)                                                                                             \
    CALL(name, {                                                                                                       \
        FILE *stream = fopen("/dev/null", "r");                                                                        \
        good = stream && (stream = name("/dev/zero", "r", stream)) && fclose(stream) == 0;                             \
    })
#define EACH_SPAWNS(name)                                                                                              \
    CALL(name, { pid_t pid; good = name(&pid, each_nowhere, NULL, NULL, each_arguments, NULL) == ENOENT; })
#define EACH_OPENS(name, arguments, shut)                                                                              \
    CALL(name, { void *stream = name arguments; good = stream && shut(stream) == 0; })

#define EACH_CALLS                                                                                                     \
    EACH_MAKES(socket, (AF_INET, SOCK_STREAM, 0))                                                                      \
    EACH_FAILS(bind, (-1, NULL, 0), EBADF)                                                                             \
    EACH_FAILS(listen, (-1, 1), EBADF)                                                                                 \
    EACH_FAILS(connect, (-1, NULL, 0), EBADF)                                                                          \
    EACH_FAILS(accept, (-1, NULL, NULL), EBADF)                                                                        \
    EACH_FAILS(accept4, (-1, NULL, NULL, 0), EBADF)                                                                    \
    EACH_FAILS(setsockopt, (-1, SOL_SOCKET, SO_KEEPALIVE, NULL, 0), EBADF)                                             \
    EACH_FAILS(getsockopt, (-1, SOL_SOCKET, SO_KEEPALIVE, NULL, NULL), EBADF)                                          \
    EACH_FAILS(getsockname, (-1, NULL, NULL), EBADF)                                                                   \
    EACH_FAILS(getpeername, (-1, NULL, NULL), EBADF)                                                                   \
    EACH_FAILS(shutdown, (-1, SHUT_WR), EBADF)                                                                         \
    EACH_FAILS(close, (-1), EBADF)                                                                                     \
    EACH_GIVES(close_range, (5000000, 5000001, 0), 0)                                                                  \
    CALL(closefrom, { closefrom(5000000); good = true; })                                                              \
    CALL(fclose, { FILE *stream = fopen("/dev/null", "r"); good = stream && fclose(stream) == 0; })                    \
    EACH_REOPENS(freopen)                                                                                              \
    EACH_REOPENS(freopen64)                                                                                            \
    EACH_FAILS(dup, (-1), EBADF)                                                                                       \
    EACH_FAILS(dup2, (-1, 1000), EBADF)                                                                                \
    EACH_FAILS(dup3, (-1, 1000, 0), EBADF)                                                                             \
    EACH_FAILS(fcntl, (-1, F_GETFL), EBADF)                                                                            \
    EACH_FAILS(fcntl64, (-1, F_DUPFD, 0), EBADF)                                                                       \
    EACH_FAILS(ioctl, (-1, FIONREAD, NULL), EBADF)                                                                     \
    EACH_FAILS(read, (-1, NULL, 0), EBADF)                                                                             \
    EACH_FAILS(readv, (-1, NULL, 0), EBADF)                                                                            \
    EACH_FAILS(recv, (-1, NULL, 0, 0), EBADF)                                                                          \
    EACH_FAILS(recvfrom, (-1, NULL, 0, 0, NULL, NULL), EBADF)                                                          \
    EACH_FAILS(recvmsg, (-1, &(struct msghdr){0}, 0), EBADF)                                                           \
    EACH_FAILS(recvmmsg, (-1, &(struct mmsghdr){0}, 1, 0, NULL), EBADF)                                                \
    EACH_FAILS(write, (-1, NULL, 0), EBADF)                                                                            \
    EACH_FAILS(writev, (-1, NULL, 0), EBADF)                                                                           \
    EACH_FAILS(send, (-1, NULL, 0, 0), EBADF)                                                                          \
    EACH_FAILS(sendto, (-1, NULL, 0, 0, NULL, 0), EBADF)                                                               \
    EACH_FAILS(sendmsg, (-1, &(struct msghdr){0}, 0), EBADF)                                                           \
    EACH_FAILS(sendmmsg, (-1, &(struct mmsghdr){0}, 1, 0), EBADF)                                                      \
    EACH_GIVES(poll, (&(struct pollfd){-1, POLLIN, 0}, 1, 0), 0)                                                       \
    EACH_GIVES(ppoll, (&(struct pollfd){-1, POLLIN, 0}, 1, &each_moment, NULL), 0)                                     \
    EACH_GIVES(select, (0, NULL, NULL, NULL, &(struct timeval){0, 0}), 0)                                              \
    EACH_GIVES(pselect, (0, NULL, NULL, NULL, &each_moment, NULL), 0)                                                  \
    EACH_FAILS(epoll_ctl, (-1, EPOLL_CTL_ADD, -1, &(struct epoll_event){0}), EBADF)                                    \
    EACH_FAILS(__read_chk, (-1, NULL, 0, 0), EBADF)                                                                    \
    EACH_FAILS(__recv_chk, (-1, NULL, 0, 0, 0), EBADF)                                                                 \
    EACH_FAILS(__recvfrom_chk, (-1, NULL, 0, 0, 0, NULL, NULL), EBADF)                                                 \
    EACH_GIVES(__poll_chk, (&(struct pollfd){-1, POLLIN, 0}, 1, 0, sizeof(struct pollfd)), 0)                          \
    EACH_GIVES(__ppoll_chk, (&(struct pollfd){-1, POLLIN, 0}, 1, &each_moment, NULL, sizeof(struct pollfd)), 0)        \
    EACH_FAILS(execve, (each_nowhere, each_arguments, each_arguments + 1), ENOENT)                                     \
    EACH_FAILS(execv, (each_nowhere, each_arguments), ENOENT)                                                          \
    EACH_FAILS(execvp, (each_nowhere, each_arguments), ENOENT)                                                         \
    EACH_FAILS(execvpe, (each_nowhere, each_arguments, each_arguments + 1), ENOENT)                                    \
    EACH_FAILS(execl, (each_nowhere, "x", NULL), ENOENT)                                                               \
    EACH_FAILS(execlp, (each_nowhere, "x", NULL), ENOENT)                                                              \
    EACH_FAILS(execle, (each_nowhere, "x", NULL, each_arguments + 1), ENOENT)                                          \
    EACH_FAILS(fexecve, (-1, each_arguments, each_arguments + 1), EINVAL)                                              \
    EACH_FAILS(execveat, (-1, "x", each_arguments, each_arguments + 1, 0), EBADF)                                      \
    EACH_SPAWNS(posix_spawn)                                                                                           \
    EACH_SPAWNS(posix_spawnp)                                                                                          \
    CALL(system, { good = system("exit 3") == 3 << 8; })                                                               \
    EACH_OPENS(popen, ("exit 0", "r"), pclose)                                                                         \
    CALL(vfork, {                                                                                                      \
        int status = 1;                                                                                                \
        pid_t child = vfork();                                                                                         \
        if (child == 0)                                                                                                \
            _exit(0);                                                                                                  \
        good = child > 0 && waitpid(child, &status, 0) == child && status == 0;                                        \
    })                                                                                                                 \
    EACH_FAILS(clone, (NULL, NULL, 0, NULL), EINVAL)                                                                   \
    EACH_GIVES(prctl, (PR_GET_DUMPABLE, 0, 0, 0, 0), prctl(PR_GET_DUMPABLE))                                           \
    EACH_GIVES(syscall, (SYS_getpid), getpid())                                                                        \
    EACH_MAKES(open, ("/dev/null", O_RDONLY))                                                                          \
    EACH_MAKES(open64, ("/dev/null", O_RDONLY))                                                                        \
    EACH_MAKES(openat, (AT_FDCWD, "/dev/null", O_RDONLY))                                                              \
    EACH_MAKES(openat64, (AT_FDCWD, "/dev/null", O_RDONLY))                                                            \
    EACH_MAKES(creat, ("/dev/null", 0600))                                                                             \
    EACH_MAKES(creat64, ("/dev/null", 0600))                                                                           \
    EACH_MAKES(__open_2, ("/dev/null", O_RDONLY))                                                                      \
    EACH_MAKES(__open64_2, ("/dev/null", O_RDONLY))                                                                    \
    EACH_MAKES(__openat_2, (AT_FDCWD, "/dev/null", O_RDONLY))                                                          \
    EACH_MAKES(__openat64_2, (AT_FDCWD, "/dev/null", O_RDONLY))                                                        \
    EACH_FAILS(shm_open, ("/interposer-nowhere", O_RDONLY, 0), ENOENT)                                                 \
    EACH_OPENS(tmpfile, (), fclose)                                                                                    \
    EACH_OPENS(tmpfile64, (), fclose)                                                                                  \
    EACH_OPENS(fopen, ("/dev/null", "r"), fclose)                                                                      \
    EACH_OPENS(fopen64, ("/dev/null", "r"), fclose)                                                                    \
    EACH_OPENS(opendir, ("/dev"), closedir)                                                                            \
    EACH_PAIRS(pipe, pair)                                                                                             \
    EACH_PAIRS(pipe2, pair, 0)                                                                                         \
    EACH_PAIRS(socketpair, AF_UNIX, SOCK_STREAM, 0, pair)                                                              \
    EACH_MAKES(epoll_create, (1))                                                                                      \
    EACH_MAKES(epoll_create1, (0))                                                                                     \
    EACH_MAKES(eventfd, (0, 0))                                                                                        \
    EACH_MAKES(timerfd_create, (CLOCK_MONOTONIC, 0))                                                                   \
    EACH_MAKES(signalfd, (-1, &each_signals, 0))                                                                       \
    EACH_MAKES(memfd_create, ("x", 0))                                                                                 \
    EACH_MAKES(inotify_init, ())                                                                                       \
    EACH_MAKES(inotify_init1, (0))                                                                                     \
    CALL(daemon, {                                                                                                     \
        int status = 1;                                                                                                \
        pid_t child = fork();                                                                                          \
        if (child == 0)                                                                                                \
            _exit(daemon(1, 1) != 0);                                                                                  \
        good = child > 0 && waitpid(child, &status, 0) == child && status == 0;                                        \
    })                                                                                                                 \
    EACH_FAILS(login_tty, (-1), EBADF)                                                                                 \
    EACH_FAILS(setns, (-1, 0), EBADF)                                                                                  \
    EACH_GIVES(unshare, (0), 0)

#pragma GCC diagnostic ignored "-Wnonnull"
#define CALL(name, body) static bool each_##name(void) { bool good; body return good; }
EACH_CALLS
#undef CALL

static const struct each {
    const char *name;
    bool (*call)(void);
} each_call[] = {
#define CALL(name, body) {#name, each_##name},
    EACH_CALLS
#undef CALL
};

/* Makes each call, and gives the name of one that did not do what it should, or NULL. */
static inline const char *each_bad(void)
{
    for (size_t i = 0; i < sizeof each_call / sizeof *each_call; i++)
        if (!each_call[i].call())
            return each_call[i].name;
    return NULL;
}

enum { EACH_COUNT = sizeof each_call / sizeof *each_call };
#endif
