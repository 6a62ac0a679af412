/* Owns nothing. Runs after fork. */
#include "names.h"
#include "clock.h"
#include "common.h"
#include "connecting.h"
#include "decide.h"
#include "handover.h"
#include "memory.h"
#include <netinet/in.h>
#include <stddef.h>

int names_tell(const struct endpoint *ep, int family, struct sockaddr *address, socklen_t *length)
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

bool names_is_over(struct sock *sock, int fd, bool *ended)
{
    struct pollfd look = {fd, POLLRDHUP, 0};
    *ended = false;
    common_recall(sock, fd);
    if (sock->over)
        return true;
    int saved = errno, count = real.poll(&look, 1, 0);
    errno = saved;
    if (count != 1)
        return false;
    *ended = look.revents & POLLRDHUP && !sock_is_slow(sock, SLOW_SHUT_READ);   /* else it may be the program's own */
    return look.revents & POLLERR || (sock->shut_write && *ended && look.revents & POLLHUP);
}

/* Another thread has just put the companion under fd, or is taking it away: the state says so in a moment. Or this is a
 * signal handler that has interrupted such a connect(): the names are known. */
static struct sock *exchanged(int fd)
{
    int64_t until = 0;
    bool own = false;
    const struct sock *sock;
    while ((sock = fdtable_peek(fd)) && !(own = switch_connects(sock)) && !fdtable_companion(fd) &&
           clock_yield(&until, MOMENT_MS))
        ;
    return own || fdtable_companion(fd) ? fdtable_get(fd) : NULL;
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

/* Only an AF_UNIX socket with an abstract name can be a companion from elsewhere. */
static bool may_be_native(const struct sockaddr *answer, socklen_t room, socklen_t length)
{
    return room <= sizeof answer->sa_family ||
           (answer->sa_family == AF_UNIX && length > sizeof answer->sa_family && !answer->sa_data[0]);
}

static int name(int fd, struct sockaddr *address, socklen_t *length, bool peer)
{
    struct sock *sock = fdtable_companion(fd) || (!peer && is_left(fd)) ? fdtable_get(fd) : NULL;
    if (!sock) {
        socklen_t room = memory_reads(length, sizeof *length) ? *length : 0;
        int result = (peer ? real.getpeername : real.getsockname)(fd, address, length);
        if (result < 0 || !may_be_native(address, room, *length) || (!(sock = handover_adopt(fd)) && !(sock = exchanged(fd))))
            return result;
        *length = room;
    }
    bool ended, none = peer && (connecting_goes_on(sock) || names_is_over(sock, fd, &ended));
    int error = none ? -ENOTCONN : names_tell(peer ? &sock->remote : &sock->local, sock->family, address, length);
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
