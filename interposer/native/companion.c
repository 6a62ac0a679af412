/* Owns the sequence of calls down to a provider, and the swap. No lock: a socket is in the hands of one thread while it
 * is SOCK_DECIDING. Runs after fork. */
#include "companion.h"
#include "common.h"
#include "connecting.h"
#include "firewall.h"
#include "forward.h"
#include "lifecycle.h"
#include "netinfo.h"
#include "options.h"
#include "ports.h"
#include "readiness.h"
#include "real.h"
#include "reasons.h"
#include "stats.h"
#include "switch.h"
#include "trace.h"
#include "uring.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

static int reason_of(int error)
{
    switch (-error) {
    case EAGAIN: return REASON_BACKLOG_FULL;
    case EPERM: return REASON_STRANGER;
    case EACCES: return REASON_PORT_PRIVILEGE;
    case ENOENT: return REASON_NO_COMPANION;
    case ESTALE: return REASON_REFUSED;
    case ENONET: return REASON_NO_ROUTE_INFO;
    case EADDRINUSE: return REASON_NAME_TAKEN;
    case EMFILE:
    case ENFILE: return REASON_NO_DESCRIPTOR;
    case ENOMEM:
    case ENOBUFS: return REASON_NO_MEMORY;
    default: return REASON_PROVIDER_FAILED;
    }
}

static bool is_final(int error)
{
    return error == -ECONNRESET || error == -ECONNREFUSED || error == -EHOSTUNREACH;
}

static bool same_netns(int one, int other)
{
    if (!lifecycle_moved)
        return true;
    uint64_t first = 0, second = 0;
    socklen_t length = sizeof first;
    if (real.getsockopt(one, SOL_SOCKET, SO_NETNS_COOKIE, &first, &length) < 0)
        return true;                   /* a kernel before 5.14 does not tell */
    length = sizeof second;
    return real.getsockopt(other, SOL_SOCKET, SO_NETNS_COOKIE, &second, &length) == 0 && first == second;
}

static void set_buffer(const struct san_provider *provider, wsp_descriptor descriptor, int forced, int plain, uint32_t size)
{
    int value = (int)size;
    if (size && provider->wsp_supports(SOL_SOCKET, plain) &&
        provider->wsp_setsockopt(descriptor, SOL_SOCKET, forced, &value, sizeof value) < 0)
        provider->wsp_setsockopt(descriptor, SOL_SOCKET, plain, &value, sizeof value);
}

/* S13: the recorded options that the provider supports; 0 or the first -errno. Where the program has not set its buffers,
 * the policy may have. */
static int replay_options(struct sock *sock, const struct san_provider *provider, wsp_descriptor descriptor)
{
    struct sock_option option;
    bool send_set = false, receive_set = false;
    int error = 0;
    for (int i = 0; !error && options_nth(sock, i, &option); i++) {
        send_set |= option.level == SOL_SOCKET && option.name == SO_SNDBUF;
        receive_set |= option.level == SOL_SOCKET && option.name == SO_RCVBUF;
        if (provider->wsp_supports(option.level, option.name))
            error = provider->wsp_setsockopt(descriptor, option.level, option.name, option.value, option.length);
    }
    if (!send_set)
        set_buffer(provider, descriptor, SO_SNDBUFFORCE, SO_SNDBUF, sock->send_buffer);
    if (!receive_set)
        set_buffer(provider, descriptor, SO_RCVBUFFORCE, SO_RCVBUF, sock->receive_buffer);
    return error;
}

void companion_option(struct sock *sock, int level, int name, const void *value, socklen_t length)
{
    for (int i = 0; i < sock->ncompanions; i++)
        if (sock->companions[i].provider->wsp_supports(level, name))
            sock->companions[i].provider->wsp_setsockopt(sock->companions[i].descriptor, level, name, value, length);
}

/* wsp_socket, wsp_bind, wsp_setsockopt...: 0, or -errno with everything undone. */
static int set_up(struct sock *sock, struct companion *companion, const struct endpoint *local)
{
    static _Atomic uint32_t attempts;
    sock->attempt = atomic_fetch_add(&attempts, 1) + 1;
    sock->options_late = false;
    uintptr_t context = (uintptr_t)sock->attempt << 32 | (sock->item.index + 1);
    int error = companion->provider->wsp_socket(sock->family, context, &companion->descriptor);
    if (error)
        return error;
    error = companion->provider->wsp_bind(companion->descriptor, local);
    if (!error)
        error = replay_options(sock, companion->provider, companion->descriptor);
    if (error)
        companion->provider->wsp_close_socket(companion->descriptor);
    return error;
}

_Atomic uint32_t companion_swaps;      /* counts the beginnings and the ends of exchanges */

struct swap {
    struct sock *sock;
    int fd, with, now;
    bool sure;                         /* `now` was made of fd a moment ago */
    int error;
};

static bool swap_alias(int fd, const struct swap *swap)
{
    int flags = real.fcntl(fd, F_GETFD, 0);
    return flags >= 0 && real.dup3(swap->with, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) >= 0;
}

/* Another thread may be closing an alias. */
static bool replace_alias(int fd, struct sock *sock, void *context)
{
    struct swap *swap = context;
    if (sock != swap->sock)
        return true;
    if ((fd != swap->fd || !swap->sure) && !fdtable_same_file(fd, swap->now))
        fdtable_drop_if(fd, sock);
    else if (!swap_alias(fd, swap) && fd == swap->fd)
        swap->error = -EBADF;
    return true;
}

/* Another thread, or a signal handler, may have made an alias meanwhile. */
static bool replace_late_alias(int fd, struct sock *sock, void *context)
{
    struct swap *swap = context;
    if (sock == swap->sock && fdtable_same_file(fd, swap->now))
        swap_alias(fd, swap);
    return true;
}

static int copy_signals(int from, int to)
{
    struct f_owner_ex owner;
    int number = real.fcntl(from, F_GETSIG, 0);
    if (real.fcntl(from, F_GETOWN_EX, (long)&owner) == 0)
        real.fcntl(to, F_SETOWN_EX, (long)&owner);
    real.fcntl(to, F_SETSIG, number);
    return number;
}

int companion_copy_flags(const struct sock *sock, int from, int to, bool fresh)
{
    int flags = real.fcntl(from, F_GETFL, 0);
    if (flags < 0)
        return 0;
    if (sock->signals)
        copy_signals(from, to);
    if (!fresh || (flags & (O_NONBLOCK | O_ASYNC)) != O_NONBLOCK)   /* what is fresh was born non-blocking */
        real.fcntl(to, F_SETFL, flags & (O_NONBLOCK | O_ASYNC));
    return flags;
}

int companion_put_under(struct sock *sock, int fd, int with, int now, bool keep)
{
    struct swap swap = {sock, fd, with, now, !sock->connecting, 0};   /* another thread may complete that connect */
    bool held = connecting_begin_exchange(), alone = atomic_load(&sock->aliases) == 1 && fdtable_peek(fd) == sock;
    int flags = companion_copy_flags(sock, fd, with, !keep);
    sock->announce = flags & O_NONBLOCK;
    readiness_before_swap(sock);
    atomic_fetch_add(&companion_swaps, 1);
    if (alone)
        replace_alias(fd, sock, &swap);
    else
        fdtable_each(0, ~0u, replace_alias, &swap);
    atomic_fetch_add(&companion_swaps, 1);
    if (atomic_load(&sock->aliases) != 1)
        fdtable_each(0, ~0u, replace_late_alias, &swap);
    readiness_after_swap(sock, keep);
    connecting_end_exchange(held);
    if (flags & O_ASYNC && sock->signals) {   /* again: the signal tells the number of the call that switched it on */
        real.fcntl(fd, F_SETFL, flags & O_NONBLOCK);
        real.fcntl(fd, F_SETFL, flags & (O_NONBLOCK | O_ASYNC));
    }
    return swap.error;
}

/* What the socket has been through may keep it on TCP: 0, or minus a reason number. */
static int fitness(const struct sock *sock)
{
    if (sock->unfit)
        return -sock->unfit;
    if (sock->options_lost)
        return -REASON_OPTIONS_LOST;
    if (sock->registrations_lost)
        return -REASON_EPOLL_LOST;
    /* Who shares it would not know, or not serve, the companion. Another program makes its own of a listener. */
    return !sock->foreign && sock->fork_count != lifecycle_forks() ? -REASON_SHARED : 0;
}

void companion_close(struct sock *sock)
{
    for (int i = 0; i < sock->ncompanions; i++)
        sock->companions[i].provider->wsp_close_socket(sock->companions[i].descriptor);
    sock->ncompanions = 0;
}

/* The first companion of a socket that has none yet, as far as wsp_setsockopt. 0, or minus a reason number. */
static int prepare(struct sock *sock, int fd, const struct san_provider *provider)
{
    struct companion companion = {.provider = provider};
    struct endpoint source, local;
    int error = provider->wsp_reach(&sock->remote, &source);
    if (!error && !netinfo_serves(provider, endpoint_is_wildcard(&sock->local) ? &source : &sock->local))
        error = -REASON_NOT_SERVED;
    if (!error)
        error = firewall_connect(endpoint_is_wildcard(&sock->local) ? &source : &sock->local, &sock->remote);
    if (!error)
        error = ports_bind(sock, fd, &source, &local);
    if (error)
        return error;
    error = set_up(sock, &companion, &local);
    if (error)
        return -reason_of(error);
    int native = provider->wsp_poll_fd(companion.descriptor);
    if (native < 0 || !same_netns(fd, native)) {
        provider->wsp_close_socket(companion.descriptor);
        return native < 0 ? -reason_of(native) : -REASON_NETNS;
    }
    sock->local = local;
    sock->companions[0] = companion;
    return 0;
}

/* A connected companion becomes a kernel descriptor, and perhaps its provider goes on moving the data. -errno. */
static int detach(const struct companion *companion, struct moving *moving)
{
    *moving = (struct moving){0};
    if (companion->provider->wsp_transfer(companion->descriptor, &moving->mover, &moving->state) < 0)
        moving->mover = NULL;
    int native = companion->provider->wsp_detach(companion->descriptor);
    if (native < 0) {
        companion_stop_moving(moving);
        companion->provider->wsp_close_socket(companion->descriptor);
        moving->mover = NULL;
    }
    return native;
}

void companion_stop_moving(const struct moving *moving)
{
    if (moving->mover)
        moving->mover->close(moving->state);
}

/* wsp_connect has ended. 0: the companion stands under the descriptors. Minus a reason number, or a final errno. */
static int conclude(struct sock *sock, int fd, int error)
{
    struct companion *companion = &sock->companions[0];
    atomic_store(&sock->completion, COMPLETION_RUNNING);
    if (!error) {
        if (sock->options_late)
            replay_options(sock, companion->provider, companion->descriptor);
        int native = detach(companion, &sock->moving);
        if (native < 0)
            return -REASON_PROVIDER_FAILED;
        if (sock->moving.mover)
            atomic_fetch_or(&sock->slow, SLOW_MOVER);
        if (sock->family == AF_INET6 && endpoint_is_v4(&sock->remote))
            common_mark(native, MARK_V6);
        int now = sock->connecting ? connecting_own(sock) : atomic_load(&sock->shadow);
        error = companion_put_under(sock, fd, native, now, false);
        real.close(native);
        return error ? -reason_of(error) : 0;
    }
    companion->provider->wsp_close_socket(companion->descriptor);
    trace_log("connect fd %d: provider %s: %s", fd, companion->provider->name, strerror(-error));
    if (is_final(error))
        return error == -ECONNRESET ? ECONNREFUSED : -error;
    return -reason_of(error);
}

static int connect_by(struct sock *sock, int fd, const struct verdict *verdict, int index)
{
    const struct san_provider *provider = provider_by_id(verdict->providers[index]);
    int error = provider ? prepare(sock, sock->connecting ? atomic_load(&sock->shadow) : fd, provider) : -REASON_NO_PROVIDER;
    if (error)
        return error;
    /* What can fail fails before the peer sees a connection. */
    if (atomic_load(&sock->shadow) < 0)
        atomic_store(&sock->shadow, hidden_park(sock, fd));
    if (atomic_load(&sock->shadow) < 0)
        return conclude(sock, fd, -EMFILE);
    uint64_t number = (uint64_t)sock->attempt << 32, open = number | COMPLETION_OPEN;
    atomic_store(&sock->completion, open);
    error = provider->wsp_connect(sock->companions[0].descriptor, &sock->remote);
    if (error != -EINPROGRESS)
        return conclude(sock, fd, error);
    if (atomic_load(&sock->completion) == open) {
        error = sock->connecting ? 0 : connecting_begin(sock, fd, verdict);
        if (error)
            return conclude(sock, fd, error);
        connecting_provider(sock, index);
        if (atomic_compare_exchange_strong(&sock->completion, &open, number | COMPLETION_ARMED))
            return COMPANION_IN_PROGRESS;
    }
    return conclude(sock, fd, -(int)((uint32_t)atomic_load(&sock->completion) - COMPLETION_EARLY));
}

/* The providers of the verdict from `index` on, where `result` is what those before it came to. */
static int go_on(struct sock *sock, int fd, const struct verdict *verdict, int index, int result)
{
    for (; result < 0 && index < PROVIDERS_MAX && verdict->providers[index]; index++)
        result = connect_by(sock, fd, verdict, index);
    return result;
}

/* A socket once bound cannot be unbound: a fresh one with the same options takes its place. */
void companion_unbind(struct sock *sock, int fd)
{
    if (!sock->port_is_ours)
        return;
    int parked = atomic_exchange(&sock->shadow, -1), bound = parked < 0 ? hidden_park(sock, fd) : parked;
    int fresh = bound < 0 ? -1 : options_shadow(sock);
    if (fresh < 0 || !same_netns(bound, fresh)) {
        hidden_close(atomic_exchange(&sock->shadow, bound));
        return;
    }
    if (!sock->connecting)
        companion_put_under(sock, fd, fresh, bound, true);
    hidden_close(bound);
    sock->bound = sock->port_is_ours = false;
}

int companion_connect(struct sock *sock, int fd, const struct endpoint *remote, const struct verdict *verdict)
{
    int unfit = fitness(sock);
    if (!unfit && sock->foreign)
        unfit = -REASON_HANDED_ON;
    if (unfit)
        return unfit;
    const struct sock_option *v6only = options_find(sock, IPPROTO_IPV6, IPV6_V6ONLY);
    if (sock->family == AF_INET6 && endpoint_is_v4(remote) && v6only && v6only->value[0])
        return -REASON_ADDRESS;        /* the kernel's error */
    sock->remote = *remote;
    companion_close(sock);            /* of a listener that was shut down before */
    int result = go_on(sock, fd, verdict, 0, -REASON_NO_PROVIDER);
    if (result == 0 || result == COMPANION_IN_PROGRESS)
        return result;
    companion_unbind(sock, fd);
    if (sock->connecting)
        connecting_give_back(sock, fd);
    else
        hidden_close(atomic_exchange(&sock->shadow, -1));
    return result;
}

int companion_resume(struct sock *sock, int fd, const struct verdict *verdict, int provider, int error)
{
    return go_on(sock, fd, verdict, provider + 1, conclude(sock, fd, error));
}

void companion_abandon(struct sock *sock)
{
    struct companion *companion = &sock->companions[0];
    atomic_store(&sock->completion, COMPLETION_NONE);
    companion->provider->wsp_close_socket(companion->descriptor);
}

void companion_notice(struct sock *sock, int fd)
{
    if (common_is_shut(sock))
        companion_give_up(sock, fd, REASON_HANDED_ON);
}

bool companion_is_alone(const struct sock *sock)
{
    return !common_is_handed_on(sock) && sock->fork_count == lifecycle_forks() && !lifecycle_borrowed();
}

void companion_ask(struct sock *sock, int fd)
{
    int listening = 0;
    socklen_t length = sizeof listening;
    if (real.getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) == 0 && !listening)
        common_tell_shut(sock);
}

static void announce(struct sock *sock, int fd)
{
    if (!atomic_load_explicit(&sock->quiet, memory_order_relaxed) || !atomic_exchange(&sock->quiet, false))
        return;
    if (uring_exists(true))
        companion_give_up(sock, fd, REASON_IO_URING);
    else
        for (int i = 0; i < sock->ncompanions; i++)
            sock->companions[i].provider->wsp_announce(sock->companions[i].descriptor);
}

void companion_serve(struct sock *sock, int fd)
{
    common_mark_waiting(sock);
    announce(sock, fd);
    companion_notice(sock, fd);
}

static void learn_v6only(struct sock *sock, int fd)
{
    int only = 0;
    socklen_t length = sizeof only;
    if (sock->family == AF_INET6)
        real.getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &length);
    sock->v6only = only;
}

/* No accept may block on one listener while a client waits at another, so all of them are non-blocking, and the program's
 * view is kept apart. The flag of a listener from elsewhere is left alone. */
static void keep_from_blocking(struct sock *sock, int fd)
{
    int flags = real.fcntl(fd, F_GETFL, 0);
    common_set_nonblocking(sock, flags & O_NONBLOCK);
    if (!(flags & O_NONBLOCK) && !sock->foreign)
        real.fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

static void share(const struct companion *companion)
{
    if (companion->provider->wsp_share)
        companion->provider->wsp_share(companion->descriptor);
}

void companion_send(struct sock *sock)
{
    sock->foreign = true;
    for (int i = 0; i < sock->ncompanions; i++)
        share(&sock->companions[i]);
}

int companion_listen(struct sock *sock, int fd, const struct verdict *verdict, int backlog, bool quiet, bool renew)
{
    int reason = REASON_NO_PROVIDER, unfit = fitness(sock);
    if (unfit)
        return unfit;
    if (!sock->local.port)
        return -REASON_ADDRESS;
    learn_v6only(sock, fd);
    companion_close(sock);            /* of a listener that was shut down before */
    common_take(sock);
    sock->quiet = quiet;
    sock->handed_on = false;
    sock->companion_forks = lifecycle_forks();
    for (int i = 0; i < PROVIDERS_MAX && verdict->providers[i]; i++) {
        struct companion companion = {.provider = provider_by_id(verdict->providers[i])};
        if (!companion.provider)
            continue;
        if (!netinfo_serves(companion.provider, &sock->local)) {
            reason = REASON_NOT_SERVED;
            continue;
        }
        int error = set_up(sock, &companion, &sock->local);
        if (error) {
            reason = reason_of(error);
            continue;
        }
        int native = companion.provider->wsp_poll_fd(companion.descriptor);
        error = native < 0 ? native : same_netns(fd, native) ? 0 : -EXDEV;
        if (sock->foreign)
            share(&companion);
        int walled = error ? 0 : firewall_listen(&sock->local, sock->v6only);
        if (!error && !walled)
            error = companion.provider->wsp_listen(companion.descriptor, backlog, sock->v6only, quiet);
        if (error || walled) {
            companion.provider->wsp_close_socket(companion.descriptor);
            reason = walled ? -walled : error == -EXDEV ? REASON_NETNS : reason_of(error);
            trace_log("listen fd %d: provider %s: %s", fd, companion.provider->name, strerror(-error));
            continue;
        }
        sock->companions[sock->ncompanions++] = companion;
    }
    if (!sock->ncompanions)
        return -reason;
    if (!renew)
        keep_from_blocking(sock, fd);
    if (sock->signals)
        companion_signals(sock, fd, real.fcntl(fd, F_GETFL, 0));
    int error = renew ? readiness_renew_listener(sock) : readiness_adopt_listener(sock, fd);
    if (error) {
        companion_leave(sock, fd);
        companion_close(sock);
        return error;
    }
    if (readiness_is_awaited(sock))
        announce(sock, fd);
    return 0;
}

bool companion_take(struct sock *sock, int fd, int *fds, int count)
{
    struct companion companion;
    for (int n = 0; sock->ncompanions < PROVIDERS_MAX && (companion.provider = provider_nth(n)); n++) {
        if (!companion.provider->wsp_take ||
            companion.provider->wsp_take(fds, count, sock->family, &sock->local, (uintptr_t)sock->item.index + 1,
                                         &companion.descriptor) < 0)
            continue;
        sock->companions[sock->ncompanions++] = companion;
    }
    if (!sock->ncompanions)
        return false;
    learn_v6only(sock, fd);
    common_adopt(sock);
    sock->quiet = true;                /* perhaps; this program may have an io_uring */
    return true;
}

bool companion_pass(const struct sock *sock, bool on)
{
    bool all = sock->ncompanions > 0;
    for (int i = 0; i < sock->ncompanions; i++) {
        const struct companion *companion = &sock->companions[i];
        all = all && companion->provider->wsp_pass && companion->provider->wsp_pass(companion->descriptor, on) == 0;
    }
    return all;
}

/* The program is told of a SAN client as of any other; but a signal that tells a number would tell a hidden one. */
void companion_signals(struct sock *sock, int fd, int flags)
{
    int number = 0;
    if (!sock->signals)
        return;
    for (int i = 0; i < sock->ncompanions; i++) {
        number = copy_signals(fd, companion_poll_fd(sock, i));
        real.fcntl(companion_poll_fd(sock, i), F_SETFL, O_NONBLOCK | (number ? 0 : flags & O_ASYNC));
    }
    if (flags & O_ASYNC && number)
        companion_retire(sock, REASON_OPTION);
}

/* As accept() tells that a connection could not be taken. */
static int not_taken(int error)
{
    bool short_of = error == -EMFILE || error == -ENFILE || error == -ENOMEM || error == -ENOBUFS;
    return short_of ? error : -ECONNABORTED;
}

int companion_accept(struct sock *sock, int index, bool nonblocking, bool cloexec, struct moving *moving,
                     struct endpoint *local, struct endpoint *peer)
{
    struct companion *listener = &sock->companions[index];
    wsp_descriptor descriptor;
    int error = listener->provider->wsp_accept(listener->descriptor, (uintptr_t)sock->item.index + 1, nonblocking, cloexec,
                                               &descriptor, local, peer);
    if (error)
        return error == -EAGAIN ? error : error == -EINVAL || error == -EBADF ? -EINVAL : not_taken(error);
    replay_options(sock, listener->provider, descriptor);
    struct companion accepted = {listener->provider, descriptor};
    int fd = detach(&accepted, moving);
    if (fd >= 0 && sock->family == AF_INET6 && endpoint_is_v4(&sock->local))   /* a wildcard's name tells it */
        common_mark(fd, MARK_V6);
    return fd < 0 ? not_taken(fd) : fd;
}

int companion_poll_fd(const struct sock *sock, int index)
{
    return sock->companions[index].provider->wsp_poll_fd(sock->companions[index].descriptor);
}

void companion_backlog(struct sock *sock, int backlog)
{
    for (int i = 0; i < sock->ncompanions; i++)
        real.listen(companion_poll_fd(sock, i), backlog);
}

void companion_silence(struct sock *sock)
{
    for (int i = 0; i < sock->ncompanions; i++)
        sock->companions[i].provider->wsp_silence(sock->companions[i].descriptor);
}

void companion_leave(struct sock *sock, int fd)
{
    bool cleared = common_is_shut(sock) && sock_phase(sock) != SOCK_DECIDING;   /* by who has shut it */
    readiness_abandon_listener(sock);
    if (!cleared && !common_is_nonblocking(sock) && !sock->foreign) {
        int flags = real.fcntl(fd, F_GETFL, 0);
        if (flags >= 0)
            real.fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    }
}

/* Who waits already is told at once, instead of never. */
void companion_turn_away(struct sock *sock)
{
    struct moving moving;
    struct endpoint local, peer;
    bool alone = companion_is_alone(sock) && sock_phase(sock) != SOCK_LISTENING;
    for (int i = 0; i < sock->ncompanions; i++) {
        const struct companion *companion = &sock->companions[i];
        if (alone && companion->provider->wsp_reset && companion->provider->wsp_reset(companion->descriptor))
            continue;
        int fd;
        while ((fd = companion_accept(sock, i, true, true, &moving, &local, &peer)) >= 0 || fd == -ECONNABORTED)
            if (fd >= 0) {
                companion_stop_moving(&moving);
                real.close(fd);
            }
    }
}

void companion_retire(struct sock *sock, int reason)
{
    if (sock_phase(sock) != SOCK_LISTENING)
        return;
    sock->reason = (uint8_t)reason;
    companion_silence(sock);
}

void companion_give_up(struct sock *sock, int fd, int reason)
{
    uint8_t listening = SOCK_LISTENING;
    if (!atomic_compare_exchange_strong(&sock->phase, &listening, SOCK_TCP))
        return;
    companion_silence(sock);
    companion_leave(sock, fd);
    companion_turn_away(sock);
    if (!sock->reason)
        sock->reason = (uint8_t)reason;
    switch_publish(fd, sock);
    stats_reason(sock->reason);
}

bool companion_yield(struct sock *sock, int fd)
{
    for (int i = 0; i < sock->ncompanions; i++) {
        struct pollfd look = {companion_poll_fd(sock, i), POLLIN, 0};
        if (real.poll(&look, 1, 0) != 0)
            return false;              /* somebody waits there, and will be accepted */
    }
    companion_give_up(sock, fd, REASON_NO_DESCRIPTOR);
    /* From here on nobody comes to them; who came before holds the socket. */
    if (sock_phase(sock) == SOCK_LISTENING || atomic_load(&sock->refs) != atomic_load(&sock->aliases))
        return false;
    companion_close(sock);
    return true;
}

void companion_dispose(struct sock *sock)
{
    int saved = errno;                 /* the close() that led here has succeeded */
    forward_waiting(sock);
    companion_close(sock);
    if (sock->common)
        common_give(sock);
    connecting_dispose(sock);
    companion_stop_moving(&sock->moving);
    readiness_dispose(sock);
    hidden_close(atomic_exchange(&sock->shadow, -1));
    errno = saved;
}
