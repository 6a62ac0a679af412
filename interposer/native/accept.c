/* accept() on listeners that several providers and TCP serve: who has a connection, whose turn it is, and the wait for one.
 * Owns the turn of this process's threads at listeners that may block. Runs after fork. */
#include "cleanup.h"
#include "clock.h"
#include "common.h"
#include "companion.h"
#include "decide.h"
#include "names.h"
#include "options.h"
#include "private_epoll.h"
#include "reasons.h"
#include "stats.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>

#define SAME_SIDE_IN_A_ROW 8           /* connections from one side of a listener before the other is asked first */
#define TURNED_AWAY_IN_A_ROW 16
#define BUSY_MS 1
#define BAD_LENGTH 4095                /* EINVAL for the program, where EINVAL from a provider means something else */

/* Signals of faults do not come while a thread sleeps. */
static bool may_interrupt(int number, const sigset_t *blocked)
{
    return number != SIGSEGV && number != SIGBUS && number != SIGFPE && number != SIGILL && number != SIGTRAP &&
           number != SIGSYS && number != SIGABRT && !sigismember(blocked, number);
}

bool switch_restarts(void)
{
    int saved = errno;
    bool all = true;
    sigset_t blocked;
    sigemptyset(&blocked);
    pthread_sigmask(SIG_BLOCK, NULL, &blocked);
    for (int number = 1; all && number < NSIG; number++) {
        struct sigaction action;
        if (may_interrupt(number, &blocked) && sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_DFL &&
            action.sa_handler != SIG_IGN && !(action.sa_flags & SA_RESTART))
            all = false;
    }
    errno = saved;
    return all;
}

static int accept_real(int fd, struct sockaddr *address, socklen_t *length, int flags, bool plain)
{
    return plain ? real.accept(fd, address, length) : real.accept4(fd, address, length, flags);
}

/* May accept() on the TCP listener block? Only after another program inherited it, with its O_NONBLOCK as it was. */
static bool may_block(const struct sock *listener, int fd)
{
    return sock_phase(listener) == SOCK_LISTENING && !common_is_nonblocking(listener) &&
           !(real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK);
}

/* What a connection takes over from its listener. */
struct inherited {
    int family, reason;
    uint32_t rule;
    bool strict;
    uint64_t generation;
};

static struct inherited inherited_from(const struct sock *listener)
{
    int reason = sock_phase(listener) == SOCK_LISTENING ? REASON_PEER_TCP : listener->reason;
    return (struct inherited){listener->family, reason, listener->rule, listener->strict, listener->generation};
}

static struct sock *adopt_accepted(int fd, const struct inherited *inherited, enum sock_phase phase)
{
    struct sock *sock = fdtable_new(fd, inherited->family, phase);
    if (sock) {
        sock->role = ROW_ACCEPT;
        sock->rule = inherited->rule;
        sock->generation = inherited->generation;
        sock->fork_count = lifecycle_forks();
    }
    return sock;
}

static int hand_out(int fd, const struct endpoint *peer, int family, struct sockaddr *address, socklen_t *length)
{
    int error = address ? names_tell(peer, family, address, length) : 0;
    if (error) {                       /* as TCP: the connection is lost */
        fdtable_drop(fd);
        real.close(fd);
    }
    return !error ? fd : error == -EINVAL ? -BAD_LENGTH : error;
}

static int accept_companion(struct sock *listener, int index, struct sockaddr *address, socklen_t *length, int flags)
{
    struct endpoint local, peer;
    struct moving moving;
    int fd = companion_accept(listener, index, flags & SOCK_NONBLOCK, flags & SOCK_CLOEXEC, &moving, &local, &peer);
    if (fd < 0)
        return fd;
    struct inherited inherited = inherited_from(listener);
    struct sock *sock = adopt_accepted(fd, &inherited, SOCK_DECIDING);
    if (!sock && moving.mover) {
        companion_stop_moving(&moving);
        real.close(fd);
        return -ENOMEM;
    }
    if (!sock)                         /* no memory; the bytes flow, and the name tells the rest when there is some */
        return hand_out(fd, &peer, listener->family, address, length);
    sock->moving = moving;
    sock->slow = moving.mover ? SLOW_MOVER : 0;
    sock->v6only = listener->v6only;
    sock->bound = !endpoint_is_wildcard(&listener->local);
    sock->local = local;
    sock->remote = peer;
    sock->companions[0].provider = listener->companions[index].provider;
    for (int i = 0; i < listener->noptions; i++)
        if (options_inherits(listener->options[i].level, listener->options[i].name))
            sock->options[sock->noptions++] = listener->options[i];
    sock_becomes(sock, SOCK_CONNECTED);
    stats_connection(sock->companions[0].provider->id);
    switch_publish(fd, sock);
    sock_put(sock);
    return hand_out(fd, &peer, listener->family, address, length);
}

/* A connection that came by TCP. The call may block: no reference is held. */
static int accept_tcp(const struct inherited *inherited, int fd, struct sockaddr *address, socklen_t *length, int flags,
                      bool plain)
{
    int accepted;
    do
        accepted = accept_real(fd, address, length, flags, plain);
    while (accepted < 0 && errno == EMFILE && hidden_reclaim());
    if (accepted < 0)
        return -errno;
    if (inherited->strict) {
        real.close(accepted);
        stats_reason((uint32_t)inherited->reason);
        return -ECONNABORTED;
    }
    struct sock *sock = adopt_accepted(accepted, inherited, SOCK_TCP);
    if (sock) {
        sock->reason = (uint8_t)inherited->reason;
        switch_publish(accepted, sock);
        sock_put(sock);
    }
    stats_connection(PROVIDER_NONE);
    stats_reason((uint32_t)inherited->reason);
    return accepted;
}

/* The sides of a listener are numbered: its companions, then TCP. A set of them is a mask. */
#define UNKNOWN_SIDES 0u

/* Without descriptors of its own: waits with poll(). The sides that are ready, or -errno; 0 when the time is over. */
static int poll_sides(struct sock *sock, int fd, unsigned sides, int timeout)
{
    struct pollfd fds[PROVIDERS_MAX + 1];
    for (int i = 0; i <= sock->ncompanions; i++)
        fds[i] = (struct pollfd){sides >> i & 1 ? i < sock->ncompanions ? companion_poll_fd(sock, i) : fd : -1, POLLIN, 0};
    int count = real.poll(fds, (nfds_t)sock->ncompanions + 1, timeout), ready = 0;
    if (count < 0)
        return -errno;
    for (int i = 0; i <= sock->ncompanions; i++)
        ready |= (fds[i].revents != 0) << i;
    return ready;
}

/* accept() on a TCP listener where it may block: while a process looks and takes, no other process of the switch's takes. The
 * lock is one of the kernel's on the last byte of the file, where the program has none of its own, and ends with the process;
 * threads, which have it together, take turns. A stopped holder keeps nobody from SAN clients. */
static int accept_ready(struct sock *sock, const struct inherited *inherited, int fd, struct sockaddr *address,
                        socklen_t *length, int flags, bool plain)
{
    static _Atomic int32_t holder;     /* a process: a fork may carry it along */
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = INT64_MAX, .l_len = 1};
    int result = -EAGAIN;
    int64_t until = 0;
    int32_t before;
    do
        before = atomic_load(&holder);
    while ((before == lifecycle_pid || !atomic_compare_exchange_strong(&holder, &before, lifecycle_pid)) &&
           clock_yield(&until, MOMENT_MS));
    if (real.fcntl(fd, F_SETLK, (long)&lock) < 0 && (errno == EAGAIN || errno == EACCES)) {
        poll_sides(sock, fd, (1u << sock->ncompanions) - 1, BUSY_MS);
    } else {
        struct pollfd ready = {fd, POLLIN, 0};
        if (real.poll(&ready, 1, 0) == 1)
            result = accept_tcp(inherited, fd, address, length, flags, plain);
        lock.l_type = F_UNLCK;
        real.fcntl(fd, F_SETLK, (long)&lock);
    }
    atomic_store(&holder, 0);
    return result;
}

static int accept_side(struct sock *sock, int side, int fd, struct sockaddr *address, socklen_t *length, int flags, bool plain)
{
    bool companion = side < sock->ncompanions;
    struct inherited inherited = inherited_from(sock);
    bool blocks = !companion && may_block(sock, fd);
    int tries = TURNED_AWAY_IN_A_ROW, result;
    do
        result = companion ? accept_companion(sock, side, address, length, flags)
                 : blocks  ? accept_ready(sock, &inherited, fd, address, length, flags, plain)
                           : accept_tcp(&inherited, fd, address, length, flags, plain);
    while (result == -ECONNABORTED && --tries && (companion || sock->strict));
    if (result == -ECONNABORTED && (companion || sock->strict))
        return -EAGAIN;
    if (result == -EMFILE && companion && hidden_reclaim())
        result = accept_companion(sock, side, address, length, flags);
    if (result == -EINVAL && companion) {   /* silenced and drained */
        if (sock->reason || common_is_left(sock))
            companion_give_up(sock, fd, REASON_HANDED_ON);
        else                           /* it was handed on, or shut down elsewhere */
            switch_renew(sock, fd);
        return -EAGAIN;
    }
    return result == -BAD_LENGTH ? -EINVAL : result;
}

/* Whoever has a connection, of the sides that are ready. Sides take turns after a run, so that neither starves the other,
 * and clients that are turned away hold nobody up for long. Where it is not known who is ready, the side of the last
 * connections is tried at once and the others are asked first: a vain accept() costs the kernel a whole socket. -EAGAIN:
 * nobody. */
static int accept_any(struct sock *sock, unsigned ready, int fd, struct sockaddr *address, socklen_t *length, int flags,
                      bool plain)
{
    int sides = sock->ncompanions + 1, first = sock->turn / SAME_SIDE_IN_A_ROW % sides, result = -EAGAIN;
    bool known = ready != UNKNOWN_SIDES;
    for (int turn = 0; turn < sides && result == -EAGAIN; turn++) {
        int side = (first + turn) % sides;
        if (!known && turn == 1) {
            int others = poll_sides(sock, fd, ((1u << sides) - 1) & ~(1u << first), 0);
            ready = others > 0 ? (unsigned)others : 0;
        }
        if ((known || turn > 0) && !(ready >> side & 1))
            continue;
        result = accept_side(sock, side, fd, address, length, flags, plain);
        if (result >= 0)
            sock->turn = (uint8_t)(side == first ? sock->turn + 1 : side * SAME_SIDE_IN_A_ROW);
    }
    return result;
}

static int64_t receive_timeout(const struct sock *sock, int fd)
{
    struct timeval limit = {0};
    if (!options_find(sock, SOL_SOCKET, SO_RCVTIMEO) && !sock->options_lost)
        return -1;
    socklen_t length = sizeof limit;
    if (real.getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, &length) < 0 || (!limit.tv_sec && !limit.tv_usec))
        return -1;
    return limit.tv_sec * 1000 + (limit.tv_usec + 999) / 1000;
}

struct wait {
    struct sock *sock;
    int place;
};

/* A thread was cancelled. */
static void wait_no_more(void *context)
{
    struct wait *wait = context;
    private_epoll_give(wait->sock, wait->place);
    sock_put(wait->sock);
}

/* The TCP listener: closed meanwhile, it has another of its numbers, or a hidden one. */
static int listener_of(struct sock *sock, int fd)
{
    int alias = hidden_is(fd) ? fd : fdtable_alias_of(sock, fd);
    return alias >= 0 ? alias : atomic_load(&sock->shadow);
}

/* The sides that are ready, or -errno. A fork takes the reference from the child. */
static int wait_on(struct sock *sock, int fd, int timeout)
{
    struct epoll_event events[PROVIDERS_MAX + 1];
    struct wait wait = {.sock = sock};
    int count, ready = 0, epfd = private_epoll_take(sock, fd, &wait.place);
    pthread_cleanup_push(wait_no_more, &wait);
    count = epfd < 0 ? poll_sides(sock, fd, ~0u, timeout) : epoll_wait(epfd, events, PROVIDERS_MAX + 1, timeout);
    pthread_cleanup_pop(0);
    int error = errno;
    private_epoll_give(sock, wait.place);
    if (epfd < 0)
        return count;
    if (count < 0 && error == EBADF) { /* the program has closed it by an instruction of its own */
        hidden_close(epfd);
        return 0;
    }
    for (int i = 0; i < count; i++)    /* data: 0 is TCP, the companions follow */
        ready |= 1 << (events[i].data.u64 ? (int)events[i].data.u64 - 1 : sock->ncompanions);
    return count < 0 ? -error : ready;
}

/* Waits as a blocking accept does: the sides that are ready, or -errno. The listener stays as long, whoever closes it. */
static int wait_for_connection(struct sock *sock, int fd, int64_t *deadline)
{
    if (*deadline == 0) {
        int64_t limit = receive_timeout(sock, fd);
        *deadline = limit < 0 ? -1 : clock_ms() + limit;
        /* An epoll of the program's with EPOLLEXCLUSIVE keeps what woke it from the private one. */
        int ready = sock->nregistrations ? poll_sides(sock, fd, ~0u, 0) : 0;
        if (ready > 0)
            return ready;
    }
    for (;;) {
        int64_t left = *deadline < 0 ? -1 : *deadline - clock_ms();
        if (*deadline >= 0 && left <= 0)
            return -EAGAIN;
        int now = listener_of(sock, fd);
        int ready = now < 0 ? -EBADF : wait_on(sock, now, left > INT32_MAX ? INT32_MAX : (int)left);
        if (ready > 0)
            return ready;
        if (ready < 0 && (ready != -EINTR || *deadline >= 0 || !switch_restarts()))
            return ready;
    }
}

static int accept_held(struct sock **held, int fd, struct sockaddr *address, socklen_t *length, int flags, bool plain)
{
    int64_t deadline = 0;
    for (;;) {
        unsigned ready = UNKNOWN_SIDES;
        switch_serve(*held, fd);
        if (sock_phase(*held) == SOCK_LISTENING)
            companion_serve(*held, fd);
        if (sock_phase(*held) != SOCK_LISTENING)
            break;
        common_mark_accepting(*held);
        bool nonblocking = common_is_nonblocking(*held);
        if (!nonblocking) {
            int waited = wait_for_connection(*held, fd, &deadline);
            if (waited < 0)
                return waited;
            ready = (unsigned)waited;
            fd = listener_of(*held, fd);
            if (fd < 0)
                return -EBADF;
        }
        int cancel;                    /* a thread that ended in there would keep the listener for ever */
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
        int result = accept_any(*held, ready, fd, address, length, flags, plain);
        pthread_setcancelstate(cancel, NULL);
        if (result != -EAGAIN || nonblocking)
            return result;
    }
    struct inherited inherited = inherited_from(*held);
    int result;
    sock_put(*held);
    *held = NULL;
    do
        result = accept_tcp(&inherited, fd, address, length, flags, plain);
    while (result == -ECONNABORTED && inherited.strict);
    return result;
}

int switch_accept(int fd, struct sockaddr *address, socklen_t *length, int flags, bool plain)
{
    int result, saved = errno;
    bool ours = !switch_guard && !lifecycle_borrowed() && fdtable_peek(fd);
    if (ours)
        pthread_testcancel();          /* before there is anything to lose */
    struct sock *sock = ours ? decide_hold(fd) : NULL;
    if (!sock) {
        do
            result = accept_real(fd, address, length, flags, plain);
        while (result < 0 && errno == EMFILE && hidden_reclaim());
        if (result >= 0) {
            errno = saved;
            if (!lifecycle_borrowed())
                fdtable_drop(result);
        }
        return result;
    }
    if (flags & ~(SOCK_NONBLOCK | SOCK_CLOEXEC) || fdtable_companion(fd))
        result = -EINVAL;
    else
        result = accept_held(&sock, fd, address, length, flags, plain);
    if (sock)
        sock_put(sock);
    if (result < 0)
        return fail(-result);
    errno = saved;
    return result;
}
