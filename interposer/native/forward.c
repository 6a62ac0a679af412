/* Owns no state. No call of it waits for a lock or blocks, but for a moment in which the own user's carrier is being
 * filled. Runs after fork, and in signal handlers, where a program may call _exit(). */
#include "forward.h"
#include "clock.h"
#include "common.h"
#include "companion.h"
#include "lifecycle.h"
#include "real.h"
#include "sandbox.h"
#include "switch.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define CARRIER "\0san1/F/"
#define CARRIER_MARK (sizeof CARRIER - 1)
#define FILLED_MS 2                    /* what its sender needs to fill a carrier, if it gets a processor */
#define WORD 'F'                       /* an SCM_RIGHTS message needs a byte */

/* --- the carrier --- */

bool forward_is_carrier(const struct sockaddr_un *name, socklen_t length)
{
    return length >= offsetof(struct sockaddr_un, sun_path) + CARRIER_MARK && memcmp(name->sun_path, CARRIER, CARRIER_MARK) == 0;
}

int forward_carrier(void)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    uint64_t number = (uint64_t)clock_ns(CLOCK_MONOTONIC) << 8 ^ (uint64_t)getpid() << 32;
    char *at = name.sun_path + CARRIER_MARK;
    int fd = real.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    memcpy(name.sun_path, CARRIER, CARRIER_MARK);
    for (int i = 0; i < 16; i++, number >>= 4)
        *at++ = "0123456789abcdef"[number & 15];
    if (fd >= 0 && real.bind(fd, (struct sockaddr *)&name, (socklen_t)(at - (char *)&name)) < 0) {
        real.close(fd);
        return -1;
    }
    return fd;
}

union room {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
};

int forward_send(int carrier, int connection)
{
    char word = WORD;
    union room room = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct iovec part = {&word, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &room, .msg_controllen = sizeof room};
    memcpy(CMSG_DATA(&room.header), &connection, sizeof connection);
    return real.sendmsg(carrier, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

bool forward_receive(int carrier, bool nonblocking, bool cloexec)
{
    char word = 0;
    int fd = -1;
    union room room;
    struct iovec part = {&word, 1};
    /* CMSG_SPACE has room for two. */
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &room, .msg_controllen = CMSG_LEN(sizeof fd)};
    ssize_t got;
    int64_t until = 0;
    do                                 /* the sender's connect() may have given this process its processor */
        got = real.recvmsg(carrier, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EAGAIN && clock_yield(&until, FILLED_MS));
    if (got < 0 && errno == EAGAIN) {  /* from here on either it is there, or the sender gets EPIPE */
        real.shutdown(carrier, SHUT_RDWR);
        got = real.recvmsg(carrier, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    }
    struct cmsghdr *header = got >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    bool good = fd >= 0 && got == 1 && word == WORD && real.fcntl(fd, F_SETFL, nonblocking ? O_NONBLOCK : 0) == 0 &&
                real.dup3(fd, carrier, cloexec ? O_CLOEXEC : 0) >= 0;
    if (fd >= 0)
        real.close(fd);
    if (!good)
        real.close(carrier);
    return good;
}

/* --- who forwards --- */

/* Nobody else serves this companion, but others have the TCP listener. */
static bool goes_on_elsewhere(const struct sock *sock)
{
    return sock->foreign && !common_is_handed_on(sock) && sock->companion_forks == lifecycle_forks() && !sandbox_closed &&
           !lifecycle_borrowed() && getpid() == lifecycle_pid;
}

static void pass_on(struct sock *sock)
{
    for (int i = 0; i < sock->ncompanions; i++)
        if (sock->companions[i].provider->wsp_pass_on)
            sock->companions[i].provider->wsp_pass_on(sock->companions[i].descriptor);
}

void forward_waiting(struct sock *sock)
{
    if (sock->ncompanions && sock_phase(sock) == SOCK_LISTENING && goes_on_elsewhere(sock))
        pass_on(sock);
}

/* Threads that still accept on the listener are TCP's from here on. */
static bool leave(int fd, struct sock *sock, void *context)
{
    (void)fd, (void)context;
    uint8_t listening = SOCK_LISTENING;
    if (sock_phase(sock) == SOCK_LISTENING && goes_on_elsewhere(sock) &&
        atomic_compare_exchange_strong(&sock->phase, &listening, SOCK_TCP))
        pass_on(sock);
    return true;
}

void forward_at_exit(void)
{
    int saved = errno;
    if (lifecycle_active && !fdtable_is_idle() && !switch_guard && !lifecycle_borrowed())
        fdtable_each_held(leave, NULL);
    errno = saved;
}

/* After main() or in exit(). */
__attribute__((destructor)) static void end(void)
{
    forward_at_exit();
}
