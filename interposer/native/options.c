/* Owns the record of socket options (in struct sock, under its short lock). An established companion has no TCP options
 * of its own: what options.def says is answered from the record, all others by the shadow, a TCP socket. On the connecting
 * side that is the parked socket; an accepted one gets a shadow when first needed. Some answers depend on being connected:
 * for them the shadow is connected to itself, over the interface that TCP would have used. */
#include "options.h"
#include "common.h"
#include "companion.h"
#include "connecting.h"
#include "memory.h"
#include "ports.h"
#include "real.h"
#include "reasons.h"
#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define JOIN_MS 20                     /* where the answer does not come at once, packets are filtered */

enum treatment { JOINED, COMPANION, BUFFER, RECORD, SHADOW, ANSWERED, STAYS, REFUSED };

struct entry {
    uint8_t treatment, low;
    uint16_t high;
};

#define FLAG 1
#define MOST 0xffff
#define LEVELS 4
#define NUMBERS 256
#define SLOT(level) ((level) == SOL_SOCKET ? 0 : (level) == IPPROTO_TCP ? 1 : (level) == IPPROTO_IP ? 2 : 3)
#define OPTION(level, number, name, treatment, low, high) [SLOT(level)][number] = {treatment, low, high},
#define IOCTL(number, name, treatment)
static const struct entry table[LEVELS][NUMBERS] = {
#include "options.def"
};
#undef OPTION
#undef IOCTL

static struct entry entry_of(int level, int name)
{
    bool known = (level == SOL_SOCKET || level == IPPROTO_TCP || level == IPPROTO_IP || level == IPPROTO_IPV6) &&
                 name >= 0 && name < NUMBERS;
    return known ? table[SLOT(level)][name] : (struct entry){0};
}

/* Must a socket with this option stay on TCP? */
static bool keeps_tcp(int level, int name, const void *value, socklen_t length)
{
    uint32_t bytes = 0;
    struct entry entry = entry_of(level, name);
    if (level == SOL_SOCKET && name == SO_RCVLOWAT && length >= sizeof bytes)   /* AF_UNIX's poll does not know it */
        memcpy(&bytes, value, sizeof bytes);
    return entry.treatment == STAYS || entry.treatment == REFUSED || bytes > 1;
}

const struct sock_option *options_find(const struct sock *sock, int level, int name)
{
    for (int i = 0; i < sock->noptions; i++)
        if (sock->options[i].level == level && sock->options[i].name == name)
            return &sock->options[i];
    return NULL;
}

bool options_record(struct sock *sock, int level, int name, const void *value, socklen_t length)
{
    static const int zero;
    if (!memory_reads(value, length)) {   /* IPv6 takes NULL for 0; and a length may be more than there is */
        length = sizeof zero;
        value = memory_reads(value, length) ? value : &zero;
    }
    if (keeps_tcp(level, name, value, length))
        sock->unfit = REASON_OPTION;
    if (length > SOCK_OPTION_SIZE || !sock_lock(sock)) {
        sock->options_lost = true;
        return false;
    }
    struct sock_option *place = (struct sock_option *)options_find(sock, level, name);
    bool fresh = !place && sock->noptions < SOCK_OPTIONS;
    if (fresh)
        place = &sock->options[sock->noptions];
    if (place) {
        if (fresh)                     /* else another thread may look for it now */
            *place = (struct sock_option){.level = (int16_t)level, .name = (int16_t)name};
        place->length = (uint8_t)length;
        if (length)
            memcpy(place->value, value, length);
        if (fresh)
            atomic_fetch_add(&sock->noptions, 1);
    } else {
        sock->options_lost = true;
    }
    sock_unlock(sock);
    return place;
}

void options_import(struct sock *sock, int fd)
{
    static const struct {
        int16_t level, name;
    } asked[] = {
        {SOL_SOCKET, SO_BINDTODEVICE}, {SOL_SOCKET, SO_MARK}, {SOL_SOCKET, SO_ZEROCOPY}, {SOL_SOCKET, SO_BINDTOIFINDEX},
        {IPPROTO_IP, IP_TRANSPARENT}, {IPPROTO_IP, IP_OPTIONS}, {IPPROTO_IP, IP_MINTTL}, {IPPROTO_IPV6, IPV6_TRANSPARENT},
        {IPPROTO_IPV6, IPV6_RTHDR}, {IPPROTO_IPV6, IPV6_HOPOPTS}, {IPPROTO_IPV6, IPV6_DSTOPTS}, {IPPROTO_TCP, TCP_ULP},
        {SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_LINGER}, {SOL_SOCKET, SO_OOBINLINE}, {SOL_SOCKET, SO_RCVTIMEO},
        {SOL_SOCKET, SO_SNDTIMEO}, {IPPROTO_TCP, TCP_NODELAY}, {IPPROTO_TCP, TCP_CORK}, {IPPROTO_TCP, TCP_USER_TIMEOUT},
    };
    static const uint8_t none[SOCK_OPTION_SIZE];
    socklen_t length = 0;
    /* The length that comes back is the filter's; one of eBPF is not shown. */
    if (real.getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, NULL, &length) < 0 ? errno == EACCES : length > 0)
        sock->unfit = REASON_OPTION;
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
        uint8_t value[SOCK_OPTION_SIZE] = {0};
        length = sizeof value;
        int error = real.getsockopt(fd, asked[i].level, asked[i].name, value, &length) < 0 ? errno : 0;
        if (error == ERANGE || error == EINVAL)   /* larger than the room: something is set */
            length = sizeof value, value[0] = 1;
        else if (error)
            continue;
        if (length <= sizeof value && memcmp(value, none, length) != 0)
            options_record(sock, asked[i].level, asked[i].name, value, length);
    }
}

bool options_nth(struct sock *sock, int nth, struct sock_option *option)
{
    bool held = sock_lock(sock), found = held && nth < sock->noptions;
    if (found)
        *option = sock->options[nth];
    if (held)
        sock_unlock(sock);
    return found;
}

void options_replay(struct sock *sock, int fd)
{
    struct sock_option option;
    int saved = errno;
    for (int i = 0; options_nth(sock, i, &option); i++)
        real.setsockopt(fd, option.level, option.name, option.value, option.length);
    errno = saved;
}

/* --- on a connected companion --- */

bool options_inherits(int level, int name)
{
    return level == SOL_SOCKET ? name != SO_PRIORITY
                               : level != IPPROTO_TCP || (name != TCP_DEFER_ACCEPT && name != TCP_FASTOPEN);
}

int options_shadow(struct sock *sock)
{
    int fd = atomic_load(&sock->shadow);
    if (fd >= 0 && hidden_is(fd))
        return fd;
    int fresh, saved = errno;
    do
        fresh = hidden_fd(real.socket(sock->family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    while (fresh < 0 && errno == EMFILE && hidden_reclaim());
    if (fresh < 0)
        return -1;
    int none = 0;
    options_replay(sock, fresh);
    if (sock_phase(sock) == SOCK_CONNECTED && sock->role == ROW_ACCEPT &&
        !options_find(sock, SOL_SOCKET, SO_PRIORITY))   /* which follows IP_TOS, but not so far */
        real.setsockopt(fresh, SOL_SOCKET, SO_PRIORITY, &none, sizeof none);
    errno = saved;
    if (!atomic_compare_exchange_strong(&sock->shadow, &fd, fresh)) {
        hidden_close(fresh);
        return fd;
    }
    atomic_store(&sock->joined, 0);
    return fresh;
}

static bool is_established(int fd)
{
    struct pollfd look = {fd, POLLOUT, 0};
    return real.poll(&look, 1, JOIN_MS) == 1 && look.revents == POLLOUT;
}

/* Connects the shadow to itself, so that it is as connected as TCP's socket would be. */
static void join(struct sock *sock, int fd)
{
    static _Atomic bool in_vain;
    struct linger reset = {1, 0};      /* no packet, and no claim to the port, outlives it */
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    struct endpoint own;
    if (in_vain)
        return;
    if (!ports_local(fd, &own) || !own.port) {
        own = sock->local;
        if (!ports_own(sock, fd, &own))
            return;
    }
    endpoint_to_sockaddr(&own, sock->family, (struct sockaddr *)&address, &length);
    real.setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    real.fcntl(fd, F_SETFL, real.fcntl(fd, F_GETFL, 0) | O_NONBLOCK);
    if ((real.connect(fd, (struct sockaddr *)&address, length) < 0 && errno != EINPROGRESS) || !is_established(fd)) {
        options_part(sock, fd);
        in_vain = true;
    }
}

void options_part(struct sock *sock, int fd)
{
    const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    struct linger none = {0};
    real.connect(fd, &nobody, sizeof nobody);
    if (!options_find(sock, SOL_SOCKET, SO_LINGER))
        real.setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    atomic_store(&sock->joined, 0);
}

int options_connected(struct sock *sock)
{
    int fd = options_shadow(sock), saved = errno;
    if (fd >= 0 && sock_phase(sock) == SOCK_CONNECTED && atomic_exchange(&sock->joined, fd) != fd)
        join(sock, fd);
    errno = saved;
    return fd;
}

static int refuse(int error)
{
    errno = error;
    return -1;
}

/* An option was recorded while the socket may have been connecting: who ends that has either seen it, or has ended it, and
 * what stands under fd now is told. */
static void tell_late(struct sock *sock, int fd, int level, int name, const void *value, socklen_t length)
{
    sock->options_late = true;
    if (connecting_goes_on(sock))
        return;
    enum treatment treatment = entry_of(level, name).treatment;
    if (sock_phase(sock) != SOCK_CONNECTED || treatment == COMPANION || treatment == BUFFER)
        real.setsockopt(fd, level, name, value, length);
}

static int set_record(struct sock *sock, int fd, int level, int name, const struct entry *entry, const void *value)
{
    int number;
    memcpy(&number, value, sizeof number);
    if (entry->high == FLAG)
        number = number != 0;
    else if (number < entry->low || (number > entry->high && entry->high != MOST))
        return refuse(EINVAL);
    int shadow = atomic_load(&sock->shadow);
    if (!options_record(sock, level, name, &number, sizeof number) && shadow >= 0)
        real.setsockopt(shadow, level, name, &number, sizeof number);
    tell_late(sock, fd, level, name, &number, sizeof number);
    return 0;
}

static int set_refused(int level, const struct entry *entry, const void *value)
{
    int number = 1;
    if (level == SOL_SOCKET)           /* SO_ZEROCOPY */
        memcpy(&number, value, sizeof number);
    return number == 0 ? 0 : refuse(number < 0 || number > 1 ? EINVAL : entry->low);
}

int options_set(struct sock *sock, int fd, int level, int name, const void *value, socklen_t length)
{
    struct entry entry = entry_of(level, name);
    if ((int)length < 0)
        return refuse(EINVAL);
    if (entry.treatment == RECORD || entry.treatment == REFUSED) {
        socklen_t least = level == IPPROTO_TCP && name == TCP_ULP ? 1 : sizeof(int);
        if (length < least)
            return refuse(EINVAL);
        if (!memory_reads(value, least))
            return refuse(EFAULT);
        return entry.treatment == RECORD ? set_record(sock, fd, level, name, &entry, value)
                                         : set_refused(level, &entry, value);
    }
    bool companion = entry.treatment == COMPANION && sock_phase(sock) != SOCK_CONNECTING;
    bool apart = entry.treatment == SHADOW || entry.treatment == BUFFER || entry.treatment == COMPANION;
    int target = companion ? fd : apart ? options_shadow(sock) : options_connected(sock);
    if (target < 0)
        return refuse(ENOBUFS);
    int result = real.setsockopt(target, level, name, value, length);
    if (result == 0) {
        options_record(sock, level, name, value, length);
        if (!companion)
            tell_late(sock, fd, level, name, value, length);
        if (level == IPPROTO_IPV6 && name == IPV6_ADDRFORM)
            sock->family = AF_INET;
    }
    return result;
}

/* The kernel writes an integer of its own first, and knows bad pointers. */
static int answer(int fd, void *value, socklen_t *length, int number)
{
    int result = real.getsockopt(fd, SOL_SOCKET, SO_TYPE, value, length);
    if (result == 0)
        memcpy(value, &number, *length);
    return result;
}

/* As TCP counts them, with the peer's closing and the program's own. */
static uint8_t tcp_state(struct sock *sock, int fd)
{
    struct pollfd look = {fd, POLLRDHUP, 0};
    if (sock_phase(sock) == SOCK_CONNECTING)
        return TCP_SYN_SENT;
    common_recall(sock, fd);
    bool ended = real.poll(&look, 1, 0) == 1;
    if (ended && look.revents & POLLERR)
        return TCP_CLOSE;
    return sock->shut_write ? ended ? TCP_CLOSE : TCP_FIN_WAIT2 : ended ? TCP_CLOSE_WAIT : TCP_ESTABLISHED;
}

static int get_answered(struct sock *sock, int fd, int level, int name, void *value, socklen_t *length)
{
    if (level == SOL_SOCKET && name != SO_PEERNAME)
        return answer(fd, value, length, name == SO_DOMAIN ? sock->family : IPPROTO_TCP);
    int shadow = options_connected(sock);
    if (shadow < 0)
        return refuse(ENOBUFS);
    int result = real.getsockopt(shadow, level, name, value, length);
    if (result < 0 || *length == 0)
        return result;
    if (level == IPPROTO_TCP) {        /* TCP_INFO */
        *(uint8_t *)value = tcp_state(sock, fd);
    } else if (level == IPPROTO_IP) {  /* IP_PROTOCOL, which is the local port */
        int port = sock->local.port;
        memcpy(value, &port, *length < sizeof port ? *length : sizeof port);
    } else {
        struct sockaddr_storage peer;
        socklen_t size = sizeof peer;
        endpoint_to_sockaddr(&sock->remote, sock->family, (struct sockaddr *)&peer, &size);
        memcpy(value, &peer, *length < size ? *length : size);
    }
    return result;
}

/* What neither the program nor the switch could make the shadow say. */
static bool differs(const struct sock *sock, int shadow, int level, int name, int *number)
{
    const struct sock_option *recorded = options_find(sock, level, name);
    socklen_t length = sizeof *number;
    bool v6 = level == IPPROTO_IPV6, accepted = sock->role == ROW_ACCEPT && sock_phase(sock) == SOCK_CONNECTED;
    if (v6 && name == IPV6_V6ONLY && sock->port_is_ours) {   /* our bind() has set it */
        *number = recorded && recorded->value[0];
        return true;
    }
    if (v6 && name == IPV6_V6ONLY && accepted) {   /* the listener's, which bind() sets too */
        *number = sock->v6only;
        return true;
    }
    if (v6 && name == IPV6_MULTICAST_IF && accepted) {   /* where the first packet came in */
        *number = 1;
        return true;
    }
    bool v4 = level == IPPROTO_IP && endpoint_is_v4(&sock->local);
    bool hops = (v6 && name == IPV6_MULTICAST_HOPS) || (v4 && name == IP_MULTICAST_TTL);
    return hops && accepted &&         /* what it had left */
           real.getsockopt(shadow, level, v6 ? IPV6_UNICAST_HOPS : IP_TTL, number, &length) == 0;
}

/* Another thread may be setting it. */
static const struct sock_option *copy_of(struct sock *sock, int level, int name, struct sock_option *copy)
{
    bool held = sock_lock(sock);
    const struct sock_option *recorded = options_find(sock, level, name);
    if (recorded)
        *copy = *recorded;
    if (held)
        sock_unlock(sock);
    return recorded ? copy : NULL;
}

int options_get(struct sock *sock, int fd, int level, int name, void *value, socklen_t *length)
{
    struct entry entry = entry_of(level, name);
    bool connecting = sock_phase(sock) == SOCK_CONNECTING;
    if (entry.treatment == ANSWERED)
        return get_answered(sock, fd, level, name, value, length);
    if (connecting && level == SOL_SOCKET && name == SO_ERROR)
        return answer(fd, value, length, 0);
    if (entry.treatment == COMPANION && !connecting) {
        int result = real.getsockopt(fd, level, name, value, length);
        if (result == 0 && level == SOL_SOCKET && name == SO_ERROR && *length >= 1 && *(uint8_t *)value == ECONNRESET)
            sock_is_over(sock);
        return result;
    }
    struct sock_option copy;
    const struct sock_option *recorded = entry.treatment == RECORD || entry.treatment == BUFFER
                                             ? copy_of(sock, level, name, &copy) : NULL;
    if (recorded && entry.treatment == RECORD) {
        int number;
        memcpy(&number, recorded->value, sizeof number);
        return answer(fd, value, length, entry.high == FLAG ? number != 0 : number);
    }
    bool apart = recorded || entry.treatment == RECORD || entry.treatment == SHADOW || entry.treatment == COMPANION;
    int shadow = apart ? options_shadow(sock) : options_connected(sock);
    if (shadow < 0)
        return refuse(ENOBUFS);
    int result = real.getsockopt(shadow, level, name, value, length);
    int number;
    if (result == 0 && differs(sock, shadow, level, name, &number))
        memcpy(value, &number, *length < sizeof number ? *length : sizeof number);
    return result;
}

/* --- ioctl --- */

int options_ioctl(struct sock *sock, int fd, unsigned long request, void *argument)
{
    enum treatment treatment = (request >> 8 & 0xff) == 0x89 ? SHADOW : COMPANION;   /* of sockets; of any file */
    switch (request) {
#define OPTION(level, number, name, treatment, low, high)
#define IOCTL(number, name, how) case number: treatment = how; break;
#include "options.def"
#undef OPTION
#undef IOCTL
    default: break;
    }
    int target = treatment == COMPANION ? fd : options_shadow(sock);
    return target < 0 ? refuse(ENOBUFS) : real.ioctl(target, request, argument);
}
