/* Owns what this process knows of the machine's ephemeral ports, read again every minute under a lock that is tried and
 * never waited for. A bound port is taken from every destination, so only the upper half is used, and the other left to
 * programs that are not interposed. A port of our own choice costs one system call where the kernel's costs four. */
#include "ports.h"
#include "clock.h"
#include "lifecycle.h"
#include "netinfo.h"
#include "options.h"
#include "real.h"
#include "reasons.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#ifndef IP_LOCAL_PORT_RANGE
#define IP_LOCAL_PORT_RANGE 51
#endif

#define NO_PORT_PAUSE_MS 1000
#define LIFETIME_MS 60000
#define TRIES 8
#define RESERVED 32

struct range {
    uint16_t first, last;
};

static _Atomic uint32_t upper = 60999u << 16 | 46884;   /* the last and the first, as IP_LOCAL_PORT_RANGE has them */
static struct range reserved[RESERVED];
static int nreserved;                  /* -1: not known, or too many */
static int64_t until;                  /* what is known holds so long */
static _Atomic int lock;
static _Atomic int64_t no_port_until;  /* no port is sought before */
static _Atomic uint32_t turn;
/* A walk over the whole half from a random place, in steps that share no divisor with its size: a port comes again only
 * when all others have been tried, as TIME_WAIT would have it. */
static uint32_t seed, stride, places;  /* seed 0: none yet */

void ports_after_fork_child(void)
{
    lock = 0;
    seed = 0;
}

/* Numbers of a file such as "8080,9000-9010\n": ranges of them, or -1. */
static int read_ranges(const char *path, struct range *out, int most, char between)
{
    char text[512];
    int fd = real.open(path, O_RDONLY | O_CLOEXEC, 0), count = 0;
    if (fd < 0)
        return -1;
    ssize_t got = real.read(fd, text, sizeof text);
    real.close(fd);
    if (got < 0 || got == (ssize_t)sizeof text)
        return -1;
    for (ssize_t i = 0; i < got;) {
        unsigned number = 0;
        if (text[i] < '0' || text[i] > '9') {
            i++;
            continue;
        }
        bool joined = i && text[i - 1] == between && count;
        for (; i < got && text[i] >= '0' && text[i] <= '9' && number < 65536; i++)
            number = number * 10 + (unsigned)(text[i] - '0');
        if (number > 65535 || (!joined && count == most))
            return -1;
        if (!joined)
            out[count++].first = (uint16_t)number;
        out[count - 1].last = (uint16_t)number;
    }
    return count;
}

static void learn(void)
{
    struct range whole;
    nreserved = read_ranges("/proc/sys/net/ipv4/ip_local_reserved_ports", reserved, RESERVED, '-');
    if (read_ranges("/proc/sys/net/ipv4/ip_local_port_range", &whole, 1, '\t') == 1 && whole.first < whole.last)
        upper = (uint32_t)whole.last << 16 | (uint32_t)(whole.first + (whole.last - whole.first) / 2);
    until = clock_coarse_ms() + LIFETIME_MS;
}

static struct range upper_half(void)
{
    uint32_t both = upper;
    return (struct range){(uint16_t)both, (uint16_t)(both >> 16)};
}

static uint32_t common_divisor(uint32_t one, uint32_t other)
{
    while (other) {
        uint32_t rest = one % other;
        one = other;
        other = rest;
    }
    return one;
}

static void begin_walk(uint32_t size)
{
    uint32_t random[2];
    if (getrandom(random, sizeof random, GRND_NONBLOCK) < 0)
        random[0] = random[1] = (uint32_t)lifecycle_pid * 2654435761u;
    seed = random[0] | 1;
    stride = random[1] % size + 1;
    while (common_divisor(stride, size) != 1)
        stride = stride % size + 1;
    places = size;
}

/* Another one each time, and in each process; 0: the kernel is to choose. */
static uint16_t choose(struct range *half)
{
    if (atomic_exchange_explicit(&lock, 1, memory_order_acquire))
        return 0;
    if (until < clock_coarse_ms())
        learn();
    *half = upper_half();
    bool known = nreserved >= 0 && !lifecycle_moved;
    uint32_t size = half->last - half->first + 1u;
    if (!seed || size != places)
        begin_walk(size);
    uint64_t step = (uint64_t)atomic_fetch_add_explicit(&turn, 1, memory_order_relaxed) % size * stride;
    uint32_t port = half->first + (uint32_t)((seed + step) % size);
    for (int i = 0; known && i < nreserved; i++)
        known = port < reserved[i].first || port > reserved[i].last;
    atomic_store_explicit(&lock, 0, memory_order_release);
    return known ? (uint16_t)port : 0;
}

bool ports_local(int fd, struct endpoint *local)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    return real.getsockname(fd, (struct sockaddr *)&address, &length) == 0 &&
           endpoint_from_sockaddr(local, (struct sockaddr *)&address, length);
}

static bool bind_to(const struct sock *sock, int fd, const struct endpoint *local)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    endpoint_to_sockaddr(local, sock->family, (struct sockaddr *)&address, &length);
    return real.bind(fd, (struct sockaddr *)&address, length) == 0;
}

static bool bind_by_kernel(const struct sock *sock, int fd, struct range half, struct endpoint *local)
{
    /* Bound already, to an address alone: IP_BIND_ADDRESS_NO_PORT, which would leave this bind without a port too. */
    bool late = options_find(sock, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT);
    bool narrowed = !options_find(sock, IPPROTO_IP, IP_LOCAL_PORT_RANGE);
    int off = 0, on = 1;
    uint32_t range = (uint32_t)half.last << 16 | half.first, whole = 0;
    local->port = 0;
    if (late)
        real.setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &off, sizeof off);
    if (narrowed)
        real.setsockopt(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, &range, sizeof range);
    bool bound = bind_to(sock, fd, local);
    int error = errno;
    if (narrowed)
        real.setsockopt(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, &whole, sizeof whole);
    if (late)
        real.setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    errno = error;
    return bound && ports_local(fd, local) && local->port;
}

bool ports_by_kernel(const struct sock *sock, int fd, struct endpoint *local)
{
    return bind_by_kernel(sock, fd, (struct range){0}, local);
}

bool ports_own(const struct sock *sock, int fd, struct endpoint *local)
{
    struct range half = upper_half();
    bool bound = false;
    /* With reuse a port that another such client holds would not be refused; the kernel's own choice shares none. */
    bool shares = options_find(sock, SOL_SOCKET, SO_REUSEADDR) || options_find(sock, SOL_SOCKET, SO_REUSEPORT);
    for (int tries = shares || options_find(sock, IPPROTO_IP, IP_LOCAL_PORT_RANGE) ? TRIES : 0; !bound && tries < TRIES; tries++) {
        local->port = choose(&half);
        if (!local->port)
            break;
        bound = bind_to(sock, fd, local);
        if (!bound && errno != EADDRINUSE)
            break;
    }
    return bound || bind_by_kernel(sock, fd, half, local);
}

int ports_bind(struct sock *sock, int fd, const struct endpoint *source, struct endpoint *local)
{
    if (sock->bound && !ports_local(fd, local))
        return -REASON_NO_PORT;
    if (!sock->bound || endpoint_is_wildcard(local)) {
        uint16_t port = sock->bound ? local->port : 0;
        *local = *source;
        local->port = port;
    }
    if (endpoint_is_v4(local) != endpoint_is_v4(source))
        return -REASON_ADDRESS;
    if (local->port)
        return 0;
    if (clock_coarse_ms() < atomic_load_explicit(&no_port_until, memory_order_relaxed))
        return -REASON_NO_PORT;
    if (!ports_own(sock, fd, local)) {
        if (errno == EADDRNOTAVAIL)    /* it has just gone, and says nothing about ports */
            return -REASON_OTHER_MACHINE;
        if (errno == EINVAL && ports_local(fd, local) && local->port) {   /* bound where no hook saw it: bindresvport() */
            sock->bound = true;
            return endpoint_is_wildcard(local) ? -REASON_ADDRESS : 0;
        }
        if (errno != EADDRINUSE)
            return -REASON_NO_PORT;
        /* The kernel has looked at every port, which takes it milliseconds. */
        atomic_store_explicit(&no_port_until, clock_coarse_ms() + NO_PORT_PAUSE_MS, memory_order_relaxed);
        return -REASON_NO_PORT;
    }
    sock->port_is_ours = !sock->bound;
    sock->bound = true;
    return 0;
}
