/* connect(), from the decision to what the program is told, and its undoing. Owns the mark of the socket that a thread
 * decides for. Runs after fork. */
#include "clock.h"
#include "companion.h"
#include "connecting.h"
#include "decide.h"
#include "handover.h"
#include "memory.h"
#include "names.h"
#include "options.h"
#include "ports.h"
#include "private_epoll.h"
#include "readiness.h"
#include "reasons.h"
#include "stats.h"
#include "trace.h"
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <time.h>

#define DECISION_MS 2000               /* a thread that connects beside the one that decides waits so long at most */

static _Thread_local const struct sock *deciding;

/* --- connect(AF_UNSPEC) --- */

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
    bool told, ended, quiet = names_is_over(sock, fd, &ended) && !pending_error(fd), ours = sock->port_is_ours;
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
    int unread = 0;
    if (real.ioctl(fd, FIONREAD, &unread) == 0 && !unread)   /* who sleeps in recv() is woken; else the peer is reset */
        real.shutdown(fd, SHUT_RDWR);
    bool held = connecting_begin_exchange();
    readiness_before_swap(sock);
    fdtable_each(0, ~0u, replace, &replacement);
    readiness_after_swap(sock, true);
    connecting_end_exchange(held);
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

/* --- connect --- */

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
    decide_tcp(fd, sock, ROW_CONNECT, -result);
    return 1;
}

/* Takes the socket into this thread's hands, or does not. A handler that interrupts it is to find out, whenever it runs. */
static bool begin(struct sock *sock, const struct sock **outer)
{
    *outer = deciding;
    deciding = sock;
    if (decide_begin(sock))
        return true;
    deciding = *outer;
    return false;
}

bool switch_connects(const struct sock *sock)
{
    return sock == deciding;
}

/* Decides for a socket in SOCK_DECIDING. As settle(), or COMPANION_IN_PROGRESS. `later`: a companion of which this call, being
 * non-blocking, is to say EINPROGRESS; another thread's may announce it at once. */
static int decide_connect(struct sock *sock, int fd, const struct endpoint *remote, bool *later)
{
    struct verdict verdict;
    struct endpoint local = {0};
    if (sock->bound)
        ports_local(fd, &local);
    sock->local = local;
    decide_request(sock, ROLE_CONNECT, &local, remote, &verdict);
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
    *later = sock->announce;
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
    struct sock *sock = decide_hold(fd);
    int saved = errno, result = 1;
again:
    if (sock && sock_is_slow(sock, SLOW_CONNECTING))
        connecting_goes_on(sock);
    if (sock && sock_phase(sock) == SOCK_LISTENING)
        companion_notice(sock, fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_FREE;
    if (phase == SOCK_LISTENING && length >= sizeof address->sa_family && length <= sizeof(struct sockaddr_storage) &&
        memory_reads(address, length) && address->sa_family == AF_UNSPEC) {
        sock_put(sock);
        return switch_shutdown(fd, SHUT_RD);   /* the same to the kernel */
    }
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
        const struct sock *outer;
        if (begin(sock, &outer)) {
            int cancel;
            pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
            bool later = false;
            result = decide_connect(sock, fd, &remote, &later);
            deciding = outer;
            pthread_setcancelstate(cancel, NULL);
            if (result == COMPANION_IN_PROGRESS && !(real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK))
                result = await(&sock, fd);
            else if (result == COMPANION_IN_PROGRESS || (result == 0 && later))
                result = fail(EINPROGRESS);
        } else if (sock_phase(sock) != SOCK_FRESH) {
            goto again;                /* another thread was quicker */
        } else if (lifecycle_borrowed()) {   /* the parent's socket, too */
            atomic_store(&sock->phase, SOCK_TCP);
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
    struct sock *sock = decide_hold(fd);
    const struct sock *outer;
    bool ours = sock && destination(sock, fd, address, length, &remote) && begin(sock, &outer);
    int saved = errno;
    *result = 1;
    if (ours) {
        bool later = false;
        *result = decide_connect(sock, fd, &remote, &later);
        deciding = outer;
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
