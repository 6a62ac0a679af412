/* Does one thing N times: repeat WHAT N. Used to see what each time costs in system calls. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in loopback(int port)
{
    return (struct sockaddr_in){AF_INET, htons((uint16_t)port), {htonl(INADDR_LOOPBACK)}, {0}};
}

static int listener, client, accepted;
static struct sockaddr_in at;

static void arrange(void)
{
    socklen_t length = sizeof at;
    at = loopback(0);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    bind(listener, (struct sockaddr *)&at, length);
    if (listen(listener, 128) < 0 || getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        exit(2);
}

static void join(void)
{
    client = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(client, (struct sockaddr *)&at, sizeof at) < 0 || (accepted = accept(listener, NULL, NULL)) < 0)
        exit(3);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    char buffer[64] = "x";
    ssize_t ignore;
    struct iovec vector = {buffer, 8};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    struct pollfd wait = {0};
    struct epoll_event event = {.events = EPOLLIN};
    arrange();
    join();
    wait.fd = accepted;
    wait.events = POLLIN;
    int epfd = epoll_create1(0), udp = socket(AF_INET, SOCK_DGRAM, 0), pair[2];
    struct sockaddr_in own = loopback(0);
    socklen_t length = sizeof own;
    bind(udp, (struct sockaddr *)&own, sizeof own);
    getsockname(udp, (struct sockaddr *)&own, &length);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    for (int n = atoi(argv[2]); n > 0; n--) {
        if (strcmp(what, "transfer") == 0) {
            ignore = write(client, buffer, 8);
            ignore = read(accepted, buffer, 8);
            send(accepted, buffer, 8, MSG_NOSIGNAL);
            recv(client, buffer, 8, 0);
            sendmsg(client, &message, 0);
            poll(&wait, 1, 1000);
            recvmsg(accepted, &message, 0);
            epoll_ctl(epfd, EPOLL_CTL_ADD, accepted, &event);
            epoll_wait(epfd, &event, 1, 0);
            epoll_ctl(epfd, EPOLL_CTL_DEL, accepted, &event);
        } else if (strcmp(what, "connect") == 0) {
            join();
            close(client);
            close(accepted);
        } else if (strcmp(what, "names") == 0) {
            int on = 1;
            socklen_t size = sizeof on;
            setsockopt(client, IPPROTO_TCP, 1, &on, sizeof on);
            getsockopt(client, IPPROTO_TCP, 1, &on, &size);
            length = sizeof own;
            getsockname(client, (struct sockaddr *)&own, &length);
            getpeername(accepted, (struct sockaddr *)&own, &length);
            fcntl(client, F_GETFL);
            close(dup(client));
        } else if (strcmp(what, "socket") == 0) {
            int fd = socket(n & 1 ? AF_INET : AF_INET6, SOCK_STREAM, 0);
            close(fd);
        } else if (strcmp(what, "bind") == 0) {
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            own = loopback(0);
            bind(fd, (struct sockaddr *)&own, sizeof own);
            close(fd);
        } else if (strcmp(what, "datagram") == 0) {
            length = sizeof own;
            int fd = socket(AF_INET, SOCK_DGRAM, 0);
            connect(fd, (struct sockaddr *)&own, sizeof own);
            send(fd, buffer, 8, 0);
            recvfrom(udp, buffer, 8, 0, (struct sockaddr *)&(struct sockaddr_in){0}, &length);
            close(fd);
        } else if (strcmp(what, "raw") == 0) {
            int fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
            connect(fd, (struct sockaddr *)&at, sizeof at);
            close(fd);
            fd = socket(AF_INET, SOCK_STREAM, 132);
            close(fd);
        } else if (strcmp(what, "unix") == 0) {
            ignore = write(pair[0], buffer, 8);
            ignore = read(pair[1], buffer, 8);
            int fd = socket(AF_UNIX, SOCK_STREAM, 0);
            listen(fd, 5);
            close(fd);
        }
    }
    (void)ignore;
    return 0;
}
