/* Owns nothing. Async-signal-safe, runs after fork; errno is touched on failure only. */
#include "data.h"
#include "connecting.h"
#include "lifecycle.h"
#include "sandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#define IGNORED_BY_TCP_SEND (MSG_FASTOPEN | MSG_ZEROCOPY)

/* The kernel's own signal comes before the reset is known, but raise() may be forbidden in a sandbox. */
static int native_flags(int flags)
{
    return (flags & ~IGNORED_BY_TCP_SEND) | (sandbox_closed ? 0 : MSG_NOSIGNAL);
}

static bool has_ended(int fd)
{
    struct pollfd look = {fd, POLLRDHUP, 0};
    return real.poll(&look, 1, 0) == 1;
}

/* The kernel says EPIPE at once for AF_UNIX. For TCP a reset is ECONNRESET once, without a signal; a peer that has only
 * stopped reading is sent to all the same; and that a peer has closed is learnt from its answer to the next bytes. */
static ssize_t not_sent(struct sock *sock, int fd, size_t size, int flags, int saved)
{
    if (errno != EPIPE || sandbox_closed)
        return -1;
    bool ended = has_ended(fd);
    int pending = 0;
    socklen_t length = sizeof pending;
    if (ended && real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &pending, &length) == 0 && pending == ECONNRESET) {
        sock->shut_write = true;
        errno = ECONNRESET;
        return -1;
    }
    /* A process that shares the socket may have ended its sending. */
    if (!sock->shut_write && (ended || sock->fork_count == lifecycle_forks())) {
        sock->shut_write = ended && size;
        errno = saved;
        return (ssize_t)size;
    }
    if (!(flags & MSG_NOSIGNAL))
        raise(SIGPIPE);
    errno = EPIPE;
    return -1;
}

/* On a socket that is still connecting a call waits, for as long as the option `limit` says, or says EAGAIN. True: it may
 * go on now, with what has become of fd. */
static bool may_go_on(int fd, int flags, int limit)
{
    bool waits = !(flags & MSG_DONTWAIT || real.fcntl(fd, F_GETFL, 0) & O_NONBLOCK);
    int saved = errno;
    struct sock *held = fdtable_get(fd);
    int error = !held ? EBADF : waits ? -connecting_wait(&held, fd, limit) : connecting_goes_on(held) ? EAGAIN : 0;
    if (held && !error)
        error = sock_take_error(held);
    if (held)
        sock_put(held);
    errno = error == EINPROGRESS ? EAGAIN : error ? error : saved;
    return !error;
}

/* TCP's word for MSG_FASTOPEN on a connection. */
static bool opens_again(const struct sock *sock, int flags)
{
    if (!(flags & MSG_FASTOPEN) || sock_is_slow(sock, SLOW_CONNECTING))
        return false;
    errno = EISCONN;
    return true;
}

static ssize_t send_message(struct sock *sock, int fd, const struct msghdr *message, int flags)
{
    int native = native_flags(flags);
    if (opens_again(sock, flags))
        return -1;
    if (sock_is_slow(sock, SLOW_CONNECTING)) {
        if (!may_go_on(fd, flags, SO_SNDTIMEO))
            return -1;
        sock = fdtable_companion(fd);
        if (!sock)
            return real.sendmsg(fd, message, flags);
    }
    const struct wsp_mover *mover = sock->moving.mover;
    int saved = errno;
    ssize_t result = mover ? mover->send(sock->moving.state, fd, message, native) : real.sendmsg(fd, message, native);
    if (result >= 0)
        return result;
    size_t size = 0;
    for (size_t i = 0; errno == EPIPE && i < message->msg_iovlen; i++)
        size += message->msg_iov[i].iov_len;
    return not_sent(sock, fd, size, flags, saved);
}

ssize_t data_send(struct sock *sock, int fd, const void *buffer, size_t size, int flags)
{
    if (sock_is_slow(sock, SLOW_CONNECTING | SLOW_MOVER) || flags & MSG_FASTOPEN) {
        struct iovec part = {(void *)buffer, size};
        return send_message(sock, fd, &(struct msghdr){.msg_iov = &part, .msg_iovlen = 1}, flags);
    }
    int saved = errno;
    ssize_t result = real.send(fd, buffer, size, native_flags(flags));
    return result >= 0 ? result : not_sent(sock, fd, size, flags, saved);
}

/* A sandbox knows the calls that the program makes: no other takes their place there. */
static bool as_called(const struct sock *sock)
{
    return sandbox_closed && !sock_is_slow(sock, SLOW_CONNECTING | SLOW_MOVER);
}

ssize_t data_write(struct sock *sock, int fd, const void *buffer, size_t size)
{
    return as_called(sock) ? real.write(fd, buffer, size) : data_send(sock, fd, buffer, size, 0);
}

ssize_t data_sendmsg(struct sock *sock, int fd, const struct msghdr *message, int flags)
{
    if (is_no_pointer(message))
        return real.sendmsg(fd, message, flags);
    struct msghdr copy = *message;
    copy.msg_name = NULL;              /* TCP ignores an address, and passes no descriptors */
    copy.msg_namelen = 0;
    copy.msg_control = NULL;
    copy.msg_controllen = 0;
    return send_message(sock, fd, &copy, flags);
}

ssize_t data_writev(struct sock *sock, int fd, const struct iovec *vector, int count)
{
    if (count < 0) {
        errno = EINVAL;
        return -1;
    }
    if (as_called(sock))
        return real.writev(fd, vector, count);
    struct msghdr message = {.msg_iov = (struct iovec *)vector, .msg_iovlen = (size_t)count};
    ssize_t result = send_message(sock, fd, &message, 0);
    if (result < 0 && errno == EMSGSIZE)   /* sendmsg's word for too long a vector */
        errno = EINVAL;
    return result;
}

int data_sendmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    unsigned done = 0;
    for (; done < count; done++) {
        ssize_t result = data_sendmsg(sock, fd, &messages[done].msg_hdr, flags);
        if (result < 0)
            return done ? (int)done : -1;
        messages[done].msg_len = (unsigned)result;
    }
    return (int)done;
}

static ssize_t receive_message(struct sock *sock, int fd, struct msghdr *message, int flags)
{
    const struct wsp_mover *mover = sock->moving.mover;
    return mover ? mover->receive(sock->moving.state, fd, message, flags) : real.recvmsg(fd, message, flags);
}

/* TCP's MSG_TRUNC throws bytes away without copying them; AF_UNIX would copy. */
static ssize_t discard(struct sock *sock, int fd, size_t size, int flags)
{
    char scratch[4096];
    size_t done = 0;
    int saved = errno;
    do {
        size_t want = size - done < sizeof scratch ? size - done : sizeof scratch;
        struct iovec part = {scratch, want};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        ssize_t got = receive_message(sock, fd, &message, done && !(flags & MSG_WAITALL) ? flags | MSG_DONTWAIT : flags);
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
    if (!sock_is_slow(sock, SLOW_SHUT_READ) || errno != EAGAIN)
        return result;
    errno = saved;
    return 0;
}

ssize_t data_read(struct sock *sock, int fd, void *buffer, size_t size)
{
    if (sock_is_slow(sock, ~0))
        return data_recv(sock, fd, buffer, size, 0);
    ssize_t result = real.read(fd, buffer, size);
    return result < 0 ? received(sock, errno, result) : result;
}

ssize_t data_recv(struct sock *sock, int fd, void *buffer, size_t size, int flags)
{
    int saved = errno;
    if (sock_is_slow(sock, ~0) || flags & (MSG_ERRQUEUE | MSG_TRUNC)) {
        struct iovec part = {buffer, size};
        return data_recvmsg(sock, fd, &(struct msghdr){.msg_iov = &part, .msg_iovlen = 1}, flags);
    }
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
    if (sock_is_slow(sock, SLOW_CONNECTING)) {
        if (!may_go_on(fd, flags, SO_RCVTIMEO))
            return -1;
        sock = fdtable_companion(fd);
        if (!sock)
            return real.recvmsg(fd, message, flags);
    }
    struct msghdr copy = *message;
    copy.msg_name = NULL;
    copy.msg_namelen = 0;
    copy.msg_control = NULL;           /* descriptors that a peer sends are closed by the kernel */
    copy.msg_controllen = 0;
    copy.msg_flags = 0;
    int saved = errno;
    ssize_t result;
    flags |= sock_is_slow(sock, SLOW_SHUT_READ) ? MSG_DONTWAIT : 0;
    if (flags & MSG_TRUNC) {
        size_t size = 0;
        for (size_t i = 0; i < copy.msg_iovlen && copy.msg_iov; i++)
            size += copy.msg_iov[i].iov_len;
        result = discard(sock, fd, size, flags & ~MSG_TRUNC);
    } else {
        result = receive_message(sock, fd, &copy, flags);
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
    int saved = errno;
    if (!sock_is_slow(sock, ~0))
        return received(sock, saved, real.readv(fd, vector, count));
    struct msghdr message = {.msg_iov = (struct iovec *)vector, .msg_iovlen = (size_t)count};
    return data_recvmsg(sock, fd, &message, 0);
}
