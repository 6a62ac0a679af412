/* The socket calls of the program, from socket() to close(): who decides, who serves, what the program is told. Owns no
 * state but what hangs on a descriptor (fdtable.h). A socket is decided by one thread at a time (SOCK_DECIDING); no lock
 * is held across a system call. Runs after fork. */
#include "switch.h"
#include "clock.h"
#include "companion.h"
#include "connecting.h"
#include "flows.h"
#include "handover.h"
#include "lifecycle.h"
#include "memory.h"
#include "options.h"
#include "ports.h"
#include "polling.h"
#include "private_epoll.h"
#include "readiness.h"
#include "reasons.h"
#include "sleepers.h"
#include "stats.h"
#include "trace.h"
#include "uring.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Of pthread_cleanup_push. musl's loader knows no such names, and would not start a program that was to preload us. */
#pragma weak __pthread_register_cancel
#pragma weak __pthread_unregister_cancel

#define SAME_SIDE_IN_A_ROW 8           /* connections from one side of a listener before the other is asked first */
#define TURNED_AWAY_IN_A_ROW 16
#define MOMENT_MS 100                  /* what another thread does without a pause takes no longer */
#define SERVE_MS 1000
#define BUSY_MS 1
#define BAD_LENGTH 4095                /* EINVAL for the program, where EINVAL from a provider means something else */
#define RULE_EARLIER (RULE_DEFAULT - 1)
#define DECISION_MS 2000               /* a thread that connects beside the one that decides waits so long at most */

static _Thread_local const struct sock *deciding;

static int fail(int error)
{
    errno = error;
    return -1;
}

/* --- deciding --- */

static size_t earlier_policy(uint32_t rule, char *out, size_t size)
{
    (void)rule;
    return (size_t)snprintf(out, size, "an earlier policy");
}

void switch_publish(int fd, const struct sock *sock)
{
    uint64_t now = flows_generation();
    bool current = sock->generation == now;
    stats_generation(now);
    enum sock_phase phase = sock_phase(sock);
    bool san = phase == SOCK_LISTENING || phase == SOCK_CONNECTED;
    stats_row_set(fd, sock->role, sock->family, san ? sock->companions[0].provider->id : PROVIDER_NONE, sock->reason,
                  &sock->local, &sock->remote, 0, current ? sock->rule : RULE_EARLIER,
                  current ? flows_rule_text : earlier_policy);
}

/* The socket is TCP's from here on. */
static void stay_on_tcp(int fd, struct sock *sock, uint32_t role, int reason)
{
    sock->role = (uint8_t)role;
    sock->reason = (uint8_t)reason;
    atomic_store(&sock->phase, SOCK_TCP);
    switch_publish(fd, sock);
    if (role == ROW_LISTEN)
        stats_listener(PROVIDER_NONE);
    else
        stats_connection(PROVIDER_NONE);
    stats_reason((uint32_t)reason);
    trace_log("%s fd %d: TCP, reason %d", role == ROW_LISTEN ? "listen" : "connect", fd, reason);
}

static void decide(struct sock *sock, uint8_t role, const struct endpoint *local, const struct endpoint *remote,
                   struct verdict *verdict)
{
    flows_decide(role, sock->family, local, remote, sock->options, sock->noptions, verdict);
    sock->rule = verdict->rule;
    sock->generation = flows_generation();
    sock->send_buffer = verdict->send_buffer;
    sock->receive_buffer = verdict->receive_buffer;
    if (verdict->action == ACTION_SAN && uring_exists(role == ROLE_LISTEN)) {
        verdict->action = ACTION_TCP;
        verdict->reason = REASON_IO_URING;
    }
    if (verdict->action != ACTION_SAN && !verdict->reason)
        verdict->reason = REASON_POLICY_TCP;
}

/* The state with a reference, in the right process: a fork that no handler saw resets all references. */
static struct sock *hold(int fd)
{
    lifecycle_check();
    return fdtable_get(fd);
}

/* Takes a fresh socket into our hands (SOCK_DECIDING); false where libc should answer. */
static bool begin(struct sock *sock)
{
    uint8_t expected = SOCK_FRESH;
    if (switch_guard || lifecycle_borrowed() || !atomic_compare_exchange_strong(&sock->phase, &expected, SOCK_DECIDING))
        return false;
    sock->left = false;
    return true;
}

/* --- socket, listen, connect --- */

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
    decide(sock, ROLE_LISTEN, &sock->local, &nobody, &verdict);
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
    stay_on_tcp(fd, sock, ROW_LISTEN, -reason);
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
    struct sock *sock = hold(fd);
    if (!sock) {
        sock = handover_tcp(fd);
    }
    if (sock && sock_phase(sock) == SOCK_LISTENING)
        companion_notice(sock, fd);
    errno = saved;
    bool ours = sock && begin(sock);
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

struct replacement {
    struct sock *sock;
    int with, error;
};

static bool replace(int fd, struct sock *sock, void *context)
{
    struct replacement *replacement = context;
    int flags = sock == replacement->sock ? real.fcntl(fd, F_GETFD, 0) : -1;
    if (flags >= 0 && real.dup3(replacement->with, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0)
        replacement->error = errno;
    return true;
}

/* The peer has closed after the program's own SHUT_WR, or has reset: TCP would not know it any more. *ended: has the peer ended
 * its sending, as far as the kernel tells? */
static bool is_over(const struct sock *sock, int fd, bool *ended)
{
    struct pollfd look = {fd, POLLRDHUP, 0};
    *ended = false;
    if (sock->over)
        return true;
    int saved = errno, count = real.poll(&look, 1, 0);
    errno = saved;
    if (count != 1)
        return false;
    *ended = look.revents & POLLRDHUP && !sock_is_slow(sock, SLOW_SHUT_READ);   /* else it may be the program's own */
    return look.revents & POLLERR || (sock->shut_write && *ended && look.revents & POLLHUP);
}

/* What getsockname() goes on to say where bind() never named the address, or the port. */
static struct endpoint left_over(const struct sock *sock)
{
    struct endpoint name = sock->local;
    if (!sock->bound || sock->port_is_ours)
        endpoint_set_wildcard(&name, sock->family == AF_INET);
    name.port = sock->local.port;
    return name;
}

/* The TCP socket that stands in for a companion that goes: where the program had not bound the connection, a fresh one.
 * Connected to itself and disconnected it is as TCP's socket, and the kernel tells of the reset. Its hidden number, or -1. */
static int disconnected(struct sock *sock, bool *told)
{
    bool own = sock->role == ROW_CONNECT && !sock->port_is_ours;
    struct endpoint place = left_over(sock);
    if (!own) {
        hidden_close(atomic_exchange(&sock->shadow, -1));
        atomic_store(&sock->joined, 0);
    }
    int fd = options_shadow(sock);
    if (fd < 0)
        return -1;
    if (!own)
        ports_by_kernel(sock, fd, &place);
    options_connected(sock);
    options_part(sock, fd);
    struct pollfd look = {fd, 0, 0};
    *told = real.poll(&look, 1, 0) == 1 && look.revents & POLLERR;
    return fd;
}

static int pending_error(int fd)
{
    int error = 0;
    socklen_t length = sizeof error;
    return real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0 ? 0 : error;
}

/* connect(AF_UNSPEC): a TCP socket takes its place again. */
static int disconnect(struct sock *sock, int fd)
{
    bool told, ended, quiet = is_over(sock, fd, &ended) && !pending_error(fd), ours = sock->port_is_ours;
    struct endpoint name = left_over(sock);
    int saved = errno;
    struct replacement replacement = {sock, disconnected(sock, &told), 0};
    if (replacement.with < 0)
        return fail(ENOBUFS);
    if (quiet && told)
        pending_error(replacement.with);
    companion_copy_flags(sock, fd, replacement.with, false);
    options_replay(sock, replacement.with);
    readiness_recall(sock, fd);
    readiness_before_swap(sock);
    fdtable_each(0, ~0u, replace, &replacement);
    readiness_after_swap(sock, true);
    hidden_close(atomic_exchange(&sock->shadow, -1));
    stats_row_clear(fd);
    if (!ours)                         /* who else has the port, and whether the kernel keeps it, is not known here */
        sock->unfit = REASON_RECONNECT;
    if (ours || sock->role == ROW_ACCEPT) {
        sock->local = name;
        sock->left = true;
        sock->bound = false;
    }
    sock->role = 0;
    sock->port_is_ours = false;
    sock->shut_write = sock->over = false;
    sock->announce = false;
    atomic_store(&sock->connect_error, quiet || told ? 0 : ECONNRESET | CONNECT_CANCELLED);
    atomic_store(&sock->slow, 0);
    companion_stop_moving(&sock->moving);
    sock->moving = (struct moving){0};
    atomic_store(&sock->phase, SOCK_FRESH);
    errno = saved;
    return replacement.error ? fail(replacement.error) : 0;
}

/* Waits for a connect in progress as a blocking connect() does, and says what it came to. 1: TCP's connect goes on. */
static int await(struct sock **held, int fd)
{
    int error = connecting_wait(held, fd, SO_SNDTIMEO);
    if (error)
        return fail(-error);
    struct sock *sock = *held;
    error = sock_take_error(sock);
    if (error)
        return fail(error);
    return atomic_exchange(&sock->announce, false) || sock_phase(sock) == SOCK_CONNECTED ? 0 : 1;
}

/* connect() on a descriptor that a companion carries already, or a placeholder. */
static int connect_again(struct sock **held, int fd, const struct sockaddr *address, socklen_t length)
{
    struct sock *sock = *held;
    if (length > sizeof(struct sockaddr_storage))
        return fail(EINVAL);
    if (!memory_reads(address, length))
        return fail(EFAULT);
    if (length < sizeof address->sa_family)
        return fail(EINVAL);
    bool unspecified = address->sa_family == AF_UNSPEC;
    if (sock_phase(sock) == SOCK_CONNECTING) {
        if (unspecified && connecting_cancel(sock, fd))
            return 0;
        if (real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK)
            return fail(EALREADY);
        int result = await(held, fd);
        if (result < 0 && errno == EINPROGRESS)
            errno = EALREADY;          /* has waited in vain */
        if (result <= 0 || !unspecified)
            return result;
    }
    if (unspecified)
        return disconnect(sock, fd);
    return atomic_exchange(&sock->announce, false) ? 0 : fail(EISCONN);
}

/* What a connect by the verdict's providers came to. 0: a companion. 1: TCP. -1: errno. */
static int settle(struct sock *sock, int fd, const struct verdict *verdict, int result)
{
    if (result == 0) {
        sock->role = ROW_CONNECT;
        private_epoll_renew(sock);
        sock_becomes(sock, SOCK_CONNECTED);
        stats_connection(sock->companions[0].provider->id);
        switch_publish(fd, sock);
        trace_log("connect fd %d: provider %s", fd, sock->companions[0].provider->name);
        return 0;
    }
    if (result > 0 || verdict->otherwise == OTHERWISE_ERROR) {
        stats_reason(result > 0 ? REASON_REFUSED : (uint32_t)-result);
        atomic_store(&sock->phase, SOCK_FRESH);
        return fail(result > 0 ? result : ECONNREFUSED);
    }
    stay_on_tcp(fd, sock, ROW_CONNECT, -result);
    return 1;
}

/* Decides for a socket in SOCK_DECIDING. As settle(), or COMPANION_IN_PROGRESS. */
static int decide_connect(struct sock *sock, int fd, const struct endpoint *remote)
{
    struct verdict verdict;
    struct endpoint local = {0};
    if (sock->bound)
        ports_local(fd, &local);
    sock->local = local;
    decide(sock, ROLE_CONNECT, &local, remote, &verdict);
    int result = -verdict.reason;
    if (verdict.action == ACTION_SAN) {
        result = companion_connect(sock, fd, remote, &verdict);
        if (result == COMPANION_IN_PROGRESS)
            return result;
    }
    if (result != 0) {
        sock->local = local;
        sock->remote = *remote;
        sock->announce = false;
    }
    bool final = result > 0;
    result = settle(sock, fd, &verdict, result);
    connecting_release(sock);
    if (final && real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK) {   /* TCP would have learnt it from the network */
        atomic_store(&fdtable_matters, true);
        atomic_store(&sock->connect_error, errno);
        return fail(EINPROGRESS);
    }
    return result;
}

/* In the provider's thread. The program learns of it by readiness, SO_ERROR or a second connect(). */
void switch_completed(struct sock *sock, int fd, const struct verdict *verdict, int result)
{
    bool at_once = result == 0;
    if (result != 0)
        companion_unbind(sock, fd);
    if (result < 0 && verdict->otherwise != OTHERWISE_ERROR) {   /* first: a fresh TCP socket looks connected to poll() */
        struct sockaddr_storage address;
        socklen_t length = sizeof address;
        int tcp = atomic_load(&sock->shadow), flags = real.fcntl(tcp, F_GETFL, 0);
        endpoint_to_sockaddr(&sock->remote, sock->family, (struct sockaddr *)&address, &length);
        real.fcntl(tcp, F_SETFL, flags | O_NONBLOCK);
        at_once = real.connect(tcp, (struct sockaddr *)&address, length) == 0;
        if (!at_once && errno != EINPROGRESS)
            atomic_store(&sock->connect_error, errno);
        real.fcntl(tcp, F_SETFL, flags);
    } else if (result != 0) {
        atomic_store(&sock->connect_error, result > 0 ? result : ECONNREFUSED);
    }
    if (result != 0)
        connecting_give_back(sock, fd);
    sock->announce = at_once;
    settle(sock, fd, verdict, result);
    connecting_release(sock);
}

/* Where a connection would go, if it is one that we may decide: same family as the socket, a port. The kernel takes the
 * wildcard for the socket's own address (IPv4), or for loopback. */
static bool destination(const struct sock *sock, int fd, const struct sockaddr *address, socklen_t length, struct endpoint *remote)
{
    if (length > sizeof(struct sockaddr_storage) || !memory_reads(address, length) ||
        !endpoint_from_sockaddr(remote, address, length) || address->sa_family != sock->family || !remote->port)
        return false;
    if (!endpoint_is_wildcard(remote))
        return true;
    struct endpoint own;
    bool v4 = endpoint_is_v4(remote), bound = sock->bound && ports_local(fd, &own) && !endpoint_is_wildcard(&own);
    uint16_t port = remote->port;
    if (v4 && bound) {
        *remote = own;
    } else if (v4 || (bound && endpoint_is_v4(&own))) {
        endpoint_set_wildcard(remote, true);
        remote->ip[12] = 127;
        remote->ip[15] = 1;
    } else {
        remote->ip[15] = 1;
    }
    remote->port = port;
    return true;
}

/* Another thread is in connect() or listen() with this socket: waits for what it comes to, as the kernel's lock on a TCP
 * socket would. False: EALREADY. */
static bool await_decision(const struct sock *sock, int fd)
{
    const struct timespec moment = {0, 50000};
    int64_t deadline = clock_ms() + DECISION_MS;
    if (deciding == sock || real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK)   /* a signal handler has interrupted that thread */
        return false;
    while (sock_phase(sock) == SOCK_DECIDING && clock_ms() < deadline)
        nanosleep(&moment, NULL);
    return sock_phase(sock) != SOCK_DECIDING;
}

int switch_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    struct endpoint remote;
    struct sock *sock = hold(fd);
    int saved = errno, result = 1;
again:
    if (sock && sock_is_slow(sock, SLOW_CONNECTING))
        connecting_goes_on(sock);
    if (sock && sock_phase(sock) == SOCK_LISTENING)
        companion_notice(sock, fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_FREE;
    int error = sock ? atomic_load_explicit(&sock->connect_error, memory_order_relaxed) : 0;
    if (error)
        sock_take_error(sock);
    if (error && !(error & CONNECT_CANCELLED))
        result = fail(error);
    else if (phase == SOCK_DECIDING && await_decision(sock, fd))
        goto again;
    else if (phase == SOCK_DECIDING)
        result = fail(EALREADY);
    else if (phase == SOCK_TCP && atomic_load_explicit(&sock->announce, memory_order_relaxed))
        result = atomic_exchange(&sock->announce, false) ? 0 : 1;
    else if (phase == SOCK_CONNECTED || phase == SOCK_CONNECTING)
        result = connect_again(&sock, fd, address, length);
    else if (phase == SOCK_FRESH && destination(sock, fd, address, length, &remote)) {
        if (begin(sock)) {
            int cancel;
            pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
            deciding = sock;
            result = decide_connect(sock, fd, &remote);
            deciding = NULL;
            pthread_setcancelstate(cancel, NULL);
            if (result == COMPANION_IN_PROGRESS && !(real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK))
                result = await(&sock, fd);
            else if (result == COMPANION_IN_PROGRESS || (result == 0 && sock->announce))
                result = fail(EINPROGRESS);
        } else if (sock_phase(sock) != SOCK_FRESH) {
            goto again;                /* another thread was quicker */
        }
    }
    if (result >= 0)
        errno = saved;
    bool known = sock;
    if (sock)
        sock_put(sock);
    if (result <= 0)
        return result;
    result = real.connect(fd, address, length);
    if (result < 0 && errno == EINVAL && !known && (sock = handover_adopt(fd))) {   /* an AF_UNIX socket's word */
        sock_put(sock);
        errno = saved;
        return switch_connect(fd, address, length);
    }
    return result;
}

bool switch_fast_open(int fd, const struct sockaddr *address, socklen_t length, int *result)
{
    struct endpoint remote;
    struct sock *sock = hold(fd);
    bool ours = sock && destination(sock, fd, address, length, &remote) && begin(sock);
    int saved = errno;
    *result = 1;
    if (ours) {
        *result = decide_connect(sock, fd, &remote);
        if (*result == COMPANION_IN_PROGRESS)
            *result = real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK ? fail(EINPROGRESS) : await(&sock, fd);
        else
            sock->announce = false;
    }
    if (*result >= 0)
        errno = saved;
    if (sock)
        sock_put(sock);
    return *result <= 0;               /* TCP: the kernel's own fast open */
}

/* --- accept --- */

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
        if (may_interrupt(number, &blocked) && sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN &&
            !(action.sa_flags & SA_RESTART))
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
    return sock_phase(listener) == SOCK_LISTENING && !companion_is_nonblocking(listener) &&
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

/* As the kernel hands an address out: 0 or -errno. */
static int tell_address(const struct endpoint *ep, int family, struct sockaddr *address, socklen_t *length)
{
    socklen_t whole = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (!memory_takes(length, sizeof *length))
        return -EFAULT;
    if ((int)*length < 0)
        return -EINVAL;
    if (!memory_takes(address, *length < whole ? *length : whole))
        return -EFAULT;
    endpoint_to_sockaddr(ep, family, address, length);
    return 0;
}

static int hand_out(int fd, const struct endpoint *peer, int family, struct sockaddr *address, socklen_t *length)
{
    int error = address ? tell_address(peer, family, address, length) : 0;
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
 * lock is one of the kernel's on the file itself, and ends with the process; threads, which have it together, take turns. A
 * stopped holder keeps nobody from SAN clients. */
static int accept_ready(struct sock *sock, const struct inherited *inherited, int fd, struct sockaddr *address,
                        socklen_t *length, int flags, bool plain)
{
    static _Atomic int32_t holder;     /* a process: a fork may carry it along */
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
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
        if (sock->reason)
            companion_give_up(sock, fd, sock->reason);
        else                           /* it was handed on, or shut down elsewhere */
            serve(sock, fd, SOCK_LISTENING);
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

/* The TCP listener: closed meanwhile, it has a hidden number. */
static int listener_of(struct sock *sock, int fd)
{
    return fdtable_peek(fd) == sock || hidden_is(fd) ? fd : atomic_load(&sock->shadow);
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
        companion_mark_accepting(*held);
        bool nonblocking = companion_is_nonblocking(*held);
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
    struct sock *sock = ours ? hold(fd) : NULL;
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

/* --- names --- */

/* Another thread has just put the companion under fd, or is taking it away: the state says so in a moment. */
static struct sock *exchanged(int fd)
{
    int64_t until = 0;
    while (fdtable_peek(fd) && !fdtable_companion(fd) && clock_yield(&until, MOMENT_MS))
        ;
    return fdtable_companion(fd) ? fdtable_get(fd) : NULL;
}

int switch_bind(const struct sock *sock, const struct sockaddr *address, socklen_t length)
{
    size_t needed = sock->family == AF_INET ? sizeof(struct sockaddr_in) : offsetof(struct sockaddr_in6, sin6_scope_id);
    if ((int)length < 0 || length > sizeof(struct sockaddr_storage))
        return fail(EINVAL);
    if (length && !memory_reads(address, length))
        return fail(EFAULT);
    if (length < needed || address->sa_family == sock->family)
        return fail(EINVAL);
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)address;   /* old programs say no family */
    bool any = sock->family == AF_INET && v4->sin_family == AF_UNSPEC && v4->sin_addr.s_addr == INADDR_ANY;
    return fail(any ? EINVAL : EAFNOSUPPORT);
}

/* The name that a connection left over: TCP's socket would have it still. */
static bool is_left(int fd)
{
    const struct sock *sock = fdtable_peek(fd);
    return sock && sock->left && !sock->bound && sock_phase(sock) == SOCK_FRESH;
}

static int name(int fd, struct sockaddr *address, socklen_t *length, bool peer)
{
    struct sock *sock = fdtable_companion(fd) || (!peer && is_left(fd)) ? fdtable_get(fd) : NULL;
    if (!sock) {
        socklen_t room = memory_reads(length, sizeof *length) ? *length : 0;
        int result = (peer ? real.getpeername : real.getsockname)(fd, address, length);
        /* Only an AF_UNIX socket can be a companion from elsewhere, and the family is the first field of any answer. */
        if (result < 0 || (room >= sizeof address->sa_family && address->sa_family != AF_UNIX) || (!(sock = handover_adopt(fd)) && !(sock = exchanged(fd))))
            return result;
        *length = room;
    }
    bool ended, none = peer && (connecting_goes_on(sock) || is_over(sock, fd, &ended));
    int error = none ? -ENOTCONN : tell_address(peer ? &sock->remote : &sock->local, sock->family, address, length);
    int result = error ? fail(-error) : 0;
    sock_put(sock);
    return result;
}

int switch_getsockname(int fd, struct sockaddr *address, socklen_t *length)
{
    return name(fd, address, length, false);
}

int switch_getpeername(int fd, struct sockaddr *address, socklen_t *length)
{
    return name(fd, address, length, true);
}

/* --- shutdown, close, dup, fcntl --- */

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
        companion_recall(sock, fd);
        if (is_over(sock, fd, &ended)) {
            result = fail(ENOTCONN);
        } else if (how == SHUT_RD && !sock->shut_write) {
            /* Told to the kernel, it ends the peer's sending too, so it is told only where an event has to be seen. */
            atomic_fetch_or(&sock->slow, SLOW_SHUT_READ);
            bool seen = sock->in_epoll || (!sandbox_closed && sleepers_wait_for(sock));
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
            companion_mark(fd, (how != SHUT_RD ? MARK_SHUT_WRITE : 0u) | (how != SHUT_WR ? MARK_SHUT_READ : 0u));
    } else {
        uint8_t listening = SOCK_LISTENING;
        if (how != SHUT_WR && atomic_compare_exchange_strong(&sock->phase, &listening, SOCK_DECIDING)) {
            companion_tell_shut(sock);         /* first: who is woken asks for it, and looks at the listener */
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
    struct sock *sock = fdtable_peek(fd);
    if (sock && sock_phase(sock) == SOCK_TCP) {
        fdtable_drop(fd);
        return real.close(fd);
    }
    sock = fdtable_get(fd);
    /* The table first: the number may be another thread's as soon as it is closed. What the state holds goes last where
     * it is a connection, whose port must not be free while its native name exists; else first, so that nobody connects
     * to a companion whose listener is gone. */
    bool held = connecting_hold_if_any(), late = fdtable_companion(fd);
    fdtable_drop(fd);
    if (sock && !late)
        sock_put(sock);
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
};

static bool close_gap(int fd, struct sock *sock, void *context)
{
    struct gap *gap = context;
    if (sock_phase(sock) != SOCK_HIDDEN) {
        if (!lifecycle_borrowed())     /* the table is the parent's */
            fdtable_drop(fd);
        return true;
    }
    if ((unsigned)fd > gap->from)
        gap->result = real.close_range(gap->from, (unsigned)fd - 1, gap->flags);
    gap->from = (unsigned)fd + 1;
    return gap->result == 0;
}

int switch_close_range(unsigned first, unsigned last, int flags)
{
    if (!lifecycle_active || flags & ~CLOSE_RANGE_UNSHARE || first > last)   /* CLOEXEC: hidden ones are */
        return real.close_range(first, last, flags);
    struct gap gap = {first, flags, 0};
    bool held = !lifecycle_borrowed() && connecting_hold_if_any();
    fdtable_each(first, last, close_gap, &gap);
    if (gap.result == 0 && gap.from <= last && gap.from >= first)
        gap.result = real.close_range(gap.from, last, flags);
    connecting_let_go(held);
    return gap.result;
}

/* `swaps`: as they were before. */
static void duplicated(int from, int to, uint32_t swaps)
{
    if (to < 0 || from == to || lifecycle_borrowed())
        return;
    if (to >= FD_SETSIZE)
        polling_high_number();
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

int switch_fcntl(struct sock *sock, int fd, int command, long argument)
{
    int result;
    switch (command) {
    case F_GETFL:
        result = real.fcntl(fd, command, argument);
        return result >= 0 && !companion_is_nonblocking(sock) ? result & ~O_NONBLOCK : result;
    case F_SETFL:
        result = real.fcntl(fd, command, sock->foreign ? argument : argument | O_NONBLOCK);
        if (result == 0) {
            companion_set_nonblocking(sock, argument & O_NONBLOCK);
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
    if (sock_phase(sock) == SOCK_LISTENING && !companion_is_served(sock))
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
