/* awkward_syscalls WAIT: a server and its client, in one process, that make every call by libc's syscall(). WAIT says how
 * the server waits for the client: accept, poll, ppoll, select, pselect, epoll. Prints what carries each end, and ends
 * with 0 if every call answered as for TCP, or with the line that did not. */
#include "awkward.h"
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/uio.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            SAY("line %d, errno %d\n", __LINE__, errno);                                                               \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static int is_inet(long number, int fd)
{
    struct sockaddr_in at = {0};
    socklen_t length = sizeof at;
    return syscall(number, fd, &at, &length) == 0 && at.sin_family == AF_INET && ntohl(at.sin_addr.s_addr) == INADDR_LOOPBACK;
}

static int wait_for(const char *how, int listener)
{
    struct pollfd entry = {listener, POLLIN, 0};
    struct timespec limit = {10, 0};
    struct timeval short_limit = {10, 0};
    unsigned long mask = 1ul << (SIGUSR1 - 1);
    struct { const void *bits; size_t size; } with_size = {&mask, sizeof mask};
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 7};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(listener, &set);
    if (strcmp(how, "poll") == 0)
        return syscall(SYS_poll, &entry, 1, 10000) == 1 && entry.revents == POLLIN;
    if (strcmp(how, "ppoll") == 0)
        return syscall(SYS_ppoll, &entry, 1, &limit, &mask, sizeof mask) == 1 && limit.tv_sec <= 9 && limit.tv_nsec;
    if (strcmp(how, "select") == 0)
        return syscall(SYS_select, listener + 1, &set, NULL, NULL, &short_limit) == 1 && FD_ISSET(listener, &set);
    if (strcmp(how, "pselect") == 0)
        return syscall(SYS_pselect6, listener + 1, &set, NULL, NULL, &limit, &with_size) == 1 && FD_ISSET(listener, &set);
    if (strcmp(how, "epoll") == 0) {
        int epfd = (int)syscall(SYS_epoll_create1, 0);
        return syscall(SYS_epoll_ctl, epfd, EPOLL_CTL_ADD, listener, &event) == 0 &&
               syscall(SYS_epoll_wait, epfd, &event, 1, 10000) == 1 && event.data.u64 == 7;
    }
    return 1;
}

int main(int argc, char **argv)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof at;
    int on = 1, value = 0;
    char text[16];
    struct iovec piece = {text, sizeof text};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    alarm(30);
    int listener = (int)syscall(SYS_socket, AF_INET, SOCK_STREAM, 0);
    CHECK(syscall(SYS_setsockopt, listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    CHECK(syscall(SYS_bind, listener, &at, length) == 0 && syscall(SYS_listen, listener, 4) == 0);
    CHECK(syscall(SYS_getsockname, listener, &at, &length) == 0);
    int client = (int)syscall(SYS_socket, AF_INET, SOCK_STREAM, 0);
    CHECK(syscall(SYS_setsockopt, client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    CHECK(syscall(SYS_connect, client, &at, length) == 0);
    CHECK(wait_for(argc > 1 ? argv[1] : "accept", listener));
    int server = (int)syscall(SYS_accept4, listener, NULL, NULL, 0);
    CHECK(server >= 0);
    CHECK(is_inet(SYS_getsockname, client) && is_inet(SYS_getpeername, client));
    CHECK(is_inet(SYS_getsockname, server) && is_inet(SYS_getpeername, server));
    length = sizeof value;
    CHECK(syscall(SYS_getsockopt, client, IPPROTO_TCP, TCP_NODELAY, &value, &length) == 0 && value == 1);
    CHECK(syscall(SYS_getsockopt, server, SOL_SOCKET, SO_DOMAIN, &value, &length) == 0 && value == AF_INET);
    CHECK(syscall(SYS_setsockopt, server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    CHECK(syscall(SYS_sendto, client, "one", 3, 0, &at, sizeof at) == 3);   /* AF_UNIX would say EISCONN */
    CHECK(syscall(SYS_recvfrom, server, text, 16, MSG_TRUNC, NULL, NULL) == 3);
    CHECK(syscall(SYS_write, server, "two", 3) == 3 && syscall(SYS_read, client, text, 16) == 3 && text[0] == 't');
    CHECK(syscall(SYS_writev, server, &piece, 1) == 16 && syscall(SYS_recvmsg, client, &message, 0) == 16);
    CHECK(syscall(SYS_sendmsg, client, &message, 0) == 16 && syscall(SYS_readv, server, &piece, 1) == 16);
    int other = (int)syscall(SYS_fcntl, client, F_DUPFD_CLOEXEC, 50);
    CHECK(other >= 50 && is_inet(SYS_getsockname, other) && syscall(SYS_close, other) == 0);
    SAY("%c%c\n", carrier(client), carrier(server));
    CHECK(syscall(SYS_shutdown, server, SHUT_RD) == 0);   /* AF_UNIX would fail what the peer writes */
    CHECK(syscall(SYS_write, client, "x", 1) == 1);
    CHECK(syscall(SYS_shutdown, client, SHUT_WR) == 0 && syscall(SYS_close, client) == 0 && syscall(SYS_close, server) == 0);
    return 0;
}
