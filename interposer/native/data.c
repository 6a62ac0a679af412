/* Owns nothing. Async-signal-safe, runs after fork; errno is touched on failure only. */
#include "data.h"
#include <errno.h>
#include <string.h>

#define IGNORED_BY_TCP_SEND (MSG_FASTOPEN | MSG_ZEROCOPY)

/* A reset by the peer is ECONNRESET once, without a signal; the kernel says EPIPE at once for AF_UNIX. */
static ssize_t sent(int fd, ssize_t result, int flags)
{
    if (result >= 0 || errno != EPIPE)
        return result;
    int pending = 0;
    socklen_t length = sizeof pending;
    if (real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &pending, &length) == 0 && pending == ECONNRESET) {
        errno = ECONNRESET;
        return -1;
    }
    if (!(flags & MSG_NOSIGNAL))
        raise(SIGPIPE);
    errno = EPIPE;
    return -1;
}

ssize_t data_send(int fd, const void *buffer, size_t size, int flags)
{
    return sent(fd, real.send(fd, buffer, size, (flags & ~IGNORED_BY_TCP_SEND) | MSG_NOSIGNAL), flags);
}

ssize_t data_sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (is_no_pointer(message))
        return real.sendmsg(fd, message, flags);
    struct msghdr copy = *message;
    copy.msg_name = NULL;              /* TCP ignores an address, and passes no descriptors */
    copy.msg_namelen = 0;
    copy.msg_control = NULL;
    copy.msg_controllen = 0;
    return sent(fd, real.sendmsg(fd, &copy, (flags & ~IGNORED_BY_TCP_SEND) | MSG_NOSIGNAL), flags);
}

ssize_t data_writev(int fd, const struct iovec *vector, int count)
{
    if (count < 0) {
        errno = EINVAL;
        return -1;
    }
    struct msghdr message = {.msg_iov = (struct iovec *)vector, .msg_iovlen = (size_t)count};
    ssize_t result = real.sendmsg(fd, &message, MSG_NOSIGNAL);
    if (result < 0 && errno == EMSGSIZE)   /* sendmsg's word for too long a vector */
        errno = EINVAL;
    return sent(fd, result, 0);
}

int data_sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    unsigned done = 0;
    for (; done < count; done++) {
        ssize_t result = data_sendmsg(fd, &messages[done].msg_hdr, flags);
        if (result < 0)
            return done ? (int)done : -1;
        messages[done].msg_len = (unsigned)result;
    }
    return (int)done;
}

/* TCP's MSG_TRUNC throws bytes away without copying them; AF_UNIX would copy. */
static ssize_t discard(int fd, size_t size, int flags)
{
    char scratch[4096];
    size_t done = 0;
    int saved = errno;
    do {
        size_t want = size - done < sizeof scratch ? size - done : sizeof scratch;
        ssize_t got = real.recv(fd, scratch, want, done && !(flags & MSG_WAITALL) ? flags | MSG_DONTWAIT : flags);
        if (got <= 0 && !done)
            return got;
        if (got <= 0)
            break;
        done += (size_t)got;
        if (flags & MSG_PEEK)
            break;
    } while (done < size);
    errno = saved;
    return (ssize_t)done;
}

/* After the program's own SHUT_RD (which the kernel was not told, because the peer would get EPIPE): what is queued,
 * then end of file. */
static ssize_t received(struct sock *sock, int saved, ssize_t result)
{
    if (result >= 0)
        return result;
    if (errno == ECONNRESET)
        sock->shut_write = true;       /* both directions have ended: hang-ups are real from here on */
    if (!sock->shut_read || errno != EAGAIN)
        return result;
    errno = saved;
    return 0;
}

ssize_t data_read(struct sock *sock, int fd, void *buffer, size_t size)
{
    if (sock->shut_read)
        return data_recv(sock, fd, buffer, size, 0);
    ssize_t result = real.read(fd, buffer, size);
    return result < 0 ? received(sock, errno, result) : result;
}

ssize_t data_recv(struct sock *sock, int fd, void *buffer, size_t size, int flags)
{
    int saved = errno;
    if (flags & MSG_ERRQUEUE) {
        errno = EAGAIN;
        return -1;
    }
    if (sock->shut_read)
        flags |= MSG_DONTWAIT;
    if (flags & MSG_TRUNC)
        return received(sock, saved, discard(fd, size, flags & ~MSG_TRUNC));
    return received(sock, saved, real.recv(fd, buffer, size, flags));
}

ssize_t data_recvmsg(struct sock *sock, int fd, struct msghdr *message, int flags)
{
    if (flags & MSG_ERRQUEUE) {
        errno = EAGAIN;
        return -1;
    }
    if (is_no_pointer(message))
        return real.recvmsg(fd, message, flags);
    struct msghdr copy = *message;
    copy.msg_name = NULL;
    copy.msg_namelen = 0;
    copy.msg_control = NULL;           /* descriptors that a peer sends are closed by the kernel */
    copy.msg_controllen = 0;
    copy.msg_flags = 0;
    int saved = errno;
    ssize_t result;
    flags |= sock->shut_read ? MSG_DONTWAIT : 0;
    if (flags & MSG_TRUNC) {
        size_t size = 0;
        for (size_t i = 0; i < copy.msg_iovlen && copy.msg_iov; i++)
            size += copy.msg_iov[i].iov_len;
        result = discard(fd, size, flags & ~MSG_TRUNC);
    } else {
        result = real.recvmsg(fd, &copy, flags);
    }
    result = received(sock, saved, result);
    if (result >= 0) {
        message->msg_namelen = 0;
        message->msg_controllen = 0;
        message->msg_flags = copy.msg_flags & ~MSG_CTRUNC;
    }
    return result;
}

int data_recvmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    unsigned done = 0;
    bool once = flags & MSG_WAITFORONE;
    struct timespec start, now;
    if (timeout)
        clock_gettime(CLOCK_MONOTONIC, &start);
    for (flags &= ~MSG_WAITFORONE; done < count; done++) {
        ssize_t result = data_recvmsg(sock, fd, &messages[done].msg_hdr, flags);
        if (result < 0)
            return done ? (int)done : -1;
        messages[done].msg_len = (unsigned)result;
        if (once)
            flags |= MSG_DONTWAIT;
        if (timeout) {                 /* as the kernel: looked at only after a message */
            clock_gettime(CLOCK_MONOTONIC, &now);
            if (now.tv_sec - start.tv_sec > timeout->tv_sec ||
                (now.tv_sec - start.tv_sec == timeout->tv_sec && now.tv_nsec - start.tv_nsec >= timeout->tv_nsec)) {
                done++;
                break;
            }
        }
    }
    return (int)done;
}

ssize_t data_readv(struct sock *sock, int fd, const struct iovec *vector, int count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)vector, .msg_iovlen = (size_t)count};
    int saved = errno;
    return received(sock, saved, sock->shut_read ? real.recvmsg(fd, &message, MSG_DONTWAIT) : real.readv(fd, vector, count));
}
