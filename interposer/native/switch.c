/* The life of a socket from socket() to close(), but for connect() and accept(). Owns no state but what hangs on a
 * descriptor (fdtable.h). A socket is decided by one thread at a time (SOCK_DECIDING); no lock is held across a system
 * call. Runs after fork. */
#include "switch.h"
#include "clock.h"
#include "common.h"
#include "companion.h"
#include "connecting.h"
#include "decide.h"
#include "flows.h"
#include "handover.h"
#include "lifecycle.h"
#include "names.h"
#include "ports.h"
#include "polling.h"
#include "reasons.h"
#include "sleepers.h"
#include "stats.h"
#include "trace.h"
#include "uring.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SERVE_MS 1000

/* --- socket, listen --- */

int switch_socket(int domain, int type, int protocol)
{
    int fd, saved = errno;
    do
        fd = real.socket(domain, type, protocol);
    while (fd < 0 && errno == EMFILE && hidden_reclaim());
    if (fd < 0)
        return fd;
    errno = saved;
    if (lifecycle_borrowed())
        return fd;
    bool tcp = !sandbox_closed && (domain == AF_INET || domain == AF_INET6) && (type & 0xf) == SOCK_STREAM &&
               (protocol == 0 || protocol == IPPROTO_TCP);
    struct sock *sock = tcp && !switch_guard ? fdtable_new(fd, domain, SOCK_FRESH) : NULL;
    if (sock) {
        sock->fork_count = lifecycle_forks();
        sock_put(sock);
    } else {
        fdtable_drop(fd);
    }
    errno = saved;                     /* memory may have been short */
    return fd;
}

/* Companions for a listener in SOCK_DECIDING. One that another program has too gets its own at this process's first wait
 * (`later`), so that no client waits for a process that never does. 0, or -EADDRNOTAVAIL. */
static int decide_listen(struct sock *sock, int fd, int backlog, bool later, bool renew)
{
    struct verdict verdict;
    struct endpoint nobody = {0};
    sock->bound = true;
    ports_local(fd, &sock->local);
    decide_request(sock, ROLE_LISTEN, &sock->local, &nobody, &verdict);
    sock->strict = verdict.otherwise == OTHERWISE_ERROR;
    if (verdict.action == ACTION_SAN && later && !sock->unfit) {
        sock_becomes(sock, SOCK_INHERITED);
        return 0;
    }
    int reason = -verdict.reason;
    if (verdict.action == ACTION_SAN)
        reason = companion_listen(sock, fd, &verdict, backlog, uring_possible, renew);
    if (reason == 0) {
        switch_listens(sock, fd);
        return 0;
    }
    if (renew)
        companion_leave(sock, fd);
    decide_tcp(fd, sock, ROW_LISTEN, -reason);
    return sock->strict ? -EADDRNOTAVAIL : 0;
}

void switch_listens(struct sock *sock, int fd)
{
    sock->role = ROW_LISTEN;
    sock_becomes(sock, SOCK_LISTENING);
    for (int i = 0; i < sock->ncompanions; i++)
        stats_listener(sock->companions[i].provider->id);
    switch_publish(fd, sock);
    trace_log("listen fd %d: provider %s", fd, sock->companions[0].provider->name);
}

int switch_listen(int fd, int backlog)
{
    int saved = errno;
    struct sock *sock = decide_hold(fd);
    if (!sock) {
        sock = handover_tcp(fd);
    }
    if (sock && sock_phase(sock) == SOCK_LISTENING)
        companion_notice(sock, fd);
    errno = saved;
    bool ours = sock && decide_begin(sock);
    int result = real.listen(fd, backlog);
    if (sock && !ours && result == 0 && sock_phase(sock) == SOCK_LISTENING)   /* again, with another backlog */
        companion_backlog(sock, backlog);
    if (ours && result < 0)
        atomic_store(&sock->phase, SOCK_FRESH);
    if (!ours || result < 0) {
        if (sock)
            sock_put(sock);
        return result;
    }
    saved = errno;
    result = decide_listen(sock, fd, backlog, sock->foreign, false);
    if (result < 0) {                  /* X7: a listener that TCP alone would serve is none */
        real.shutdown(fd, SHUT_RDWR);
        saved = EADDRNOTAVAIL;
        result = -1;
    }
    sock_put(sock);
    errno = saved;
    return result;
}

/* From `phase` to companions of this process's own. */
static void serve(struct sock *sock, int fd, enum sock_phase phase)
{
    uint8_t expected = (uint8_t)phase;
    if (switch_guard || sandbox_closed || lifecycle_borrowed() ||
        !atomic_compare_exchange_strong(&sock->phase, &expected, SOCK_DECIDING))
        return;
    int saved = errno, cancel, backlog = handover_backlog(fd);
    if (backlog < 0) {                 /* nobody called listen() yet, or the listener was shut down */
        atomic_store(&sock->phase, phase == SOCK_INHERITED ? SOCK_FRESH : phase);
        if (phase == SOCK_LISTENING)
            companion_give_up(sock, fd, REASON_HANDED_ON);
    } else {
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
        decide_listen(sock, fd, backlog, false, phase == SOCK_LISTENING);
        pthread_setcancelstate(cancel, NULL);
    }
    errno = saved;
}

void switch_renew(struct sock *sock, int fd)
{
    serve(sock, fd, SOCK_LISTENING);
}

void switch_serve(struct sock *sock, int fd)
{
    enum sock_phase phase = sock_phase(sock);
    if (phase == SOCK_LISTENING || phase == SOCK_TCP)
        return;
    if (phase == SOCK_INHERITED || (phase == SOCK_FRESH && sock->foreign))
        serve(sock, fd, phase);
    int64_t until = 0;                 /* another thread is at it: this one must not wait for TCP's clients alone */
    while (sock->bound && sock_phase(sock) == SOCK_DECIDING && clock_yield(&until, SERVE_MS))
        ;
}

/* --- shutdown, close, dup, fcntl --- */

/* The kernel is told of a SHUT_RD where it has to be seen, but by no call that a sandbox may forbid. */
void switch_watched(struct sock *sock, int fd)
{
    int saved = errno;
    atomic_store(&sock->in_epoll, true);
    if (atomic_load(&sock->slow) & SLOW_SHUT_READ && !sandbox_closed && real.shutdown(fd, SHUT_RD) < 0)
        errno = saved;
}

int switch_shutdown(int fd, int how)
{
    int saved = errno;
    struct sock *sock = fdtable_get(fd);
    if (!sock)
        return real.shutdown(fd, how);
    int result = 0;
    if (how < SHUT_RD || how > SHUT_RDWR) {
        result = fail(EINVAL);
    } else if (sock_phase(sock) == SOCK_CONNECTING && connecting_cancel(sock, fd)) {
        errno = saved;                 /* as TCP does in SYN_SENT */
    } else if (sock_phase(sock) == SOCK_CONNECTED) {
        bool ended;
        if (names_is_over(sock, fd, &ended)) {
            result = fail(ENOTCONN);
        } else if (how == SHUT_RD && !sock->shut_write) {
            /* Told to the kernel, it ends the peer's sending too, so it is told only where it has to be seen. */
            atomic_fetch_or(&sock->slow, SLOW_SHUT_READ);
            bool shared = sock->fork_count != lifecycle_forks();
            bool seen = sock->in_epoll || shared || (!sandbox_closed && sleepers_wait_for(sock));
            result = seen ? real.shutdown(fd, SHUT_RD) : 0;
        } else {
            bool before = sock->shut_write;
            sock->shut_write |= how == SHUT_WR || how == SHUT_RDWR;   /* first: whom the kernel wakes looks at it */
            result = real.shutdown(fd, sock_is_slow(sock, SLOW_SHUT_READ) && how == SHUT_WR ? SHUT_RDWR : how);
            if (result < 0)
                sock->shut_write = before;
            else
                sock->over |= ended && sock->shut_write;
        }
        if (result == 0 && how != SHUT_WR)
            atomic_fetch_or(&sock->slow, SLOW_SHUT_READ);
        if (result == 0)               /* for who gets it by exec, or has it already */
            common_mark(fd, (how != SHUT_RD ? MARK_SHUT_WRITE : 0u) | (how != SHUT_WR ? MARK_SHUT_READ : 0u));
    } else {
        uint8_t listening = SOCK_LISTENING;
        if (how != SHUT_WR && atomic_compare_exchange_strong(&sock->phase, &listening, SOCK_DECIDING)) {
            common_tell_shut(sock);         /* first: who is woken asks for it, and looks at the listener */
            result = real.shutdown(fd, how);
            saved = result < 0 ? errno : saved;
            companion_silence(sock);
            companion_leave(sock, fd);
            companion_turn_away(sock);
            errno = saved;
            sock->bound = false;       /* a port that the kernel chose went with the listener; only bind() tells which did */
            atomic_store(&sock->phase, SOCK_FRESH);   /* a new listen() makes new companions */
        } else {
            result = real.shutdown(fd, how);
            if (result < 0 && errno == ENOTCONN)
                sock->unfit = REASON_RECONNECT;   /* the kernel keeps it, for the connection that comes */
        }
    }
    sock_put(sock);
    return result;
}

int switch_close(int fd)
{
    if (hidden_is(fd))
        return fail(EBADF);
    if (lifecycle_borrowed())
        return real.close(fd);
    /* The table first: the number may be another thread's as soon as it is closed. What the state holds goes last where
     * it is a connection, whose port must not be free while its native name exists; else first, so that nobody connects
     * to a companion whose listener is gone. */
    bool held = connecting_hold_if_any();
    struct sock *sock = fdtable_peek(fd);
    sock = sock && sock_phase(sock) == SOCK_TCP ? NULL : fdtable_get(fd);   /* the usual one holds nothing */
    bool late = sock && fdtable_companion(fd);
    fdtable_drop(fd);
    held = held || connecting_hold_if_any();
    if (sock && !late)
        sock_put(sock);
    fdtable_await_visitors();
    int result = real.close(fd);
    connecting_let_go(held);
    if (sock && late) {
        int saved = errno;
        sock_put(sock);
        errno = saved;
    }
    return result;
}

struct gap {
    unsigned from;
    int flags;
    int result;
    bool held;
};

static bool close_gap(int fd, struct sock *sock, void *context)
{
    struct gap *gap = context;
    if (sock_phase(sock) != SOCK_HIDDEN) {
        if (!lifecycle_borrowed()) {   /* the table is the parent's */
            fdtable_drop(fd);
            gap->held = gap->held || connecting_hold_if_any();
        }
        return true;
    }
    fdtable_await_visitors();
    if ((unsigned)fd > gap->from)
        gap->result = real.close_range(gap->from, (unsigned)fd - 1, gap->flags);
    gap->from = (unsigned)fd + 1;
    return gap->result == 0;
}

int switch_close_range(unsigned first, unsigned last, int flags)
{
    if (!lifecycle_active || flags & ~CLOSE_RANGE_UNSHARE || first > last)   /* CLOEXEC: hidden ones are */
        return real.close_range(first, last, flags);
    struct gap gap = {first, flags, 0, !lifecycle_borrowed() && connecting_hold_if_any()};
    fdtable_each(first, last, close_gap, &gap);
    fdtable_await_visitors();
    if (gap.result == 0 && gap.from <= last && gap.from >= first)
        gap.result = real.close_range(gap.from, last, flags);
    connecting_let_go(gap.held);
    return gap.result;
}

/* `swaps`: as they were before. */
static void duplicated(int from, int to, uint32_t swaps)
{
    if (to >= FD_SETSIZE)
        polling_high_number();
    if (to < 0 || from == to || (!fdtable_peek(from) && !fdtable_peek(to)) || lifecycle_borrowed())
        return;
    struct sock *sock = fdtable_get(from);
    if (!sock) {
        fdtable_drop(to);
        return;
    }
    fdtable_alias(to, sock);
    /* Another thread has exchanged a socket meanwhile, perhaps this one, and did not know of the alias. */
    int saved = errno;
    if (atomic_load(&companion_swaps) != swaps && !fdtable_same_file(from, to))
        real.dup3(from, to, real.fcntl(to, F_GETFD, 0) & FD_CLOEXEC ? O_CLOEXEC : 0);
    errno = saved;
    stats_row_copy(from, to);
    sock_put(sock);
}

int switch_dup(int from, int command, long argument)
{
    bool held = connecting_hold_if_any();
    uint32_t swaps = atomic_load(&companion_swaps);
    int result, saved = errno;
    do
        result = command < 0 ? real.dup(from) : real.fcntl(from, command, argument);
    while (result < 0 && errno == EMFILE && hidden_reclaim());
    if (result >= 0)
        errno = saved;
    duplicated(from, result, swaps);
    connecting_let_go(held);
    return result;
}

/* The program wants a number that a hidden descriptor has. */
static bool give_way(int from, int to)
{
    struct rlimit limit;
    int saved = errno;
    bool may = getrlimit(RLIMIT_NOFILE, &limit) == 0 && (rlim_t)to < limit.rlim_cur && real.fcntl(from, F_GETFD, 0) >= 0;
    errno = saved;
    while (may && hidden_is(to))
        may = hidden_reclaim();
    return may;
}

int switch_dup2(int from, int to, int flags, bool three)
{
    if (hidden_is(to) && from != to && !lifecycle_borrowed() && !give_way(from, to))
        return fail(EBADF);            /* as if the number were beyond the limit */
    bool held = connecting_hold_if_any();
    uint32_t swaps = atomic_load(&companion_swaps);
    int result = three ? real.dup3(from, to, flags) : real.dup2(from, to);
    duplicated(from, result, swaps);
    connecting_let_go(held);
    return result;
}

void switch_set_blocking(struct sock *sock, int fd, bool on)
{
    int nonblocking = 1;
    if (common_is_shut(sock))
        return;
    common_set_nonblocking(sock, !on);
    if (on && !sock->foreign)          /* the program's view; the listener itself stays non-blocking */
        real.ioctl(fd, FIONBIO, &nonblocking);
}

int switch_fcntl(struct sock *sock, int fd, int command, long argument)
{
    int result;
    if (common_is_shut(sock))       /* by another process: TCP's alone */
        return real.fcntl(fd, command, argument);
    switch (command) {
    case F_GETFL:
        result = real.fcntl(fd, command, argument);
        return result >= 0 && !common_is_nonblocking(sock) ? result & ~O_NONBLOCK : result;
    case F_SETFL:
        result = real.fcntl(fd, command, sock->foreign ? argument : argument | O_NONBLOCK);
        if (result == 0) {
            common_set_nonblocking(sock, argument & O_NONBLOCK);
            companion_signals(sock, fd, (int)argument);
        }
        return result;
    case F_SETOWN:
    case F_SETOWN_EX:
    case F_SETSIG:
        result = real.fcntl(fd, command, argument);
        switch_set_signals(sock, fd);
        return result;
    default:
        return real.fcntl(fd, command, argument);
    }
}

void switch_set_signals(struct sock *sock, int fd)
{
    int saved = errno;
    sock->signals = true;
    if (sock_phase(sock) == SOCK_LISTENING)
        companion_signals(sock, fd, real.fcntl(fd, F_GETFL, 0));
    errno = saved;
}

static bool leave_unserved(int fd, struct sock *sock, void *context)
{
    (void)context;
    if (sock_phase(sock) == SOCK_LISTENING && !common_is_served(sock))
        companion_give_up(sock, fd, REASON_IO_URING);
    return true;
}

void switch_after_ring(void)
{
    int saved = errno;
    uring_made = true;
    if (lifecycle_active && !lifecycle_borrowed())
        fdtable_each_held(leave_unserved, NULL);
    errno = saved;
}

static bool leave_to_tcp(int fd, struct sock *sock, void *context)
{
    (void)context;
    companion_give_up(sock, fd, REASON_SANDBOX);
    return true;
}

void switch_before_filter(bool strict, const struct sock_fprog *filter)
{
    int saved = errno, forbidden = strict ? SYS_socket : sandbox_forbids(filter);
    if (!lifecycle_active || sandbox_closed || forbidden < 0 || flows_strict() || lifecycle_borrowed())
        return;
    trace_log("a filter comes that forbids system call %d: listeners and new sockets are TCP's, reason %d", forbidden,
              REASON_SANDBOX);
    stats_reason(REASON_SANDBOX);
    fdtable_each_held(leave_to_tcp, NULL);
    stats_freeze();
    sandbox_closed = true;
    errno = saved;
}
