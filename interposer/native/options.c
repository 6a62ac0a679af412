/* Owns the record of socket options (in struct sock, under its short lock). An established companion has no TCP options
 * of its own: common ones are answered from the record, all others by the shadow, a TCP socket that is not connected.
 * On the connecting side that is the parked socket; an accepted one gets a shadow when first needed. */
#include "options.h"
#include "companion.h"
#include "connecting.h"
#include "real.h"
#include "reasons.h"
#include "stats.h"
#include <errno.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#ifndef TCP_ULP
#define TCP_ULP 31
#endif
#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72
#endif

/* Options with which a socket must stay on TCP: somebody relies on its packets (X9), or on TCP itself. */
static bool keeps_tcp(int level, int name)
{
    switch (level) {
    case SOL_SOCKET:
        return name == SO_BINDTODEVICE || name == SO_MARK || name == SO_ATTACH_FILTER || name == SO_ATTACH_BPF ||
               name == SO_ATTACH_REUSEPORT_CBPF || name == SO_ATTACH_REUSEPORT_EBPF || name == SO_BINDTOIFINDEX ||
               name == SO_ZEROCOPY;
    case IPPROTO_IP:
        return name == IP_TRANSPARENT || name == IP_OPTIONS || name == IP_MINTTL;
    case IPPROTO_IPV6:
        return name == IPV6_TRANSPARENT || name == IPV6_RTHDR || name == IPV6_HOPOPTS || name == IPV6_DSTOPTS;
    case IPPROTO_TCP:
        return name == TCP_MD5SIG || name == TCP_REPAIR || name == TCP_ULP || name == TCP_FASTOPEN_CONNECT;
    default:
        return false;
    }
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
    if (keeps_tcp(level, name))
        sock->unfit = REASON_OPTION;
    if (length > SOCK_OPTION_SIZE || !sock_lock(sock)) {
        sock->options_lost = true;
        return false;
    }
    struct sock_option *place = (struct sock_option *)options_find(sock, level, name);
    if (!place && sock->noptions < SOCK_OPTIONS)
        place = &sock->options[sock->noptions++];
    if (place) {
        *place = (struct sock_option){.level = (int16_t)level, .name = (int16_t)name, .length = (uint8_t)length};
        if (length)
            memcpy(place->value, value, length);
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
    bool held = sock_lock(sock);
    for (int tries = 0; !held && tries < 100; tries++) {
        sched_yield();                 /* the holder may wait for this CPU */
        held = sock_lock(sock);
    }
    bool found = held && nth < sock->noptions;
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

/* Integer options of TCP that servers set on every connection, with the kernel's bounds: answered without a shadow. */
static bool common(int level, int name, int *low, int *high, bool *flag)
{
    *low = INT32_MIN;
    *high = INT32_MAX;
    *flag = false;
    if (level != IPPROTO_TCP)
        return false;
    switch (name) {
    case TCP_NODELAY:
    case TCP_CORK: *flag = true; return true;
    case TCP_KEEPIDLE:
    case TCP_KEEPINTVL: *low = 1; *high = 32767; return true;
    case TCP_KEEPCNT: *low = 1; *high = 127; return true;
    case TCP_USER_TIMEOUT: *low = 0; return true;
    default: return false;
    }
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
    options_replay(sock, fresh);
    int none = 0;
    if (sock_phase(sock) == SOCK_CONNECTED && sock->role == ROW_ACCEPT &&
        !options_find(sock, SOL_SOCKET, SO_PRIORITY))   /* which follows IP_TOS, but not so far */
        real.setsockopt(fresh, SOL_SOCKET, SO_PRIORITY, &none, sizeof none);
    errno = saved;
    if (!atomic_compare_exchange_strong(&sock->shadow, &fd, fresh)) {
        hidden_close(fresh);
        return fd;
    }
    return fresh;
}

/* What the companion itself answers, as TCP would; all else is the shadow's. */
static bool native(int level, int name)
{
    if (level != SOL_SOCKET)
        return false;
    switch (name) {
    case SO_ERROR:
    case SO_TYPE:
    case SO_ACCEPTCONN:
    case SO_RCVTIMEO:
    case SO_SNDTIMEO:
    case SO_RCVLOWAT:
    case SO_LINGER:
    case SO_KEEPALIVE:
    case SO_OOBINLINE:
    case SO_COOKIE:
    case SO_NETNS_COOKIE:
    case SO_INCOMING_CPU: return true;
    default: return false;
    }
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
    bool buffers = level == SOL_SOCKET && (name == SO_SNDBUF || name == SO_RCVBUF);
    if (sock_phase(sock) != SOCK_CONNECTED || native(level, name) || buffers)
        real.setsockopt(fd, level, name, value, length);
}

int options_set(struct sock *sock, int fd, int level, int name, const void *value, socklen_t length)
{
    int low, high;
    bool flag;
    if ((int)length < 0)
        return refuse(EINVAL);
    if (level == IPPROTO_TCP && (name == TCP_ULP || name == TCP_REPAIR))
        return refuse(name == TCP_ULP ? ENOENT : EPERM);   /* what a kernel without them says: programs fall back */
    if (level == SOL_SOCKET && name == SO_ZEROCOPY)
        return refuse(EOPNOTSUPP);
    if (common(level, name, &low, &high, &flag)) {
        int number;
        if (length < sizeof number)
            return refuse(EINVAL);
        if (is_no_pointer(value))
            return refuse(EFAULT);
        memcpy(&number, value, sizeof number);
        if (number < low || number > high)
            return refuse(EINVAL);
        if (flag)
            number = number != 0;
        int shadow = atomic_load(&sock->shadow);
        if (!options_record(sock, level, name, &number, sizeof number) && shadow >= 0)
            real.setsockopt(shadow, level, name, &number, sizeof number);
        tell_late(sock, fd, level, name, &number, sizeof number);
        return 0;
    }
    if (native(level, name) && sock_phase(sock) != SOCK_CONNECTING) {
        int result = real.setsockopt(fd, level, name, value, length);
        if (result == 0)
            options_record(sock, level, name, value, length);
        return result;
    }
    int shadow = options_shadow(sock);
    if (shadow < 0)
        return refuse(ENOBUFS);
    int result = real.setsockopt(shadow, level, name, value, length);
    if (result == 0) {
        options_record(sock, level, name, value, length);
        tell_late(sock, fd, level, name, value, length);
    }
    return result;
}

static int answer(void *value, socklen_t *length, int number)
{
    socklen_t size = *length < sizeof number ? *length : sizeof number;
    memcpy(value, &number, size);
    *length = size;
    return 0;
}

int options_get(struct sock *sock, int fd, int level, int name, void *value, socklen_t *length)
{
    int low, high, number;
    bool flag;
    if (is_no_pointer(length) || is_no_pointer(value))
        return refuse(EFAULT);
    if ((int)*length < 0)
        return refuse(EINVAL);
    if (level == SOL_SOCKET && name == SO_DOMAIN)
        return answer(value, length, sock->family);
    if (level == SOL_SOCKET && name == SO_PROTOCOL)
        return answer(value, length, IPPROTO_TCP);
    if (sock_phase(sock) == SOCK_CONNECTING && level == SOL_SOCKET && name == SO_ERROR)
        return answer(value, length, 0);
    if (native(level, name) && sock_phase(sock) != SOCK_CONNECTING) {
        int result = real.getsockopt(fd, level, name, value, length);
        if (result == 0 && name == SO_ERROR && *length >= 1 && *(uint8_t *)value == ECONNRESET)
            sock->shut_write = true;   /* both directions have ended */
        return result;
    }
    const struct sock_option *recorded = options_find(sock, level, name);
    if (recorded && common(level, name, &low, &high, &flag)) {
        memcpy(&number, recorded->value, sizeof number);
        return answer(value, length, number);
    }
    int shadow = options_shadow(sock);
    if (shadow < 0)
        return refuse(ENOBUFS);
    int result = real.getsockopt(shadow, level, name, value, length);
    if (result == 0 && level == IPPROTO_TCP && name == TCP_INFO && *length > 0)
        *(uint8_t *)value = sock_phase(sock) == SOCK_CONNECTING ? TCP_SYN_SENT : TCP_ESTABLISHED;   /* tcpi_state */
    return result;
}
