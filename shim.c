/* The exported hooks and nothing else: each looks its descriptor up and hands on to the switch, or to libc. Declared and
 * exported from hooks.def; the C names carry a prefix so that libc's own prototypes do not stand in the way. */
#include "interposer/native/real.h"

#include "interposer/native/clock.h"
#include "interposer/native/companion.h"
#include "interposer/native/connecting.h"
#include "interposer/native/data.h"
#include "interposer/native/forward.h"
#include "interposer/native/handover.h"
#include "interposer/native/lifecycle.h"
#include "interposer/native/memory.h"
#include "interposer/native/options.h"
#include "interposer/native/polling.h"
#include "interposer/native/private_epoll.h"
#include "interposer/native/readiness.h"
#include "interposer/native/switch.h"
#include "interposer/native/uring.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HOOK(type, name, parameters, arguments)                                                                        \
    __attribute__((visibility("default"))) type hook_##name parameters __asm__(#name);
#include "interposer/native/hooks.def"
#undef HOOK

/* --- life and addresses --- */

int hook_socket(int domain, int type, int protocol)
{
    return lifecycle_active ? switch_socket(domain, type, protocol) : real.socket(domain, type, protocol);
}

int hook_bind(int fd, const struct sockaddr *address, socklen_t length)
{
    struct sock *sock = fdtable_peek(fd);
    if (sock && fdtable_companion(fd))
        return switch_bind(sock, address, length);
    int result = real.bind(fd, address, length);
    if (sock && result == 0)
        sock->bound = true;
    return result;
}

int hook_listen(int fd, int backlog)
{
    return lifecycle_active ? switch_listen(fd, backlog) : real.listen(fd, backlog);
}

int hook_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    return fdtable_peek(fd) ? switch_connect(fd, address, length) : real.connect(fd, address, length);
}

int hook_accept(int fd, struct sockaddr *address, socklen_t *length)
{
    return lifecycle_active ? switch_accept(fd, address, length, 0, true) : real.accept(fd, address, length);
}

int hook_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    return lifecycle_active ? switch_accept(fd, address, length, flags, false) : real.accept4(fd, address, length, flags);
}

int hook_getsockname(int fd, struct sockaddr *address, socklen_t *length)
{
    struct sock *sock = fdtable_peek(fd);
    return lifecycle_active && !(sock && sock_phase(sock) == SOCK_TCP) ? switch_getsockname(fd, address, length)
                                                                       : real.getsockname(fd, address, length);
}

int hook_getpeername(int fd, struct sockaddr *address, socklen_t *length)
{
    struct sock *sock = fdtable_peek(fd);
    return lifecycle_active && !(sock && sock_phase(sock) == SOCK_TCP) ? switch_getpeername(fd, address, length)
                                                                       : real.getpeername(fd, address, length);
}

int hook_shutdown(int fd, int how)
{
    struct sock *sock = fdtable_peek(fd);
    return sock && sock_phase(sock) != SOCK_TCP ? switch_shutdown(fd, how) : real.shutdown(fd, how);
}

int hook_close(int fd)
{
    return fdtable_peek(fd) ? switch_close(fd) : real.close(fd);
}

int hook_close_range(unsigned first, unsigned last, int flags)
{
    return switch_close_range(first, last, flags);
}

void hook_closefrom(int first)
{
    /* libc's own closes what it can and aborts otherwise; the range call does the same here */
    if (switch_close_range(first < 0 ? 0 : (unsigned)first, ~0u, 0) < 0)
        real.closefrom(first);
}

/* stdio closes by itself: the state must go first, while what is buffered can still be sent. */
static bool forget_stream(FILE *stream)
{
    int saved = errno, fd = fileno_unlocked(stream);
    errno = saved;                     /* a stream in memory has none */
    if (fd < 0 || !fdtable_peek(fd) || lifecycle_borrowed())
        return false;
    fflush_unlocked(stream);
    bool held = connecting_hold_if_any();
    fdtable_drop(fd);
    return held || connecting_hold_if_any();
}

int hook_fclose(FILE *stream)
{
    bool held = forget_stream(stream);
    int result = real.fclose(stream);
    connecting_let_go(held);
    return result;
}

FILE *hook_freopen(const char *path, const char *mode, FILE *stream)
{
    bool held = forget_stream(stream);
    stream = real.freopen(path, mode, stream);
    connecting_let_go(held);
    return stream;
}

FILE *hook_freopen64(const char *path, const char *mode, FILE *stream)
{
    bool held = forget_stream(stream);
    stream = real.freopen64(path, mode, stream);
    connecting_let_go(held);
    return stream;
}

int hook_dup(int fd)
{
    return lifecycle_active ? switch_dup(fd, -1, 0) : real.dup(fd);
}

int hook_dup2(int from, int to)
{
    return lifecycle_active ? switch_dup2(from, to, 0, false) : real.dup2(from, to);
}

int hook_dup3(int from, int to, int flags)
{
    return lifecycle_active ? switch_dup2(from, to, flags, true) : real.dup3(from, to, flags);
}

/* fcntl64 is what programs built against glibc 2.28 or newer call; the two are one function there. */
int hook_fcntl(int fd, int command, long argument)
{
    struct sock *sock = fdtable_peek(fd);
    if (lifecycle_active && (command == F_DUPFD || command == F_DUPFD_CLOEXEC))
        return switch_dup(fd, command, argument);
    if (!sock)
        return real.fcntl(fd, command, argument);
    if (sock_phase(sock) == SOCK_LISTENING)
        return switch_fcntl(sock, fd, command, argument);
    if (command == F_SETOWN || command == F_SETOWN_EX || command == F_SETSIG)
        sock->signals = true;
    return real.fcntl(fd, command, argument);
}

int hook_fcntl64(int fd, int command, long argument)
{
    return hook_fcntl(fd, command, argument);
}

int hook_ioctl(int fd, unsigned long request, void *argument)
{
    struct sock *sock = fdtable_peek(fd);
    if (!sock || sock_phase(sock) == SOCK_TCP)
        return real.ioctl(fd, request, argument);
    if (fdtable_companion(fd))
        return options_ioctl(sock, fd, request, argument);
    int result = real.ioctl(fd, request, argument);
    if (result == 0 && request == FIONBIO && sock_phase(sock) == SOCK_LISTENING)
        switch_set_blocking(sock, fd, !*(int *)argument);
    if (result == 0 && (request == FIOASYNC || request == FIOSETOWN || request == SIOCSPGRP))
        switch_set_signals(sock, fd);
    return result;
}

/* --- options --- */

int hook_setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    struct sock *sock = fdtable_peek(fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_TCP;
    if (phase == SOCK_CONNECTED || phase == SOCK_CONNECTING)
        return options_set(sock, fd, level, name, value, length);
    int result = real.setsockopt(fd, level, name, value, length);
    if (result == 0 && phase != SOCK_TCP && phase != SOCK_HIDDEN) {
        options_record(sock, level, name, value, length);
        companion_option(sock, level, name, value, length);
        if (sock->unfit)               /* a listener with companions has to give them up */
            companion_retire(sock, sock->unfit);
    } else if (result < 0 && errno == EOPNOTSUPP && (sock = handover_adopt(fd))) {
        result = options_set(sock, fd, level, name, value, length);
        sock_put(sock);
    }
    return result;
}

int hook_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    struct sock *sock = fdtable_companion(fd);
    if (sock && sock_is_slow(sock, SLOW_CONNECTING) && !connecting_goes_on(sock))
        sock = fdtable_companion(fd);
    if (sock)
        return options_get(sock, fd, level, name, value, length);
    int result = real.getsockopt(fd, level, name, value, length);
    if (result == 0 && name == SO_ERROR && level == SOL_SOCKET && (sock = fdtable_peek(fd)) && *length == sizeof(int) &&
        *(int *)value == 0)
        *(int *)value = sock_take_error(sock);
    bool foreign = result < 0 ? errno == EOPNOTSUPP
                              : level == SOL_SOCKET && (name == SO_DOMAIN || name == SO_PROTOCOL) && *length == sizeof(int) &&
                                    *(int *)value == (name == SO_DOMAIN ? AF_UNIX : 0);
    if (foreign && (sock = handover_adopt(fd))) {
        result = options_get(sock, fd, level, name, value, length);
        sock_put(sock);
    }
    return result;
}

/* --- data --- */

ssize_t hook_read(int fd, void *buffer, size_t size)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_read(sock, fd, buffer, size) : real.read(fd, buffer, size);
}

ssize_t hook_readv(int fd, const struct iovec *vector, int count)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_readv(sock, fd, vector, count) : real.readv(fd, vector, count);
}

ssize_t hook_recv(int fd, void *buffer, size_t size, int flags)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_recv(sock, fd, buffer, size, flags) : real.recv(fd, buffer, size, flags);
}

ssize_t hook_recvfrom(int fd, void *buffer, size_t size, int flags, struct sockaddr *address, socklen_t *length)
{
    struct sock *sock = fdtable_companion(fd);
    if (!sock)
        return real.recvfrom(fd, buffer, size, flags, address, length);
    ssize_t result = data_recv(sock, fd, buffer, size, flags);
    return result >= 0 && address && data_no_address(length) < 0 ? -1 : result;
}

ssize_t hook_recvmsg(int fd, struct msghdr *message, int flags)
{
    struct sock *sock = fdtable_companion(fd);
    if (sock)
        return data_recvmsg(sock, fd, message, flags);
    ssize_t result = real.recvmsg(fd, message, flags);
    if (result >= 0 && message->msg_controllen)
        handover_received(message);
    return result;
}

int hook_recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    struct sock *sock = fdtable_companion(fd);
    if (sock)
        return data_recvmmsg(sock, fd, messages, count, flags, timeout);
    int result = real.recvmmsg(fd, messages, count, flags, timeout);
    for (int i = 0; i < result; i++)
        if (messages[i].msg_hdr.msg_controllen)
            handover_received(&messages[i].msg_hdr);
    return result;
}

ssize_t hook_write(int fd, const void *buffer, size_t size)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_write(sock, fd, buffer, size) : real.write(fd, buffer, size);
}

ssize_t hook_writev(int fd, const struct iovec *vector, int count)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_writev(sock, fd, vector, count) : real.writev(fd, vector, count);
}

ssize_t hook_send(int fd, const void *buffer, size_t size, int flags)
{
    struct sock *sock = fdtable_companion(fd);
    return sock ? data_send(sock, fd, buffer, size, flags) : real.send(fd, buffer, size, flags);
}

ssize_t hook_sendto(int fd, const void *buffer, size_t size, int flags, const struct sockaddr *address, socklen_t length)
{
    int connected = 0;
    if (flags & MSG_FASTOPEN && fdtable_peek(fd) && switch_fast_open(fd, address, length, &connected)) {
        if (connected < 0)
            return -1;
        flags &= ~MSG_FASTOPEN;
    }
    struct sock *sock = fdtable_companion(fd);
    if (!sock)
        return real.sendto(fd, buffer, size, flags, address, length);
    return address && data_takes_address(address, length) < 0 ? -1 : data_send(sock, fd, buffer, size, flags);
}

ssize_t hook_sendmsg(int fd, const struct msghdr *message, int flags)
{
    int connected = 0;
    if (flags & MSG_FASTOPEN && fdtable_peek(fd) && memory_reads(message, sizeof *message) &&
        switch_fast_open(fd, message->msg_name, message->msg_namelen, &connected)) {
        if (connected < 0)
            return -1;
        flags &= ~MSG_FASTOPEN;
    }
    struct sock *sock = fdtable_companion(fd);
    if (sock)
        return data_sendmsg(sock, fd, message, flags);
    if (!fdtable_is_idle() && memory_reads(message, sizeof *message) && message->msg_controllen)
        handover_before_send(message);
    return real.sendmsg(fd, message, flags);
}

int hook_sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    struct sock *sock = fdtable_companion(fd);
    if (sock)
        return data_sendmmsg(sock, fd, messages, count, flags);
    if (count > UIO_MAXIOV)
        count = UIO_MAXIOV;
    if (flags & MSG_FASTOPEN && count && fdtable_peek(fd) && memory_takes(messages, sizeof *messages)) {
        ssize_t first = hook_sendmsg(fd, &messages->msg_hdr, flags);   /* connects; the others are told that it is done */
        if (first < 0)
            return -1;
        messages->msg_len = (unsigned)first;
        int saved = errno, more = count > 1 ? hook_sendmmsg(fd, messages + 1, count - 1, flags) : 0;
        errno = saved;
        return more > 0 ? more + 1 : 1;
    }
    bool readable = !fdtable_is_idle() && memory_reads(messages, count * sizeof *messages);
    for (unsigned i = 0; readable && i < count; i++)
        if (messages[i].msg_hdr.msg_controllen)
            handover_before_send(&messages[i].msg_hdr);
    return real.sendmmsg(fd, messages, count, flags);
}

/* --- readiness --- */

int hook_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    bool pass = fdtable_is_idle() || count > FDTABLE_LEAF * FDTABLE_LEAVES || !memory_reads(fds, count * sizeof *fds);
    return pass ? real.poll(fds, count, timeout) : polling_poll(fds, count, timeout);
}

int hook_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    bool pass = fdtable_is_idle() || count > FDTABLE_LEAF * FDTABLE_LEAVES || !memory_reads(fds, count * sizeof *fds);
    return pass ? real.ppoll(fds, count, timeout, mask) : polling_ppoll(fds, count, timeout, mask);
}

/* What the kernel will read of them. */
static bool sets_are_there(int count, const fd_set *in, const fd_set *out, const fd_set *except)
{
    size_t size = count > 0 ? (size_t)(count + 63) / 64 * 8 : 0;
    return (!in || memory_reads(in, size)) && (!out || memory_reads(out, size)) && (!except || memory_reads(except, size));
}

int hook_select(int count, fd_set *in, fd_set *out, fd_set *except, struct timeval *timeout)
{
    if (count > FD_SETSIZE)
        count = polling_select_bound(count);
    if (fdtable_is_idle() || !sets_are_there(count, in, out, except) || !polling_selects(count, in, out, except) ||
        (timeout && (!memory_takes(timeout, sizeof *timeout) || timeout->tv_sec < 0 || timeout->tv_usec < 0)))
        return real.select(count, in, out, except, timeout);
    if (!timeout)
        return polling_select(count, in, out, except, NULL, NULL);
    struct timespec limit = {0, timeout->tv_usec % 1000000 * 1000};
    if (__builtin_add_overflow(timeout->tv_sec, timeout->tv_usec / 1000000, &limit.tv_sec))
        limit.tv_sec = INT64_MAX;
    int result = polling_select(count, in, out, except, &limit, NULL);
    *timeout = (struct timeval){limit.tv_sec, limit.tv_nsec / 1000};
    return result;
}

int hook_pselect(int count, fd_set *in, fd_set *out, fd_set *except, const struct timespec *timeout, const sigset_t *mask)
{
    if (count > FD_SETSIZE)
        count = polling_select_bound(count);
    if (fdtable_is_idle() || !sets_are_there(count, in, out, except) || !polling_selects(count, in, out, except) ||
        (timeout && !memory_reads(timeout, sizeof *timeout)))
        return real.pselect(count, in, out, except, timeout, mask);
    struct timespec limit = timeout ? *timeout : (struct timespec){0};   /* pselect leaves the program's as it is */
    return polling_select(count, in, out, except, timeout ? &limit : NULL, mask);
}

int hook_epoll_ctl(int epfd, int operation, int fd, struct epoll_event *event)
{
    struct sock *sock = fdtable_peek(fd);
    if (sock && sock_phase(sock) == SOCK_CONNECTED && operation != EPOLL_CTL_DEL &&
        !atomic_load_explicit(&sock->in_epoll, memory_order_relaxed))
        switch_watched(sock, fd);
    if (!sock && operation != EPOLL_CTL_ADD)
        return real.epoll_ctl(epfd, operation, fd, event);
    if (!sock) {
        int saved = errno, result = real.epoll_ctl(epfd, operation, fd, event);
        return result < 0 ? readiness_nest(epfd, operation, fd, event, saved) : result;
    }
    if (sock_phase(sock) == SOCK_TCP || lifecycle_borrowed() ||
        (sock_phase(sock) == SOCK_CONNECTED && !atomic_load_explicit(&sock->spent, memory_order_relaxed)) ||
        (operation != EPOLL_CTL_DEL && !memory_reads(event, sizeof *event)))
        return real.epoll_ctl(epfd, operation, fd, event);
    return readiness_epoll_ctl(sock, epfd, operation, fd, event);
}

/* --- FORTIFY: the check fails in libc, with its own message --- */

ssize_t hook___read_chk(int fd, void *buffer, size_t size, size_t room)
{
    return size > room ? real.__read_chk(fd, buffer, size, room) : hook_read(fd, buffer, size);
}

ssize_t hook___recv_chk(int fd, void *buffer, size_t size, size_t room, int flags)
{
    return size > room ? real.__recv_chk(fd, buffer, size, room, flags) : hook_recv(fd, buffer, size, flags);
}

ssize_t hook___recvfrom_chk(int fd, void *buffer, size_t size, size_t room, int flags, struct sockaddr *address,
                            socklen_t *length)
{
    return size > room ? real.__recvfrom_chk(fd, buffer, size, room, flags, address, length)
                       : hook_recvfrom(fd, buffer, size, flags, address, length);
}

int hook___poll_chk(struct pollfd *fds, nfds_t count, int timeout, size_t room)
{
    return room / sizeof *fds < count ? real.__poll_chk(fds, count, timeout, room) : hook_poll(fds, count, timeout);
}

int hook___ppoll_chk(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask, size_t room)
{
    return room / sizeof *fds < count ? real.__ppoll_chk(fds, count, timeout, mask, room)
                                      : hook_ppoll(fds, count, timeout, mask);
}

/* --- another program --- */

/* The list forms become arrays on the stack, as in libc: they must not allocate. */
#define EXPORTED(name) __attribute__((visibility("default"))) int hook_##name(const char *, const char *, ...) __asm__(#name)
EXPORTED(execl);
EXPORTED(execlp);
EXPORTED(execle);

static int count_arguments(va_list list)
{
    int count = 1;
    while (va_arg(list, const char *))
        count++;
    return count;
}

#define COLLECT_ARGUMENTS(arguments, first)                                                                            \
    va_list list;                                                                                                      \
    va_start(list, first);                                                                                             \
    int count = first ? count_arguments(list) : 0;                                                                     \
    va_end(list);                                                                                                      \
    char *arguments[count + 1];                                                                                        \
    va_start(list, first);                                                                                             \
    arguments[0] = (char *)first;                                                                                      \
    for (int i = 1; i <= count; i++)                                                                                   \
        arguments[i] = va_arg(list, char *);

int hook_execl(const char *path, const char *first, ...)
{
    COLLECT_ARGUMENTS(arguments, first)
    va_end(list);
    return hook_execv(path, arguments);
}

int hook_execlp(const char *file, const char *first, ...)
{
    COLLECT_ARGUMENTS(arguments, first)
    va_end(list);
    return hook_execvp(file, arguments);
}

int hook_execle(const char *path, const char *first, ...)
{
    COLLECT_ARGUMENTS(arguments, first)
    char *const *environment = va_arg(list, char *const *);
    va_end(list);
    return hook_execve(path, arguments, environment);
}

int hook_execve(const char *path, char *const arguments[], char *const environment[])
{
    handover_before_exec(path, false, environment);
    int result = real.execve(path, arguments, environment);
    handover_after_exec();
    return result;
}

int hook_execv(const char *path, char *const arguments[])
{
    return hook_execve(path, arguments, environ);
}

int hook_execvp(const char *file, char *const arguments[])
{
    return hook_execvpe(file, arguments, environ);
}

int hook_execvpe(const char *file, char *const arguments[], char *const environment[])
{
    handover_before_exec(file, true, environment);
    int result = real.execvpe(file, arguments, environment);
    handover_after_exec();
    return result;
}

/* The program behind a descriptor; NULL where that is not known. */
static const char *program_at(int directory, const char *path, int flags, char *out, size_t size)
{
    if (directory == AT_FDCWD || (!is_no_pointer(path) && *path == '/'))
        return path;
    if (is_no_pointer(path) || (!*path && !(flags & AT_EMPTY_PATH)))
        return NULL;
    int length = snprintf(out, size, "/proc/self/fd/%d%s%s", directory, *path ? "/" : "", path);
    return length > 0 && (size_t)length < size ? out : NULL;
}

int hook_execveat(int directory, const char *path, char *const arguments[], char *const environment[], int flags)
{
    char name[4096];
    handover_before_exec(program_at(directory, path, flags, name, sizeof name), false, environment);
    int result = real.execveat(directory, path, arguments, environment, flags);
    handover_after_exec();
    return result;
}

int hook_fexecve(int fd, char *const arguments[], char *const environment[])
{
    char name[32];
    handover_before_exec(program_at(fd, "", AT_EMPTY_PATH, name, sizeof name), false, environment);
    int result = real.fexecve(fd, arguments, environment);
    handover_after_exec();
    return result;
}

int hook_posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                     const posix_spawnattr_t *attributes, char *const arguments[], char *const environment[])
{
    handover_before_spawn(path, false, environment, actions);
    int result = real.posix_spawn(pid, path, actions, attributes, arguments, environment);
    handover_after_spawn();
    return result;
}

int hook_posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                      const posix_spawnattr_t *attributes, char *const arguments[], char *const environment[])
{
    handover_before_spawn(file, true, environment, actions);
    int result = real.posix_spawnp(pid, file, actions, attributes, arguments, environment);
    handover_after_spawn();
    return result;
}

static bool starved(void)
{
    return errno == EMFILE && hidden_reclaim();
}

/* libc starts the shell by calls that no hook sees. */
int hook_system(const char *command)
{
    handover_before_spawn("/bin/sh", false, environ, false);
    int result = real.system(command);
    handover_after_spawn();
    return result;
}

FILE *hook_popen(const char *command, const char *mode)
{
    FILE *result;
    handover_before_spawn("/bin/sh", false, environ, false);
    do
        result = real.popen(command, mode);
    while (!result && starved());
    handover_after_spawn();
    return result;
}

/* A child with its parent's memory and thread-local data is what a vfork child is, whichever stack it runs on. */
static void note_clone(long flags)
{
    if (flags & CLONE_VM && !(flags & (CLONE_THREAD | CLONE_SETTLS)))
        lifecycle_vfork = 1;
}

int hook_clone(int (*run)(void *), void *stack, int flags, void *argument, pid_t *parent, void *tls, pid_t *child)
{
    if (flags & CLONE_THREAD)
        return real.clone(run, stack, flags, argument, parent, tls, child);
    note_clone(flags);
    hidden_before_start();
    int result = real.clone(run, stack, flags, argument, parent, tls, child);
    hidden_after_start();
    return result;
}

void hook__exit(int status)
{
    forward_at_exit();
    real._exit(status);
}

void hook__Exit(int status)
{
    forward_at_exit();
    real._Exit(status);
}

int hook_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
{
    if (option == PR_SET_SECCOMP)
        switch_before_filter(a == SECCOMP_MODE_STRICT, (const struct sock_fprog *)b);
    return real.prctl(option, a, b, c, d);
}

int hook_setns(int fd, int type)
{
    lifecycle_moved = true;
    return real.setns(fd, type);
}

int hook_unshare(int flags)
{
    lifecycle_moved = true;
    return real.unshare(flags);
}

/* --- other descriptors: a number that is made was somebody's, and where none is left the hidden ones give way --- */

static void made(int fd)
{
    if (fd >= 0 && fdtable_peek(fd) && !lifecycle_borrowed())
        fdtable_drop(fd);
}

#define MAKE(type, result, failed, fd, call)                                                                           \
    int saved = errno;                                                                                                 \
    type result;                                                                                                       \
    do                                                                                                                 \
        result = call;                                                                                                 \
    while ((failed) && starved());                                                                                     \
    if (!(failed)) {                                                                                                   \
        made(fd);                                                                                                      \
        errno = saved;                                                                                                 \
    }                                                                                                                  \
    return result;
#define MAKE_ONE(call) MAKE(int, fd, fd < 0, fd, call)
#define MAKE_PAIR(call) MAKE(int, result, result < 0, (made(pair[0]), pair[1]), call)

int hook_open(const char *path, int flags, unsigned mode)
{
    MAKE_ONE(real.open(path, flags, mode))
}

int hook_open64(const char *path, int flags, unsigned mode)
{
    MAKE_ONE(real.open64(path, flags, mode))
}

int hook_openat(int directory, const char *path, int flags, unsigned mode)
{
    MAKE_ONE(real.openat(directory, path, flags, mode))
}

int hook_openat64(int directory, const char *path, int flags, unsigned mode)
{
    MAKE_ONE(real.openat64(directory, path, flags, mode))
}

int hook_creat(const char *path, unsigned mode)
{
    MAKE_ONE(real.creat(path, mode))
}

int hook_creat64(const char *path, unsigned mode)
{
    MAKE_ONE(real.creat64(path, mode))
}

/* FORTIFY's, without a mode. */
int hook___open_2(const char *path, int flags)
{
    MAKE_ONE(real.__open_2(path, flags))
}

int hook___open64_2(const char *path, int flags)
{
    MAKE_ONE(real.__open64_2(path, flags))
}

int hook___openat_2(int directory, const char *path, int flags)
{
    MAKE_ONE(real.__openat_2(directory, path, flags))
}

int hook___openat64_2(int directory, const char *path, int flags)
{
    MAKE_ONE(real.__openat64_2(directory, path, flags))
}

int hook_shm_open(const char *name, int flags, unsigned mode)
{
    MAKE_ONE(real.shm_open(name, flags, mode))
}

FILE *hook_tmpfile(void)
{
    MAKE(FILE *, stream, !stream, fileno_unlocked(stream), real.tmpfile())
}

FILE *hook_tmpfile64(void)
{
    MAKE(FILE *, stream, !stream, fileno_unlocked(stream), real.tmpfile64())
}

FILE *hook_fopen(const char *path, const char *mode)
{
    MAKE(FILE *, stream, !stream, fileno_unlocked(stream), real.fopen(path, mode))
}

FILE *hook_fopen64(const char *path, const char *mode)
{
    MAKE(FILE *, stream, !stream, fileno_unlocked(stream), real.fopen64(path, mode))
}

DIR *hook_opendir(const char *path)
{
    MAKE(DIR *, directory, !directory, dirfd(directory), real.opendir(path))
}

int hook_pipe(int pair[2])
{
    MAKE_PAIR(real.pipe(pair))
}

int hook_pipe2(int pair[2], int flags)
{
    MAKE_PAIR(real.pipe2(pair, flags))
}

int hook_socketpair(int domain, int type, int protocol, int pair[2])
{
    MAKE_PAIR(real.socketpair(domain, type, protocol, pair))
}

int hook_epoll_create(int size)
{
    private_epoll_needed();
    MAKE_ONE(real.epoll_create(size))
}

int hook_epoll_create1(int flags)
{
    private_epoll_needed();
    MAKE_ONE(real.epoll_create1(flags))
}

int hook_eventfd(unsigned value, int flags)
{
    MAKE_ONE(real.eventfd(value, flags))
}

int hook_timerfd_create(int clock, int flags)
{
    MAKE_ONE(real.timerfd_create(clock, flags))
}

/* With a descriptor it makes none. */
int hook_signalfd(int old, const sigset_t *mask, int flags)
{
    MAKE_ONE(real.signalfd(old, mask, flags))
}

int hook_memfd_create(const char *name, unsigned flags)
{
    MAKE_ONE(real.memfd_create(name, flags))
}

int hook_inotify_init(void)
{
    MAKE_ONE(real.inotify_init())
}

int hook_inotify_init1(int flags)
{
    MAKE_ONE(real.inotify_init1(flags))
}

/* libc closes and replaces by calls that no hook sees. */
static void made_standard(void)
{
    for (int fd = 0; fd < 3; fd++)
        made(fd);
}

int hook_daemon(int stay, int keep)
{
    int result = real.daemon(stay, keep);
    if (result == 0 && !keep)
        made_standard();
    return result;
}

int hook_login_tty(int fd)
{
    int result = real.login_tty(fd);
    if (result == 0)
        made_standard();
    return result;
}

/* --- calls by number --- */

/* The kernel's own form of ppoll and pselect6: a mask of eight bytes, and the time that is left is told. */
struct kernel_mask {
    const void *bits;
    size_t size;
};

static const sigset_t *wide_mask(struct kernel_mask narrow, sigset_t *wide)
{
    if (!narrow.bits)
        return NULL;
    sigemptyset(wide);
    memcpy(wide, narrow.bits, sizeof(uint64_t));
    return wide;
}

static long ppoll_by_number(struct pollfd *fds, nfds_t count, struct timespec *timeout, struct kernel_mask mask)
{
    sigset_t wide;
    if (is_no_pointer(fds) || (timeout && is_no_pointer(timeout)) || (mask.bits && mask.size != sizeof(uint64_t)))
        return real.syscall(SYS_ppoll, (long)fds, (long)count, (long)timeout, (long)mask.bits, (long)mask.size, 0);
    bool told = timeout && timeout->tv_sec >= 0 && timeout->tv_sec < 1000000000;
    int64_t end = told ? clock_ns(CLOCK_MONOTONIC) + timeout->tv_sec * 1000000000 + timeout->tv_nsec : 0;
    int result = hook_ppoll(fds, count, timeout, wide_mask(mask, &wide));
    if (told) {
        int64_t left = end - clock_ns(CLOCK_MONOTONIC);
        *timeout = left > 0 ? (struct timespec){left / 1000000000, left % 1000000000} : (struct timespec){0};
    }
    return result;
}

static long pselect_by_number(int count, fd_set *in, fd_set *out, fd_set *except, struct timespec *timeout,
                              const struct kernel_mask *mask)
{
    sigset_t wide;
    if (!polling_selects(count, in, out, except) || (mask && mask->bits && mask->size != sizeof(uint64_t)))
        return real.syscall(SYS_pselect6, count, (long)in, (long)out, (long)except, (long)timeout, (long)mask);
    return polling_select(count, in, out, except, timeout, mask ? wide_mask(*mask, &wide) : NULL);
}

static __attribute__((noinline)) long by_number(long number, long a, long b, long c, long d, long e, long f)
{
    int fd = (int)a;
    switch (number) {
    case SYS_socket: return hook_socket(fd, (int)b, (int)c);
    case SYS_bind: return hook_bind(fd, (const struct sockaddr *)b, (socklen_t)c);
    case SYS_connect: return hook_connect(fd, (const struct sockaddr *)b, (socklen_t)c);
    case SYS_listen: return hook_listen(fd, (int)b);
    case SYS_accept: return hook_accept(fd, (struct sockaddr *)b, (socklen_t *)c);
    case SYS_accept4: return hook_accept4(fd, (struct sockaddr *)b, (socklen_t *)c, (int)d);
    case SYS_getsockname: return hook_getsockname(fd, (struct sockaddr *)b, (socklen_t *)c);
    case SYS_getpeername: return hook_getpeername(fd, (struct sockaddr *)b, (socklen_t *)c);
    case SYS_setsockopt: return hook_setsockopt(fd, (int)b, (int)c, (const void *)d, (socklen_t)e);
    case SYS_getsockopt: return hook_getsockopt(fd, (int)b, (int)c, (void *)d, (socklen_t *)e);
    case SYS_shutdown: return hook_shutdown(fd, (int)b);
    case SYS_close: return hook_close(fd);
    case SYS_close_range: return hook_close_range((unsigned)a, (unsigned)b, (int)c);
    case SYS_dup: return hook_dup(fd);
#ifdef SYS_dup2
    case SYS_dup2: return hook_dup2(fd, (int)b);
    case SYS_poll: return hook_poll((struct pollfd *)a, (nfds_t)b, (int)c);
    case SYS_select: return hook_select(fd, (fd_set *)b, (fd_set *)c, (fd_set *)d, (struct timeval *)e);
#endif
    case SYS_dup3: return hook_dup3(fd, (int)b, (int)c);
    case SYS_fcntl: return hook_fcntl(fd, (int)b, c);
    case SYS_ioctl: return hook_ioctl(fd, (unsigned long)b, (void *)c);
    case SYS_read: return hook_read(fd, (void *)b, (size_t)c);
    case SYS_readv: return hook_readv(fd, (const struct iovec *)b, (int)c);
    case SYS_recvfrom: return hook_recvfrom(fd, (void *)b, (size_t)c, (int)d, (struct sockaddr *)e, (socklen_t *)f);
    case SYS_recvmsg: return hook_recvmsg(fd, (struct msghdr *)b, (int)c);
    case SYS_recvmmsg: return hook_recvmmsg(fd, (struct mmsghdr *)b, (unsigned)c, (int)d, (struct timespec *)e);
    case SYS_write: return hook_write(fd, (const void *)b, (size_t)c);
    case SYS_writev: return hook_writev(fd, (const struct iovec *)b, (int)c);
    case SYS_sendto:
        return hook_sendto(fd, (const void *)b, (size_t)c, (int)d, (const struct sockaddr *)e, (socklen_t)f);
    case SYS_sendmsg: return hook_sendmsg(fd, (const struct msghdr *)b, (int)c);
    case SYS_sendmmsg: return hook_sendmmsg(fd, (struct mmsghdr *)b, (unsigned)c, (int)d);
    case SYS_ppoll:
        return ppoll_by_number((struct pollfd *)a, (nfds_t)b, (struct timespec *)c, (struct kernel_mask){(void *)d, (size_t)e});
    case SYS_pselect6:
        return pselect_by_number(fd, (fd_set *)b, (fd_set *)c, (fd_set *)d, (struct timespec *)e, (struct kernel_mask *)f);
    default: return hook_epoll_ctl(fd, (int)b, (int)c, (struct epoll_event *)d);
    }
}

static bool is_ours(long number, long a, long c)
{
    switch (number) {
    case SYS_socket:
    case SYS_connect:
    case SYS_listen:
    case SYS_accept:
    case SYS_accept4:
    case SYS_getsockname:
    case SYS_getpeername:
    case SYS_setsockopt:
    case SYS_getsockopt:
    case SYS_close:
    case SYS_close_range:
    case SYS_dup:
#ifdef SYS_dup2
    case SYS_dup2:
    case SYS_poll:
    case SYS_select:
#endif
    case SYS_dup3:
    case SYS_ppoll:
    case SYS_pselect6: return true;
    case SYS_bind:
    case SYS_shutdown:
    case SYS_fcntl:
    case SYS_ioctl:
    case SYS_read:
    case SYS_readv:
    case SYS_recvfrom:
    case SYS_recvmsg:
    case SYS_recvmmsg:
    case SYS_write:
    case SYS_writev:
    case SYS_sendto:
    case SYS_sendmsg:
    case SYS_sendmmsg: return fdtable_peek((int)a);
    case SYS_epoll_ctl: return fdtable_peek((int)c);
    default: return false;
    }
}

/* Not a constant: a program that the switch is linked into would look as if it made rings itself. */
static const volatile long ring_setup = SYS_io_uring_setup;

static __attribute__((noinline)) long set_up_ring(long entries, long parameters)
{
    long result = real.syscall(ring_setup, entries, parameters, 0, 0, 0, 0);
    if (result >= 0)
        switch_after_ring();
    return result;
}

/* All other calls must be handed on by a jump that leaves the stack as it is: libc's syscall() finds its seventh argument,
 * and a cloned child its return address, where the caller put them. tests/unit/test_build.py looks at the machine code. */
long hook_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    if (lifecycle_active && is_ours(number, a, c))
        return by_number(number, a, b, c, d, e, f);
    if (number == SYS_seccomp && (a == SECCOMP_SET_MODE_STRICT || a == SECCOMP_SET_MODE_FILTER))
        switch_before_filter(a == SECCOMP_SET_MODE_STRICT, (const struct sock_fprog *)c);
    if (number == SYS_prctl && a == PR_SET_SECCOMP)
        switch_before_filter(b == SECCOMP_MODE_STRICT, (const struct sock_fprog *)c);
    if (number == SYS_exit_group)
        forward_at_exit();
    if (number == SYS_clone)
        note_clone(a);
    if (number == SYS_execve)
        handover_before_exec((const char *)a, false, (char *const *)c);
    if (number == SYS_execveat)
        handover_before_exec(a == AT_FDCWD ? (const char *)b : NULL, false, (char *const *)d);
    if (number == SYS_io_uring_setup)
        return set_up_ring(a, b);
    if (number == SYS_io_uring_enter && !uring_made)
        switch_after_ring();           /* one that came from elsewhere */
    if (number == SYS_setns || number == SYS_unshare || number == SYS_landlock_restrict_self)
        lifecycle_moved = true;
    return real.syscall(number, a, b, c, d, e, f);
}

/* vfork: the child runs on its parent's stack and memory, so the hook cannot be a C function that calls the original. It
 * marks the thread, and the first hook that matters asks in which of the two processes it is. */
#if defined __x86_64__
__attribute__((used)) void hook_before_vfork(void)
{
    lifecycle_vfork = 1;
    hidden_before_start();
}

__asm__(".text\n.globl vfork\n.type vfork, @function\nvfork:\n"
        "    endbr64\n"
        "    subq $8, %rsp\n"
        "    call hook_before_vfork\n"
        "    addq $8, %rsp\n"
        "    popq %rdi\n"
        "    movl $58, %eax\n"
        "    syscall\n"
        "    pushq %rdi\n"
        "    testl %eax, %eax\n"
        "    jz 2f\n"
        "    pushq %rax\n"
        "    call hidden_after_start\n"
        "    popq %rax\n"
        "    cmpl $-4095, %eax\n"
        "    jae 1f\n"
        "2:  ret\n"
        "1:  negl %eax\n"
        "    pushq %rbx\n"
        "    movl %eax, %ebx\n"
        "    call __errno_location@PLT\n"
        "    movl %ebx, (%rax)\n"
        "    popq %rbx\n"
        "    orq $-1, %rax\n"
        "    ret\n"
        ".size vfork, .-vfork\n");
#endif
