/* Owns nothing. Async-signal-safe, runs after fork; errno is touched on failure only. */
#include "data.h"
#include "common.h"
#include "companion.h"
#include "connecting.h"
#include "lifecycle.h"
#include "memory.h"
#include "options.h"
#include "sandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/ioctl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
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
    common_recall(sock, fd);
    bool ended = has_ended(fd);
    int pending = 0;
    socklen_t length = sizeof pending;
    if (ended && real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &pending, &length) == 0 && pending == ECONNRESET) {
        sock_is_over(sock);
        errno = ECONNRESET;
        return -1;
    }
    /* A process that shares the socket may have ended its sending. */
    if (!sock->shut_write && (ended || sock->fork_count == lifecycle_forks())) {
        if (ended && size)
            sock_is_over(sock);
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

/* `written`: by writev(), of which no socket hears where there is nothing to write. */
static ssize_t send_message(struct sock *sock, int fd, const struct msghdr *message, int flags, bool written)
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
    if (errno == EPIPE && written && !size) {
        errno = saved;
        return 0;
    }
    return not_sent(sock, fd, size, flags, saved);
}

ssize_t data_send(struct sock *sock, int fd, const void *buffer, size_t size, int flags)
{
    if (sock_is_slow(sock, SLOW_CONNECTING | SLOW_MOVER) || flags & MSG_FASTOPEN) {
        struct iovec part = {(void *)buffer, size};
        return send_message(sock, fd, &(struct msghdr){.msg_iov = &part, .msg_iovlen = 1}, flags, false);
    }
    int saved = errno, native = native_flags(size ? flags : flags & ~MSG_OOB);   /* AF_UNIX wants a byte for it */
    ssize_t result = real.send(fd, buffer, size, native);
    return result >= 0 ? result : not_sent(sock, fd, size, flags, saved);
}

/* A sandbox knows the calls that the program makes: no other takes their place there. */
static bool as_called(const struct sock *sock)
{
    return sandbox_closed && !sock_is_slow(sock, SLOW_CONNECTING | SLOW_MOVER);
}

ssize_t data_write(struct sock *sock, int fd, const void *buffer, size_t size)
{
    if (as_called(sock))
        return real.write(fd, buffer, size);
    int saved = errno;
    ssize_t result = data_send(sock, fd, buffer, size, 0);
    if (result >= 0 || errno != ENOTSOCK)
        return result;
    errno = saved;                     /* another file is there, put by a vfork child or where no hook saw it */
    return real.write(fd, buffer, size);
}

static int refuse(int error)
{
    errno = error;
    return -1;
}

int data_takes_address(const struct sockaddr *address, socklen_t length)
{
    if (length > sizeof(struct sockaddr_storage))
        return refuse(EINVAL);
    return memory_reads(address, length) ? 0 : refuse(EFAULT);
}

int data_no_address(socklen_t *length)
{
    if (!memory_takes(length, sizeof *length))
        return refuse(EFAULT);
    if ((int)*length < 0)
        return refuse(EINVAL);
    *length = 0;
    return 0;
}

/* TCP ignores most control messages, but not what is wrong with them: the shadow sends them with nothing. */
static int takes_control(struct sock *sock, const struct msghdr *message)
{
    struct msghdr empty = {.msg_control = message->msg_control, .msg_controllen = message->msg_controllen};
    int saved = errno, shadow = options_connected(sock);
    if (shadow >= 0 && real.sendmsg(shadow, &empty, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EPIPE &&
        errno != ENOTCONN && errno != EAGAIN)
        return -1;
    errno = saved;
    return 0;
}

ssize_t data_sendmsg(struct sock *sock, int fd, const struct msghdr *message, int flags)
{
    if (!memory_reads(message, sizeof *message))
        return refuse(EFAULT);
    struct msghdr copy = *message;
    if (copy.msg_name) {               /* TCP ignores an address */
        if ((int)copy.msg_namelen < 0)
            return refuse(EINVAL);
        if (data_takes_address(copy.msg_name, copy.msg_namelen < sizeof(struct sockaddr_storage)
                                                  ? copy.msg_namelen : sizeof(struct sockaddr_storage)) < 0)
            return -1;
    }
    if (copy.msg_controllen && takes_control(sock, &copy) < 0)
        return -1;
    copy.msg_name = NULL;
    copy.msg_namelen = 0;
    copy.msg_control = NULL;           /* and passes no descriptors */
    copy.msg_controllen = 0;
    return send_message(sock, fd, &copy, flags, false);
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
    int saved = errno;
    ssize_t result = send_message(sock, fd, &message, 0, true);
    if (result < 0 && errno == EMSGSIZE)   /* sendmsg's word for too long a vector */
        errno = EINVAL;
    if (result >= 0 || errno != ENOTSOCK)
        return result;
    errno = saved;                     /* as above */
    return real.writev(fd, vector, count);
}

int data_sendmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    unsigned done = 0;
    int saved = errno;
    for (; done < count && done < IOV_MAX; done++) {
        ssize_t result = memory_takes(&messages[done], sizeof *messages)
                             ? data_sendmsg(sock, fd, &messages[done].msg_hdr, flags) : refuse(EFAULT);
        if (result < 0 && !done)
            return -1;
        if (result < 0)
            break;
        messages[done].msg_len = (unsigned)result;
    }
    errno = saved;
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
        sock_is_over(sock);            /* hang-ups are real from here on */
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
    ssize_t result = received(sock, saved, real.recv(fd, buffer, size, flags));
    return flags & MSG_OOB && result > 0 && !size ? 0 : result;   /* AF_UNIX counts a byte that had no room */
}

/* As the kernel's put_cmsg(): what does not fit is cut, and said to be. */
static void put_control(struct msghdr *out, size_t *used, int level, int type, const void *data, size_t size)
{
    size_t room = out->msg_controllen - *used, whole = CMSG_LEN(size), step = CMSG_SPACE(size);
    struct cmsghdr head = {.cmsg_len = whole, .cmsg_level = level, .cmsg_type = type};
    char *at = (char *)out->msg_control + *used;
    if (!out->msg_control || room < sizeof head) {
        out->msg_flags |= MSG_CTRUNC;
        return;
    }
    if (room < whole) {
        out->msg_flags |= MSG_CTRUNC;
        head.cmsg_len = whole = room;
    }
    if (!memory_takes(at, whole))
        return;
    memcpy(at, &head, sizeof head);
    memcpy(at + sizeof head, data, whole - sizeof head);
    *used += step < room ? step : room;
}

static bool is_set(const struct sock *sock, int level, int name)
{
    const struct sock_option *option = options_find(sock, level, name);
    return option && option->value[0];
}

/* The control messages that TCP has for its readers: when the bytes came, and how many are left. */
static size_t tell(const struct sock *sock, int fd, struct msghdr *out, ssize_t result)
{
    static const int stamps[] = {64, SO_TIMESTAMPNS, 63, SO_TIMESTAMP};   /* the names with 64 bits first */
    size_t used = 0;
    int saved = errno;
    for (size_t i = 0; result > 0 && i < sizeof stamps / sizeof *stamps; i++) {
        if (!is_set(sock, SOL_SOCKET, stamps[i]))
            continue;
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        int64_t words[2] = {now.tv_sec, i < 2 ? now.tv_nsec : now.tv_nsec / 1000};
        put_control(out, &used, SOL_SOCKET, stamps[i], words, sizeof words);
        break;
    }
    if (is_set(sock, IPPROTO_TCP, TCP_INQ)) {
        int left = 0;
        real.ioctl(fd, FIONREAD, &left);
        if (!left && has_ended(fd))
            left = 1;
        put_control(out, &used, IPPROTO_TCP, TCP_INQ, &left, sizeof left);
    }
    errno = saved;
    return used;
}

ssize_t data_recvmsg(struct sock *sock, int fd, struct msghdr *message, int flags)
{
    if (!memory_reads(message, sizeof *message))
        return refuse(EFAULT);
    struct msghdr copy = *message;
    if (copy.msg_name && (int)copy.msg_namelen < 0)
        return refuse(EINVAL);
    if (flags & MSG_ERRQUEUE)
        return refuse(EAGAIN);
    if (sock_is_slow(sock, SLOW_CONNECTING)) {
        if (!may_go_on(fd, flags, SO_RCVTIMEO))
            return -1;
        sock = fdtable_companion(fd);
        if (!sock)
            return real.recvmsg(fd, message, flags);
    }
    copy.msg_name = NULL;
    copy.msg_namelen = 0;
    copy.msg_control = NULL;           /* descriptors that a peer sends are closed by the kernel */
    copy.msg_controllen = 0;
    copy.msg_flags = 0;
    int saved = errno;
    ssize_t result;
    int native = flags | (sock_is_slow(sock, SLOW_SHUT_READ) ? MSG_DONTWAIT : 0);
    if (flags & MSG_TRUNC) {
        size_t size = 0;
        if (copy.msg_iovlen > IOV_MAX)
            return refuse(EMSGSIZE);
        if (!memory_reads(copy.msg_iov, copy.msg_iovlen * sizeof *copy.msg_iov))
            return refuse(EFAULT);
        for (size_t i = 0; i < copy.msg_iovlen; i++) {
            if ((intptr_t)copy.msg_iov[i].iov_base < 0)   /* the kernel's half */
                return refuse(EFAULT);
            size += copy.msg_iov[i].iov_len;
        }
        result = discard(sock, fd, size, native & ~MSG_TRUNC);
    } else {
        result = receive_message(sock, fd, &copy, native);
    }
    result = received(sock, saved, result);
    if (result < 0)
        return result;
    if (!memory_takes(message, sizeof *message))
        return refuse(EFAULT);
    if (message->msg_name)
        message->msg_namelen = 0;
    message->msg_flags = copy.msg_flags & ~MSG_CTRUNC;
    message->msg_controllen = sock->noptions ? tell(sock, fd, message, result) : 0;
    return result;
}

static int64_t nanoseconds(const struct timespec *time)
{
    return time->tv_sec * 1000000000 + time->tv_nsec;
}

int data_recvmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    unsigned done = 0;
    int saved = errno;
    bool once = flags & MSG_WAITFORONE, over = false;
    struct timespec now;
    int64_t end = 0, left = 0;
    if (timeout) {
        if (!memory_reads(timeout, sizeof *timeout))
            return refuse(EFAULT);
        if (timeout->tv_sec < 0 || timeout->tv_nsec < 0 || timeout->tv_nsec >= 1000000000)
            return refuse(EINVAL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        end = timeout->tv_sec > INT32_MAX ? INT64_MAX : nanoseconds(&now) + nanoseconds(timeout);
    }
    for (flags &= ~MSG_WAITFORONE; done < count && done < IOV_MAX && !over; done++) {
        ssize_t result = memory_takes(&messages[done], sizeof *messages)
                             ? data_recvmsg(sock, fd, &messages[done].msg_hdr, flags) : refuse(EFAULT);
        if (result < 0 && !done)
            return -1;
        if (result < 0)
            break;
        messages[done].msg_len = (unsigned)result;
        if (once)
            flags |= MSG_DONTWAIT;
        over = messages[done].msg_hdr.msg_flags & MSG_OOB;
        if (timeout) {                 /* as the kernel: looked at only after a message */
            clock_gettime(CLOCK_MONOTONIC, &now);
            left = end > nanoseconds(&now) ? end - nanoseconds(&now) : 0;
            over |= left == 0;
        }
    }
    if (timeout && done) {
        if (!memory_takes(timeout, sizeof *timeout))
            return refuse(EFAULT);
        *timeout = (struct timespec){left / 1000000000, left % 1000000000};
    }
    errno = saved;
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
