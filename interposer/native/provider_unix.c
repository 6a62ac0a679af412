/* The AF_UNIX provider. Its native addresses are abstract names, so that the kernel holds all of a connection's state
 * and removes it at the last close:
 *
 *   san1/L/127.0.0.1:6379/0              a listener (slot 0..63), and its beacon, a datagram socket of the same name
 *   san1/D/<32 zeros>:6379/0             the same for an IPv6 wildcard that takes IPv4 clients too
 *   san1/C/127.0.0.1:50000/127.0.0.1:6379   a connecting end: from, to
 *   san1/F/<16 digits>                   what carries a waiting connection to another listener (forward.h)
 *
 * IPv6 addresses are 32 hexadecimal digits, with %scope when link-local. The beacon tells a client in one cheap call
 * that somebody listens, and leaves no trace. Owns the pool of companions and the cache of live slots, whose lock is
 * tried and never waited for. Runs after fork. */
#include "clock.h"
#include "fdtable.h"
#include "forward.h"
#include "lifecycle.h"
#include "netinfo.h"
#include "provider_unix.h"
#include "real.h"
#include "reasons.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

#define RCVTIMEO_NEW 66                /* as 64-bit ABIs call SO_RCVTIMEO and SO_SNDTIMEO otherwise */
#define SNDTIMEO_NEW 67
#define SLOTS 64
#define BULK_BUFFER (1 << 20)          /* with the default, streams of large writes are slower than TCP */
#define PRIVILEGED_PORTS 1024
#define SLOTS_LIFETIME_MS 1000
#define FORWARD_TRIES 64

struct unix_companion {
    struct pool_item item;
    int fd, beacon;
    int family;
    bool dual;                         /* a listener on the IPv6 wildcard that takes IPv4 clients too */
    bool shared;                       /* carriers may come (forward.h) */
    wpu_handle handle;
    struct endpoint local;
};

/* The slots of one listening address that answered a moment ago. */
struct live {
    struct endpoint key;
    int64_t until;
    uint64_t slots;
    bool dual;
};

POOL(companions, struct unix_companion);
static struct live cache[64];
static _Atomic int cache_lock;
static _Atomic int probe_fd = -1;
static _Atomic bool no_force;          /* SO_SNDBUFFORCE is not allowed here */

/* --- names --- */

static char *put_endpoint(char *at, const struct endpoint *ep)
{
    if (endpoint_is_v4(ep))
        return at + endpoint_text(ep, at, 64);
    for (int i = 0; i < 16; i++) {
        *at++ = "0123456789abcdef"[ep->ip[i] >> 4];
        *at++ = "0123456789abcdef"[ep->ip[i] & 15];
    }
    struct endpoint rest = {.port = ep->port};
    endpoint_set_wildcard(&rest, true);
    if (ep->scope) {
        *at++ = '%';
        char digits[10];
        int count = 0;
        for (uint32_t scope = ep->scope; scope; scope /= 10)
            digits[count++] = (char)('0' + scope % 10);
        while (count)
            *at++ = digits[--count];
    }
    char text[64];
    size_t length = endpoint_text(&rest, text, sizeof text);
    const char *port = memchr(text, ':', length);
    size_t tail = (size_t)(text + length - port);
    memcpy(at, port, tail);
    return at + tail;
}

static socklen_t listener_name(struct sockaddr_un *name, const struct endpoint *ep, bool dual, unsigned slot)
{
    char *at = name->sun_path;
    name->sun_family = AF_UNIX;
    memcpy(at, dual ? "\0san1/D/" : "\0san1/L/", 8);
    at = put_endpoint(at + 8, ep);
    *at++ = '/';
    if (slot >= 10)
        *at++ = (char)('0' + slot / 10);
    *at++ = (char)('0' + slot % 10);
    return (socklen_t)(at - (char *)name);
}

static socklen_t connection_name(struct sockaddr_un *name, const struct endpoint *from, const struct endpoint *to)
{
    char *at = name->sun_path;
    name->sun_family = AF_UNIX;
    memcpy(at, "\0san1/C/", 8);
    at = put_endpoint(at + 8, from);
    *at++ = '/';
    at = put_endpoint(at, to);
    return (socklen_t)(at - (char *)name);
}

static bool take_number(const char **at, const char *end, uint32_t most, uint32_t *out)
{
    uint64_t value = 0;
    const char *start = *at, *here = start;
    if (end - here > 10)
        end = here + 10;
    for (unsigned digit; here < end && (digit = (unsigned)*here - '0') < 10; here++)
        value = value * 10 + digit;
    *at = here;
    *out = (uint32_t)value;
    return here > start && value <= most && (*start != '0' || here == start + 1);
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool take_endpoint(const char **at, const char *end, struct endpoint *ep)
{
    uint32_t number;
    *ep = (struct endpoint){0};
    if (end - *at > 32 && !memchr(*at, '.', 5)) {
        for (int i = 0; i < 16; i++) {
            int high = hex_digit((*at)[0]), low = hex_digit((*at)[1]);
            if (high < 0 || low < 0)
                return false;
            ep->ip[i] = (uint8_t)(high << 4 | low);
            *at += 2;
        }
        if (endpoint_is_v4(ep))
            return false;              /* one spelling only */
        if (**at == '%') {
            (*at)++;
            if (!take_number(at, end, UINT32_MAX, &ep->scope) || !ep->scope)
                return false;
        }
    } else {
        endpoint_set_wildcard(ep, true);
        for (int i = 12; i < 16; i++) {
            if (!take_number(at, end, 255, &number))
                return false;
            ep->ip[i] = (uint8_t)number;
            if (i < 15 && (*at == end || *(*at)++ != '.'))
                return false;
        }
    }
    if (*at == end || *(*at)++ != ':' || !take_number(at, end, 65535, &number))
        return false;
    ep->port = (uint16_t)number;
    return true;
}

/* The kind of one of our names ('L', 'D' or 'C'), its first address, and for 'C' the second; 0 for any other name. */
static char parse_name(const struct sockaddr_un *name, socklen_t length, struct endpoint *first, struct endpoint *second)
{
    const char *at = name->sun_path, *end = (const char *)name + length;
    uint32_t slot;
    if (length > sizeof *name || end - at < 12 || name->sun_family != AF_UNIX || memcmp(at, "\0san1/", 6) != 0 || at[7] != '/')
        return 0;
    char kind = at[6];
    at += 8;
    if ((kind != 'L' && kind != 'D' && kind != 'C') || !take_endpoint(&at, end, first) || at == end || *at++ != '/')
        return 0;
    if (kind == 'C' ? !take_endpoint(&at, end, second) : !take_number(&at, end, SLOTS - 1, &slot))
        return 0;
    return at == end ? kind : 0;
}

static int native_name(int fd, bool peer, char *kind, struct endpoint *first, struct endpoint *second)
{
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    if ((peer ? real.getpeername : real.getsockname)(fd, (struct sockaddr *)&name, &length) < 0)
        return -errno;
    *kind = parse_name(&name, length, first, second);
    return *kind ? 0 : -ENOTSOCK;
}

/* --- finding a listener --- */

static bool beacon_answers(int fd, const struct endpoint *ep, bool dual, unsigned slot)
{
    struct sockaddr_un name;
    socklen_t length = listener_name(&name, ep, dual, slot);
    return real.connect(fd, (struct sockaddr *)&name, length) == 0;
}

static int probe_socket(void)
{
    int fd = atomic_load(&probe_fd);
    if (fd >= 0 && hidden_is(fd))
        return fd;
    int fresh = hidden_fd(real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (fresh >= 0 && !atomic_compare_exchange_strong(&probe_fd, &fd, fresh)) {
        hidden_close(fresh);
        fresh = fd;
    }
    return fresh;
}

static struct live *live_place(const struct endpoint *ep)
{
    return &cache[endpoint_hash(ep) % (sizeof cache / sizeof *cache)];
}

/* Which slots of a listening address answer. What was found is remembered for a second; that nothing was found is
 * remembered too, but the first slot is tried each time, so that a server that has just started is found at once. A
 * program that has changed its name space remembers nothing, and looks with a socket of where the thread is now. */
static uint64_t live_slots(const struct netinfo_listener *listener)
{
    bool moved = lifecycle_moved;
    int fd = moved ? real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : probe_socket();
    if (fd < 0)
        return 0;
    bool locked = !moved && !atomic_exchange_explicit(&cache_lock, 1, memory_order_acquire), known = false;
    struct live *place = live_place(&listener->address);
    uint64_t slots = 0;
    if (locked && place->until > clock_coarse_ms() && endpoint_equal(&place->key, &listener->address) &&
        place->dual == listener->dual) {
        slots = place->slots;
        known = true;
    }
    if (!slots)
        for (unsigned slot = 0; slot < (known ? 1 : SLOTS); slot++)
            if (beacon_answers(fd, &listener->address, listener->dual, slot))
                slots |= 1ull << slot;
    if (locked) {
        int64_t until = known ? place->until : clock_coarse_ms() + SLOTS_LIFETIME_MS;
        *place = (struct live){listener->address, until, slots, listener->dual};
        atomic_store_explicit(&cache_lock, 0, memory_order_release);
    }
    if (moved)
        real.close(fd);
    return slots;
}

static void forget_slots(const struct endpoint *address)
{
    if (atomic_exchange_explicit(&cache_lock, 1, memory_order_acquire))
        return;
    struct live *place = live_place(address);
    if (endpoint_equal(&place->key, address))
        place->until = 0;
    atomic_store_explicit(&cache_lock, 0, memory_order_release);
}

/* Its addresses are the machine's. */
static bool unix_serves(const struct subnet *subnet)
{
    (void)subnet;
    return true;
}

/* The kernel is asked first which listener TCP would reach: a companion at a wider address is not it. */
static int unix_reach(const struct endpoint *remote, struct endpoint *source)
{
    struct netinfo_listener listener;
    int error = netinfo_local(remote, source);
    if (!error)
        error = netinfo_listener(remote, &listener);
    if (!error && !live_slots(&listener))
        error = -REASON_NO_COMPANION;
    if (!error && !netinfo_loopback_up())
        error = -REASON_NOT_SERVED;    /* TCP would not get through */
    return error;
}

/* --- companions --- */

static struct unix_companion *from_descriptor(wsp_descriptor descriptor)
{
    return (struct unix_companion *)descriptor;
}

static int open_stream(void)
{
    int fd = real.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return fd < 0 ? -errno : fd;
}

static void widen(int fd)
{
    int size = BULK_BUFFER;
    if (!no_force && real.setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) == 0)
        return;
    no_force = true;
    real.setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

static int take_companion(int fd, uintptr_t context, struct unix_companion **out)
{
    struct unix_companion *companion = pool_take(&companions);
    if (!companion)
        return -ENOMEM;
    companion->fd = fd;
    companion->beacon = -1;
    companion->shared = false;
    companion->handle = wpu_create_socket_handle(&provider_unix, (wsp_descriptor)companion, context);
    if (!companion->handle) {
        pool_give(&companions, companion);
        return -ENOMEM;
    }
    *out = companion;
    return 0;
}

static void give_companion(struct unix_companion *companion)
{
    wpu_close_socket_handle(companion->handle);
    companion->fd = companion->beacon = -1;
    pool_give(&companions, companion);
}

static int unix_socket(int family, uintptr_t context, wsp_descriptor *out)
{
    struct unix_companion *companion;
    int fd = open_stream();
    if (fd < 0)
        return fd;
    int error = take_companion(fd, context, &companion);
    if (error) {
        real.close(fd);
        return error;
    }
    widen(fd);
    companion->family = family;
    *out = (wsp_descriptor)companion;
    return 0;
}

/* The name of a listener needs a slot, and that of a connecting end the other address: the kernel is told at wsp_listen
 * and wsp_connect. */
static int unix_bind(wsp_descriptor descriptor, const struct endpoint *local)
{
    from_descriptor(descriptor)->local = *local;
    return 0;
}

static const int supported[] = {SO_RCVTIMEO, SO_SNDTIMEO, SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_RCVLOWAT,
                                SO_LINGER, SO_KEEPALIVE, SO_OOBINLINE, SO_PEEK_OFF, RCVTIMEO_NEW, SNDTIMEO_NEW};

static bool unix_supports(int level, int name)
{
    for (size_t i = 0; level == SOL_SOCKET && i < sizeof supported / sizeof *supported; i++)
        if (supported[i] == name)
            return true;
    return false;
}

static int unix_setsockopt(wsp_descriptor descriptor, int level, int name, const void *value, socklen_t length)
{
    return real.setsockopt(from_descriptor(descriptor)->fd, level, name, value, length) < 0 ? -errno : 0;
}

static void copy_options(int from, int to)
{
    for (size_t i = 0; i < sizeof supported / sizeof *supported; i++) {
        char value[32];
        socklen_t length = sizeof value;
        if (supported[i] != SO_SNDBUF && supported[i] != SO_RCVBUF && supported[i] != SO_SNDBUFFORCE &&
            supported[i] != SO_RCVBUFFORCE &&
            real.getsockopt(from, SOL_SOCKET, supported[i], value, &length) == 0)
            real.setsockopt(to, SOL_SOCKET, supported[i], value, length);
    }
}

/* A beacon that is connected takes no other peer, even when its peer is gone. */
static bool make_quiet(int beacon)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    socklen_t length = sizeof name;
    int peer = real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool done = peer >= 0 && real.bind(peer, (struct sockaddr *)&name, sizeof name.sun_family) == 0 &&
                real.getsockname(peer, (struct sockaddr *)&name, &length) == 0 &&
                real.connect(beacon, (struct sockaddr *)&name, length) == 0;
    if (peer >= 0)
        real.close(peer);
    return done;
}

static int make_beacon(bool quiet)
{
    int beacon = hidden_fd(real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (beacon < 0 || !quiet || make_quiet(beacon))
        return beacon;
    hidden_close(beacon);
    return -1;
}

static void unix_announce(wsp_descriptor descriptor)
{
    struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    real.connect(from_descriptor(descriptor)->beacon, &nobody, sizeof nobody);
}

/* Whoever connects can send descriptors, which would be closed unseen, but at our cost. What is accepted inherits this, where
 * the kernel has it (6.16). */
static void refuse_descriptors(int fd, int refused)
{
    int passed = !refused;
    real.setsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &passed, sizeof passed);
}

static void unix_share(wsp_descriptor descriptor)
{
    struct unix_companion *listener = from_descriptor(descriptor);
    listener->shared = true;
    refuse_descriptors(listener->fd, false);
}

static int unix_listen(wsp_descriptor descriptor, int backlog, bool v6only, bool quiet)
{
    struct unix_companion *companion = from_descriptor(descriptor);
    struct endpoint ignored, loopback = {.ip = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
    if (netinfo_local(&loopback, &ignored) == -REASON_NO_ROUTE_INFO)
        return -ENONET;                /* clients' claims could not be checked later */
    bool dual = companion->family == AF_INET6 && !v6only && endpoint_is_wildcard(&companion->local) &&
                !endpoint_is_v4(&companion->local);
    companion->dual = dual;
    for (unsigned slot = 0; slot < SLOTS; slot++) {
        struct sockaddr_un name;
        socklen_t length = listener_name(&name, &companion->local, dual, slot);
        if (real.bind(companion->fd, (struct sockaddr *)&name, length) < 0) {
            if (errno == EADDRINUSE)
                continue;
            return -errno;
        }
        refuse_descriptors(companion->fd, !companion->shared);
        if (real.listen(companion->fd, backlog) < 0)
            return -errno;
        /* The beacon comes last: who sees it finds a listener. */
        int beacon = make_beacon(quiet);
        if (beacon < 0)
            return -EMFILE;
        int fd = hidden_fd(companion->fd);
        companion->fd = fd;
        if (fd < 0) {
            hidden_close(beacon);
            return -EMFILE;
        }
        if (real.bind(beacon, (struct sockaddr *)&name, length) == 0) {
            companion->beacon = beacon;
            return 0;
        }
        int error = errno;             /* somebody squats on the beacon's name: leave this slot to him */
        hidden_close(beacon);
        hidden_close(companion->fd);
        companion->fd = -1;
        if (error != EADDRINUSE)
            return -error;
        companion->fd = open_stream();
        if (companion->fd < 0)
            return companion->fd;
        widen(companion->fd);
    }
    return -EADDRINUSE;
}

/* X1: whose listener it is, as of its listen(). */
static bool trusted(int fd, uid_t owner)
{
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    if (real.getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0)
        return false;
    return credentials.uid == 0 || credentials.uid == geteuid() || credentials.uid == owner;
}

static int replace_stream(struct unix_companion *companion)
{
    int fresh = open_stream();
    if (fresh < 0)
        return fresh;
    widen(fresh);
    copy_options(companion->fd, fresh);
    real.close(companion->fd);
    companion->fd = fresh;
    return 0;
}

static unsigned nth_slot(uint64_t slots, unsigned n)
{
    while (n--)
        slots &= slots - 1;
    return (unsigned)__builtin_ctzll(slots);
}

static int unix_connect(wsp_descriptor descriptor, const struct endpoint *remote)
{
    struct unix_companion *companion = from_descriptor(descriptor);
    struct netinfo_listener listener;
    if (companion->local.port < PRIVILEGED_PORTS && geteuid() != 0)
        return -EACCES;                /* the server would not believe it */
    uint64_t slots = netinfo_listener(remote, &listener) ? 0 : live_slots(&listener);
    if (!slots)
        return -ENOENT;
    struct sockaddr_un name;
    socklen_t length = connection_name(&name, &companion->local, remote);
    if (real.bind(companion->fd, (struct sockaddr *)&name, length) < 0)
        return -errno;

    /* As the kernel does for SO_REUSEPORT, by a hash of the connection: the local port is another each time. */
    unsigned live = (unsigned)__builtin_popcountll(slots), first = (companion->local.port * 2654435761u >> 16) % live;
    int result = -ENOENT;
    for (unsigned turn = 0; turn < live; turn++) {
        unsigned slot = nth_slot(slots, (first + turn) % live);
        struct sockaddr_un target;
        socklen_t size = listener_name(&target, &listener.address, listener.dual, slot);
        if (real.connect(companion->fd, (struct sockaddr *)&target, size) == 0) {
            if (trusted(companion->fd, listener.owner))
                return 0;
            result = -EPERM;
            if (replace_stream(companion) < 0 || real.bind(companion->fd, (struct sockaddr *)&name, length) < 0)
                return -ENOENT;
        } else {
            /* These would be final to the switch; here they mean at most that the listener is closing. */
            bool final = errno == ECONNREFUSED || errno == ECONNRESET || errno == EHOSTUNREACH;
            result = result == -EPERM ? -EPERM : final ? -ESTALE : -errno;
        }
    }
    forget_slots(&listener.address);
    return result;
}

static bool is_loopback(const struct endpoint *ep)
{
    static const uint8_t v6[16] = {[15] = 1};
    return endpoint_is_loopback4(ep) || memcmp(ep->ip, v6, sizeof v6) == 0;
}

/* X2: a peer can claim only what it could have used over TCP, and only a destination that is the listener's. The kernel is
 * asked last: it takes a descriptor, and a connection must not be lost for want of one. */
static bool believable(int fd, const struct unix_companion *listener, const struct endpoint *peer, const struct endpoint *to)
{
    const struct endpoint *own = &listener->local;
    bool v4 = endpoint_is_v4(to);
    if (to->port != own->port || peer->port == 0 || endpoint_is_v4(peer) != v4 || endpoint_is_wildcard(peer) ||
        endpoint_is_wildcard(to))
        return false;
    if (endpoint_is_wildcard(own) ? v4 != endpoint_is_v4(own) && !listener->dual : !endpoint_same_ip(to, own))
        return false;
    bool loopback = is_loopback(peer) && is_loopback(to);
    if (loopback && peer->port >= PRIVILEGED_PORTS)
        return true;
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    bool known = real.getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0;
    if (known && credentials.uid == 0)
        return true;
    if (peer->port < PRIVILEGED_PORTS)
        return false;
    return loopback || (netinfo_local_now(peer) == 0 && netinfo_local_now(to) == 0);
}

/* Whose connection came in a carrier, which it replaces; -1: none. */
static int open_carrier(const struct unix_companion *listener, int fd, bool nonblocking, bool cloexec, struct endpoint *local,
                        struct endpoint *peer)
{
    struct endpoint own, ignored;
    char mine, other;
    if (!trusted(fd, geteuid())) {
        real.close(fd);
        return -1;
    }
    if (!forward_receive(fd, nonblocking, cloexec))
        return -1;
    if (native_name(fd, false, &mine, &own, &ignored) == 0 && mine == (listener->dual ? 'D' : 'L') &&
        endpoint_equal(&own, &listener->local) && native_name(fd, true, &other, peer, local) == 0 && other == 'C')
        return fd;
    real.close(fd);
    return -1;
}

static int unix_accept(wsp_descriptor descriptor, uintptr_t context, bool nonblocking, bool cloexec, wsp_descriptor *out,
                       struct endpoint *local, struct endpoint *peer)
{
    struct unix_companion *listener = from_descriptor(descriptor), *companion;
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    int fd = real.accept4(listener->fd, (struct sockaddr *)&name, &length,
                          (nonblocking ? SOCK_NONBLOCK : 0) | (cloexec ? SOCK_CLOEXEC : 0));
    if (fd < 0) {
        struct pollfd look = {listener->fd, 0, 0};
        if (errno == EBADF)            /* another thread closed the companion: TCP's listener is as it was */
            return -EAGAIN;
        if (errno == EAGAIN && real.poll(&look, 1, 0) == 1 && look.revents & POLLHUP)
            return -EINVAL;
        return -errno;
    }
    bool named = parse_name(&name, length, peer, local) == 'C';
    if (!named && forward_is_carrier(&name, length)) {
        fd = open_carrier(listener, fd, nonblocking, cloexec, local, peer);
        if (fd < 0)
            return -ECONNABORTED;
        named = true;
    }
    if (!named || !believable(fd, listener, peer, local)) {
        real.close(fd);
        return -ECONNABORTED;
    }
    int error = take_companion(fd, context, &companion);
    if (error) {
        real.close(fd);
        return error;
    }
    widen(fd);
    if (listener->shared)
        refuse_descriptors(fd, true);
    companion->local = *local;
    *out = (wsp_descriptor)companion;
    return 0;
}

/* The beacon is connected to itself. */
static void unix_silence(wsp_descriptor descriptor)
{
    struct unix_companion *listener = from_descriptor(descriptor);
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    if (real.getsockname(listener->beacon, (struct sockaddr *)&name, &length) == 0)
        real.connect(listener->beacon, (struct sockaddr *)&name, length);
    real.shutdown(listener->fd, SHUT_RDWR);
}

/* The kernel resets who waits when it closes the listener. Another thread may be using its number. */
static bool unix_reset(wsp_descriptor descriptor)
{
    const struct unix_companion *listener = from_descriptor(descriptor);
    int deaf = open_stream();
    bool done = deaf >= 0 && hidden_is(listener->fd) && real.dup3(deaf, listener->fd, O_CLOEXEC) >= 0;
    if (deaf >= 0)
        real.close(deaf);
    return done;
}

/* 0 or -errno. */
static int forward_to(int connection, const struct sockaddr_un *name, socklen_t length)
{
    int carrier = forward_carrier(), result;
    if (carrier < 0)
        return -EMFILE;
    if (real.connect(carrier, (const struct sockaddr *)name, length) < 0)
        result = -errno;
    else
        result = trusted(carrier, geteuid()) ? forward_send(carrier, connection) : -EPERM;
    real.close(carrier);
    return result;
}

/* To one of those slots, from the one of *turn on. */
static void forward(int connection, const struct unix_companion *listener, uint64_t slots, unsigned *turn)
{
    unsigned live = (unsigned)__builtin_popcountll(slots);
    int result = -ENOENT;
    for (unsigned i = 0; i < live && result; i++) {
        struct sockaddr_un name;
        socklen_t length = listener_name(&name, &listener->local, listener->dual, nth_slot(slots, (*turn)++ % live));
        int tries = FORWARD_TRIES;
        do
            result = forward_to(connection, &name, length);
        while (result == -EPIPE && --tries);
    }
}

static void unix_pass_on(wsp_descriptor descriptor)
{
    const struct unix_companion *listener = from_descriptor(descriptor);
    struct netinfo_listener place = {.address = listener->local, .dual = listener->dual};
    struct endpoint local, peer;
    uint64_t slots = 0;
    unsigned turn = 0;
    bool looked = false;
    if (!hidden_is(listener->fd) || !hidden_is(listener->beacon))
        return;
    unix_silence(descriptor);          /* nobody comes from here on, and the search does not find this one */
    for (;;) {
        struct sockaddr_un name;
        socklen_t length = sizeof name;
        int fd = real.accept4(listener->fd, (struct sockaddr *)&name, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        if (forward_is_carrier(&name, length))
            fd = open_carrier(listener, fd, true, true, &local, &peer);
        if (!looked) {
            forget_slots(&listener->local);
            slots = live_slots(&place);
            looked = true;
        }
        if (fd >= 0) {
            forward(fd, listener, slots, &turn);
            real.close(fd);
        }
    }
}

static int unix_pass(wsp_descriptor descriptor, bool on)
{
    const struct unix_companion *listener = from_descriptor(descriptor);
    int flags = on ? 0 : FD_CLOEXEC;
    if (!hidden_is(listener->fd) || !hidden_is(listener->beacon) || real.fcntl(listener->beacon, F_SETFD, flags) < 0)
        return -EBADF;
    if (real.fcntl(listener->fd, F_SETFD, flags) < 0) {
        real.fcntl(listener->beacon, F_SETFD, FD_CLOEXEC);
        return -EBADF;
    }
    return 0;
}

static int socket_type(int fd)
{
    int type = 0;
    socklen_t length = sizeof type;
    return real.getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) < 0 ? -1 : type;
}

static bool listens(int fd)
{
    int on = 0;
    socklen_t length = sizeof on;
    return real.getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &length) == 0 && on;
}

static bool unix_passed(int fd)
{
    struct endpoint local, ignored;
    char kind;
    return native_name(fd, false, &kind, &local, &ignored) == 0 && kind != 'C' &&
           (socket_type(fd) == SOCK_DGRAM || listens(fd));
}

static int unix_take(int *fds, int count, int family, const struct endpoint *local, uintptr_t context, wsp_descriptor *out)
{
    for (int i = 0; i < count; i++) {
        struct sockaddr_un name, other;
        socklen_t length = sizeof name;
        struct endpoint own, ignored;
        if (fds[i] < 0 || socket_type(fds[i]) != SOCK_STREAM ||
            real.getsockname(fds[i], (struct sockaddr *)&name, &length) < 0)
            continue;
        char kind = parse_name(&name, length, &own, &ignored);
        if (!kind || !endpoint_equal(&own, local))
            continue;
        int beacon = -1;
        for (int j = 0; j < count && beacon < 0; j++) {
            socklen_t size = sizeof other;
            if (fds[j] >= 0 && j != i && socket_type(fds[j]) == SOCK_DGRAM &&
                real.getsockname(fds[j], (struct sockaddr *)&other, &size) == 0 && size == length &&
                memcmp(&name, &other, length) == 0)
                beacon = j;
        }
        struct unix_companion *companion;
        if (beacon < 0)
            continue;
        int error = take_companion(fds[i], context, &companion);
        if (error)
            return error;
        hidden_adopt(fds[i]);
        hidden_adopt(fds[beacon]);
        companion->beacon = fds[beacon];
        companion->family = family;
        companion->dual = kind == 'D';
        companion->local = *local;
        *out = (wsp_descriptor)companion;
        fds[i] = fds[beacon] = -1;
        return 0;
    }
    return -ENOENT;
}

static int unix_close_socket(wsp_descriptor descriptor)
{
    struct unix_companion *companion = from_descriptor(descriptor);
    hidden_close(companion->beacon);   /* first: nobody new comes */
    if (hidden_is(companion->fd))
        hidden_close(companion->fd);
    else if (companion->fd >= 0)
        real.close(companion->fd);
    give_companion(companion);
    return 0;
}

static int unix_poll_fd(wsp_descriptor descriptor)
{
    return from_descriptor(descriptor)->fd;
}

static int unix_detach(wsp_descriptor descriptor)
{
    struct unix_companion *companion = from_descriptor(descriptor);
    int fd = companion->fd;
    give_companion(companion);
    return fd;
}

static int unix_transfer(wsp_descriptor descriptor, const struct wsp_mover **mover, uintptr_t *state)
{
    (void)descriptor, (void)mover, (void)state;
    return -EOPNOTSUPP;
}

static int unix_recognise(int fd, struct endpoint *local, struct endpoint *peer, bool *v6)
{
    struct endpoint first, second;
    char mine, other;
    int error = native_name(fd, false, &mine, local, peer);
    if (error)
        return error;
    error = native_name(fd, true, &other, &first, &second);
    if (error)
        return error;
    if (mine != 'C') {                 /* an accepted end bears its listener's name; the client's tells the rest */
        if (other != 'C')
            return -ENOTSOCK;
        *local = second;
        *peer = first;
    }
    *v6 = !endpoint_is_v4(local) || mine == 'D';
    return mine != 'C';
}

bool provider_unix_yield(void)
{
    return hidden_give(&probe_fd);
}

void provider_unix_after_fork_child(void)
{
    cache_lock = 0;
}

const struct san_provider provider_unix = {
    .name = "unix",
    .id = PROVIDER_UNIX,
    .wsp_serves = unix_serves,
    .wsp_reach = unix_reach,
    .wsp_socket = unix_socket,
    .wsp_bind = unix_bind,
    .wsp_supports = unix_supports,
    .wsp_setsockopt = unix_setsockopt,
    .wsp_listen = unix_listen,
    .wsp_announce = unix_announce,
    .wsp_connect = unix_connect,
    .wsp_accept = unix_accept,
    .wsp_silence = unix_silence,
    .wsp_reset = unix_reset,
    .wsp_share = unix_share,
    .wsp_pass_on = unix_pass_on,
    .wsp_pass = unix_pass,
    .wsp_passed = unix_passed,
    .wsp_take = unix_take,
    .wsp_close_socket = unix_close_socket,
    .wsp_poll_fd = unix_poll_fd,
    .wsp_detach = unix_detach,
    .wsp_transfer = unix_transfer,
    .wsp_recognise = unix_recognise,
};
