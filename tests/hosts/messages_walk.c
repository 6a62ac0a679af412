/* The calls that move data, with every odd argument: one line for each answer, so that two runs can be compared. Both ends
 * of each connection are this process's. The last line counts the connections that were not TCP's. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define UNTOUCHED 4242

static int companions, client, accepted, listener;
static char *nowhere, *readonly;
static volatile sig_atomic_t urgent, pipes;
static struct sockaddr_in address;

static void count_signal(int number)
{
    if (number == SIGURG)
        urgent++;
    else
        pipes++;
}

static void show(const char *what, long result)
{
    int error = errno;
    printf("%s: %ld", what, result);
    if (result < 0)
        printf(" %s", strerrorname_np(error));
    else if (error != UNTOUCHED)
        printf(", but errno was touched (%d)", error);
    if (pipes)
        printf(" with SIGPIPE");
    pipes = 0;
    putchar('\n');
}

#define SHOW(what, call)                                                                                               \
    do {                                                                                                               \
        errno = UNTOUCHED;                                                                                             \
        show(what, (long)(call));                                                                                      \
    } while (0)

static int true_domain(int fd)
{
    int domain = 0;
    socklen_t length = sizeof domain;
    int (*beside)(int, int, int, void *, socklen_t *) =
        (int (*)(int, int, int, void *, socklen_t *))dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "getsockopt");
    beside(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
    return domain;
}

static void open_listener(void)
{
    socklen_t length = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 8) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) < 0)
        exit(1);
}

static void took(void)
{
    accepted = accept(listener, NULL, NULL);
    companions += true_domain(client) == AF_UNIX && true_domain(accepted) == AF_UNIX;
}

static void open_pair(void)
{
    client = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(client, (struct sockaddr *)&address, sizeof address) < 0)
        exit(2);
    took();
}

static void close_pair(void)
{
    close(client);
    close(accepted);
}

/* Until `size` bytes, or the end, can be read. */
static void arrive(int fd, int size)
{
    struct pollfd look = {fd, POLLIN | POLLRDHUP, 0};
    for (int there = 0, i = 0; i < 2000 && there < size; i++) {
        poll(&look, 1, 1);
        if (look.revents & (POLLRDHUP | POLLERR | POLLHUP) || ioctl(fd, FIONREAD, &there) < 0)
            return;
    }
}

static void drain(int fd)
{
    char buffer[4096];
    int saved = errno;
    usleep(2000);
    while (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) > 0)
        ;
    errno = saved;
}

/* --- addresses, headers, vectors --- */

static void sending(void)
{
    void *const bad[] = {(void *)16, nowhere, (void *)-1L};
    struct sockaddr_in other = {.sin_family = AF_INET, .sin_port = 7, .sin_addr.s_addr = htonl(0xc0000207)};
    static const int lengths[] = {-1, 0, 1, 16, 128, 129, 1000};
    char control[CMSG_SPACE(sizeof(int))] = {0}, large[300] = {0};
    struct iovec part = {"abc", 3};
    struct msghdr message;
    open_pair();
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        SHOW("sendto with an address", sendto(client, "abc", 3, 0, (void *)large, (socklen_t)lengths[i]));
        SHOW("sendto with no address", sendto(client, "abc", 3, 0, NULL, (socklen_t)lengths[i]));
        message = (struct msghdr){.msg_name = large, .msg_namelen = (socklen_t)lengths[i], .msg_iov = &part, .msg_iovlen = 1};
        SHOW("sendmsg with an address", sendmsg(client, &message, 0));
    }
    SHOW("sendto elsewhere", sendto(client, "abc", 3, 0, (void *)&other, sizeof other));
    for (int i = 0; i < 3; i++) {
        SHOW("sendto to nowhere", sendto(client, "abc", 3, 0, bad[i], 16));
        SHOW("send nothing", send(client, bad[i], 3, 0));
        SHOW("write nothing", write(client, bad[i], 3));
        SHOW("send none", send(client, bad[i], 0, 0));
        SHOW("sendmsg none", sendmsg(client, bad[i], 0));
        SHOW("sendmmsg none", sendmmsg(client, bad[i], 1, 0));
        SHOW("writev none", writev(client, bad[i], 1));
        message = (struct msghdr){.msg_name = bad[i], .msg_namelen = 16, .msg_iov = &part, .msg_iovlen = 1};
        SHOW("sendmsg to nowhere", sendmsg(client, &message, 0));
        message = (struct msghdr){.msg_iov = bad[i], .msg_iovlen = 1};
        SHOW("sendmsg of no vector", sendmsg(client, &message, 0));
        message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1, .msg_control = bad[i], .msg_controllen = 24};
        SHOW("sendmsg with no control", sendmsg(client, &message, 0));
        struct iovec wild = {bad[i], 3};
        SHOW("writev of nothing", writev(client, &wild, 1));
    }
    static const size_t counts[] = {0, 1024, 1025, (size_t)-1};
    for (int i = 0; i < 4; i++) {
        message = (struct msghdr){.msg_iov = i == 1 ? NULL : &part, .msg_iovlen = counts[i]};
        SHOW("sendmsg of a long vector", sendmsg(client, &message, 0));
        SHOW("writev of a long vector", writev(client, i == 1 ? NULL : &part, (int)counts[i]));
    }
    struct iovec too_much[2] = {{large, (size_t)-1}, {large, 1}};
    SHOW("writev of too much", writev(client, too_much, 2));
    message = (struct msghdr){.msg_iov = too_much, .msg_iovlen = 2};
    SHOW("sendmsg of too much", sendmsg(client, &message, 0));
    drain(accepted);
    struct cmsghdr *head = (struct cmsghdr *)(void *)control;
    for (int type = 0; type < 84; type++) {
        *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = type};
        message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        if (type != SO_TIMESTAMPING && type != SO_TIMESTAMP && type != SO_TIMESTAMPNS) {
            printf("%d ", type);
            SHOW("sendmsg with control", sendmsg(client, &message, 0));
        }
    }
    for (int size = 0; size <= 24; size += 4) {
        *head = (struct cmsghdr){.cmsg_len = (size_t)size, .cmsg_level = IPPROTO_IP, .cmsg_type = 1};
        message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        SHOW("sendmsg with short control", sendmsg(client, &message, 0));
        message.msg_controllen = (size_t)size;
        SHOW("sendmsg with little control", sendmsg(client, &message, 0));
    }
    message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1, .msg_control = large, .msg_controllen = (size_t)-1};
    SHOW("sendmsg with much control", sendmsg(client, &message, 0));
    drain(accepted);
    close_pair();
}

static void show_header(const struct msghdr *message)
{
    printf("  name %u, control %zu, flags %#x\n", message->msg_namelen, message->msg_controllen, (unsigned)message->msg_flags);
}

static void receiving(void)
{
    void *const bad[] = {(void *)16, nowhere, (void *)-1L, readonly};
    char buffer[64], name[128], control[64];
    struct iovec part = {buffer, 2};
    struct msghdr message;
    open_pair();
    for (int length = -1; length < 40; length += 13) {
        socklen_t out = (socklen_t)length;
        send(client, "0123456789", 10, 0);
        arrive(accepted, 10);
        memset(name, 0xaa, sizeof name);
        SHOW("recvfrom", recvfrom(accepted, buffer, 2, 0, (void *)name, &out));
        printf("  %d, %02x\n", (int)out, (unsigned char)name[0]);
        out = (socklen_t)length;
        SHOW("recvfrom without an address", recvfrom(accepted, buffer, 2, 0, NULL, &out));
        printf("  %d\n", (int)out);
        for (int offered = 0; offered < 2; offered++) {
            message = (struct msghdr){.msg_name = offered ? name : NULL, .msg_namelen = (socklen_t)length, .msg_iov = &part,
                                      .msg_iovlen = 1, .msg_control = offered ? control : NULL,
                                      .msg_controllen = length < 0 ? 0 : (size_t)length, .msg_flags = 0x7777};
            SHOW("recvmsg", recvmsg(accepted, &message, 0));
            show_header(&message);
        }
        drain(accepted);
    }
    for (int i = 0; i < 4; i++) {
        send(client, "0123456789abcdefghij", 20, 0);
        arrive(accepted, 20);
        SHOW("recvfrom to nowhere", recvfrom(accepted, buffer, 2, 0, (void *)name, bad[i]));
        socklen_t out = 16;
        SHOW("recvfrom with no address", recvfrom(accepted, buffer, 2, 0, bad[i], &out));
        printf("  %d\n", (int)out);
        SHOW("recv to nowhere", recv(accepted, bad[i], 2, 0));
        SHOW("read to nowhere", read(accepted, bad[i], 2));
        SHOW("recv none", recv(accepted, bad[i], 0, 0));
        SHOW("recv and discard", recv(accepted, bad[i], 2, MSG_TRUNC));
        SHOW("recvmsg none", recvmsg(accepted, bad[i], MSG_DONTWAIT));
        SHOW("recvmsg errors of none", recvmsg(accepted, bad[i], MSG_ERRQUEUE));
        SHOW("recvmmsg none", recvmmsg(accepted, bad[i], 1, MSG_DONTWAIT, NULL));
        SHOW("readv none", readv(accepted, bad[i], 1));
        message = (struct msghdr){.msg_iov = bad[i], .msg_iovlen = 1};
        SHOW("recvmsg of no vector", recvmsg(accepted, &message, MSG_DONTWAIT));
        SHOW("recvmsg of no vector, discarded", recvmsg(accepted, &message, MSG_DONTWAIT | MSG_TRUNC));
        message = (struct msghdr){.msg_name = bad[i], .msg_namelen = 16, .msg_iov = &part, .msg_iovlen = 1,
                                  .msg_control = bad[i], .msg_controllen = 64};
        SHOW("recvmsg with nothing", recvmsg(accepted, &message, MSG_DONTWAIT));
        show_header(&message);
        struct mmsghdr one = {.msg_hdr = {.msg_iov = &part, .msg_iovlen = 1}};
        SHOW("recvmmsg until never", recvmmsg(accepted, &one, 1, MSG_DONTWAIT, bad[i]));
        drain(accepted);
    }
    static const struct timespec times[] = {{-1, 0}, {0, -1}, {0, 1000000000}, {0, 0}, {1, 0}};
    for (int i = 0; i < 5; i++) {
        struct mmsghdr two[2] = {{.msg_hdr = {.msg_iov = &part, .msg_iovlen = 1}}, {.msg_hdr = {.msg_iov = &part, .msg_iovlen = 1}}};
        struct timespec until = times[i];
        send(client, "abcdef", 6, 0);
        arrive(accepted, 6);
        SHOW("recvmmsg until", recvmmsg(accepted, two, 2, 0, &until));
        printf("  %u %u, left %d\n", two[0].msg_len, two[1].msg_len, until.tv_sec != times[i].tv_sec);
        SHOW("recvmmsg for one", recvmmsg(accepted, two, 2, MSG_WAITFORONE, NULL));
        SHOW("recvmmsg for more", recvmmsg(accepted, two, 2, MSG_DONTWAIT, NULL));
        drain(accepted);
        SHOW("recvmmsg of none", recvmmsg(accepted, two, 0, 0, NULL));
        SHOW("sendmmsg of none", sendmmsg(accepted, two, 0, 0));
    }
    close_pair();
}

/* --- control messages that TCP sends up --- */

static void told(void)
{
    static const struct {
        int level, name;
    } options[] = {{IPPROTO_TCP, 36}, {SOL_SOCKET, SO_TIMESTAMP}, {SOL_SOCKET, SO_TIMESTAMPNS}, {SOL_SOCKET, 63}, {SOL_SOCKET, 64}, {IPPROTO_IP, IP_PKTINFO}, {IPPROTO_IP, IP_RECVTTL}, {IPPROTO_IP, IP_RECVERR}};
    static const size_t rooms[] = {0, 8, 16, 20, 24, 32, 64, 256};
    for (size_t o = 0; o < sizeof options / sizeof *options; o++) {
        int on = 1;
        open_pair();
        printf("%d %d ", options[o].level, options[o].name);
        SHOW("told", setsockopt(accepted, options[o].level, options[o].name, &on, sizeof on));
        usleep(50000);                 /* the kernel begins to stamp a little later */
        for (int end = 0; end < 2; end++) {
            for (size_t r = 0; r < sizeof rooms / sizeof *rooms; r++) {
                char buffer[64];
                union {
                    char bytes[256];
                    struct cmsghdr first;
                } control;
                struct iovec part = {buffer, 3};
                struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = rooms[r]};
                memset(&control, 0, sizeof control);
                if (!end) {
                    send(client, "0123456789", 10, 0);
                    arrive(accepted, 10);
                }
                SHOW("recvmsg", recvmsg(accepted, &message, MSG_DONTWAIT));
                show_header(&message);
                if (message.msg_controllen >= sizeof control.first) {
                    printf("  %zu %d %d", control.first.cmsg_len, control.first.cmsg_level, control.first.cmsg_type);
                    if (control.first.cmsg_type == 36)
                        printf(" %d", *(int *)(void *)CMSG_DATA(&control.first));
                    else if (control.first.cmsg_len > 24)
                        printf(" %d", labs(*(long *)(void *)CMSG_DATA(&control.first) - time(NULL)) < 10);
                    putchar('\n');
                }
                drain(accepted);
            }
            shutdown(client, SHUT_WR);
            arrive(accepted, 1);
        }
        close_pair();
    }
}

/* --- urgent data --- */

static void urgency(void)
{
    char buffer[16];
    int mark;
    for (int early = 0; early < 2; early++) {
        client = socket(AF_INET, SOCK_STREAM, 0);
        if (early)
            SHOW("owner before connect", fcntl(client, F_SETOWN, getpid()));
        SHOW("connect", connect(client, (struct sockaddr *)&address, sizeof address));
        took();
        if (!early)
            SHOW("owner after connect", fcntl(client, F_SETOWN, getpid()));
        SHOW("owner", fcntl(client, F_GETOWN) == getpid());
        urgent = 0;
        SHOW("send urgent", send(accepted, "xyz", 3, MSG_OOB));
        arrive(client, 2);
        for (int i = 0; i < 1000 && !urgent; i++)
            usleep(1000);
        printf("signals %d\n", (int)urgent);
        SHOW("at mark", ioctl(client, SIOCATMARK, &mark));
        printf("  %d\n", mark);
        SHOW("peek urgent", recv(client, buffer, 1, MSG_OOB | MSG_PEEK));
        SHOW("none urgent", recv(client, buffer, 0, MSG_OOB));
        SHOW("urgent", recv(client, buffer, 4, MSG_OOB));
        SHOW("urgent again", recv(client, buffer, 1, MSG_OOB));
        SHOW("rest", recv(client, buffer, 16, 0));
        SHOW("at mark", ioctl(client, SIOCATMARK, &mark));
        printf("  %d\n", mark);
        SHOW("nothing", recv(client, buffer, 16, MSG_DONTWAIT));
        close_pair();
    }
}

/* --- fast open --- */

static void fast_open(void)
{
    struct iovec parts[2] = {{"one", 3}, {"two", 3}};
    struct mmsghdr two[2];
    for (int i = 0; i < 2; i++)
        two[i] = (struct mmsghdr){.msg_hdr = {.msg_name = &address, .msg_namelen = sizeof address, .msg_iov = &parts[i], .msg_iovlen = 1}};
    client = socket(AF_INET, SOCK_STREAM, 0);
    SHOW("sendmmsg opens", sendmmsg(client, two, 2, MSG_FASTOPEN));
    took();
    arrive(accepted, 3);
    char buffer[16];
    SHOW("recv", recv(accepted, buffer, 16, 0));
    SHOW("sendmsg opens again", sendmsg(client, &two[0].msg_hdr, MSG_FASTOPEN));
    close_pair();
    client = socket(AF_INET, SOCK_STREAM, 0);
    SHOW("sendmsg opens nowhere", sendmsg(client, (void *)nowhere, MSG_FASTOPEN));
    SHOW("sendto opens nowhere", sendto(client, "a", 1, MSG_FASTOPEN, (void *)nowhere, 16));
    SHOW("sendto opens without address", sendto(client, "a", 1, MSG_FASTOPEN, NULL, 0));
    close(client);
}

/* --- files and pipes --- */

static void files(void)
{
    char buffer[64] = "";
    int pipes_ends[2], other[2], file = open("/proc/self/exe", O_RDONLY);
    struct iovec part = {buffer, 5};
    open_pair();
    if (pipe(pipes_ends) < 0 || pipe(other) < 0)
        exit(3);
    send(client, "0123456789", 10, 0);
    arrive(accepted, 10);
    SHOW("preadv2 here", preadv2(accepted, &part, 1, -1, 0));
    SHOW("preadv2 at once", preadv2(accepted, &part, 1, -1, RWF_NOWAIT));
    SHOW("preadv2 of nothing", preadv2(accepted, &part, 1, -1, RWF_NOWAIT));
    SHOW("preadv2 there", preadv2(accepted, &part, 1, 0, 0));
    SHOW("preadv2 with a flag", preadv2(accepted, &part, 1, -1, RWF_APPEND | RWF_NOWAIT));
    SHOW("pwritev2 here", pwritev2(client, &part, 1, -1, 0));
    SHOW("pwritev2 there", pwritev2(client, &part, 1, 0, 0));
    SHOW("preadv", preadv(accepted, &part, 1, 0));
    SHOW("pwrite", pwrite(client, buffer, 1, 0));
    SHOW("sendfile", sendfile(client, file, NULL, 10));
    SHOW("sendfile from a connection", sendfile(file, accepted, NULL, 10));
    off_t wrong = -1;
    SHOW("sendfile from before", sendfile(client, file, &wrong, 10));
    SHOW("sendfile to nowhere", sendfile(client, file, (void *)nowhere, 10));
    SHOW("tee", tee(pipes_ends[0], client, 5, 0));
    arrive(accepted, 15);
    SHOW("splice", splice(accepted, NULL, pipes_ends[1], NULL, 5, 0));
    SHOW("tee from a pipe", tee(pipes_ends[0], other[1], 5, 0));
    SHOW("splice on", splice(pipes_ends[0], NULL, client, NULL, 5, 0));
    SHOW("splice with an offset", splice(accepted, &wrong, pipes_ends[1], NULL, 5, 0));
    SHOW("splice both", splice(accepted, NULL, client, NULL, 5, 0));
    SHOW("vmsplice", vmsplice(client, &part, 1, 0));
    drain(accepted);
    SHOW("seek", lseek(client, 0, SEEK_SET));
    SHOW("truncate", ftruncate(client, 5));
    SHOW("sync", fsync(client));
    SHOW("copy", copy_file_range(file, NULL, client, NULL, 5, 0));
    SHOW("advice", posix_fadvise(client, 0, 0, 0));
    close(pipes_ends[0]), close(pipes_ends[1]), close(other[0]), close(other[1]), close(file);
    close_pair();
}

/* --- pointers to no memory in all the other calls --- */

static void pointers(void)
{
    void *const bad[] = {(void *)16, nowhere, (void *)-1L, readonly};
    struct sockaddr_in name;
    int fresh;
    open_pair();
    for (int i = 0; i < 4; i++) {
        socklen_t length = sizeof name, minus = (socklen_t)-1;
        for (int end = 0; end < 3; end++) {
            int fd = end == 0 ? client : end == 1 ? accepted : listener;
            SHOW("getsockname", getsockname(fd, bad[i], &length));
            SHOW("getsockname length", getsockname(fd, (void *)&name, bad[i]));
            SHOW("getsockname minus", getsockname(fd, (void *)&name, &minus));
            SHOW("getpeername", getpeername(fd, bad[i], &length));
            SHOW("getpeername length", getpeername(fd, (void *)&name, bad[i]));
            SHOW("bind", bind(fd, bad[i], sizeof name));
            SHOW("connect", connect(fd, bad[i], bad[i] == readonly ? 300 : sizeof name));
            SHOW("ioctl FIONREAD", ioctl(fd, FIONREAD, bad[i]));
            SHOW("ioctl FIONBIO", bad[i] == readonly ? -1 : ioctl(fd, FIONBIO, bad[i]));
            SHOW("ioctl SIOCATMARK", ioctl(fd, SIOCATMARK, bad[i]));
            SHOW("ioctl SIOCGIFCONF", ioctl(fd, 0x8912, bad[i]));
            SHOW("fcntl F_GETOWN_EX", fcntl(fd, F_GETOWN_EX, bad[i]));
            SHOW("fcntl F_GETLK", fcntl(fd, F_GETLK, bad[i]));
            SHOW("poll", bad[i] == readonly ? -1 : poll(bad[i], 1, 0));
            SHOW("ppoll", ppoll(bad[i] == readonly ? nowhere : bad[i], 1, NULL, NULL));
            SHOW("select", select(fd + 1, bad[i] == readonly ? nowhere : bad[i], NULL, NULL, NULL));
            int epfd = epoll_create1(0);
            SHOW("epoll_ctl", epoll_ctl(epfd, EPOLL_CTL_ADD, fd, bad[i] == readonly ? nowhere : bad[i]));
            close(epfd);
        }
        fresh = socket(AF_INET, SOCK_STREAM, 0);
        SHOW("connect fresh", connect(fresh, bad[i] == readonly ? nowhere : bad[i], sizeof name));
        SHOW("connect far", connect(fresh, (void *)&address, 300));
        SHOW("connect minus", connect(fresh, (void *)&address, minus));
        SHOW("connect", connect(fresh, (void *)&address, sizeof address));
        SHOW("accept", accept(listener, bad[i], &length));
        close(fresh);
        fresh = socket(AF_INET, SOCK_STREAM, 0);
        SHOW("connect", connect(fresh, (void *)&address, sizeof address));
        SHOW("accept length", accept4(listener, (void *)&name, bad[i], 0));
        close(fresh);
        fresh = socket(AF_INET, SOCK_STREAM, 0);
        SHOW("connect", connect(fresh, (void *)&address, sizeof address));
        SHOW("accept minus", accept(listener, (void *)&name, &minus));
        struct pollfd look = {fresh, POLLRDHUP, 0};
        poll(&look, 1, 2000);
        char byte;
        SHOW("lost", recv(fresh, &byte, 1, 0));
        close(fresh);
    }
    close_pair();
}

/* --- a reset, seen by each way of writing and reading --- */

static void resets(void)
{
    static const char *const ways[] = {"send", "write", "writev", "sendmsg", "send without signal", "recv", "read", "readv", "recvmsg", "getsockopt"};
    for (int way = 0; way < 10; way++) {
        char buffer[8] = "";
        struct iovec part = {buffer, 4};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        open_pair();
        send(client, "unread", 6, 0);
        arrive(accepted, 6);
        close(accepted);
        struct pollfd look = {client, POLLIN, 0};
        poll(&look, 1, 2000);
        for (int turn = 0; turn < 3; turn++) {
            int error = 0;
            socklen_t length = sizeof error;
            switch (way) {
            case 0: SHOW(ways[way], send(client, "a", 1, 0)); break;
            case 1: SHOW(ways[way], write(client, "a", 1)); break;
            case 2: SHOW(ways[way], writev(client, &part, 1)); break;
            case 3: SHOW(ways[way], sendmsg(client, &message, 0)); break;
            case 4: SHOW(ways[way], send(client, "a", 1, MSG_NOSIGNAL)); break;
            case 5: SHOW(ways[way], recv(client, buffer, 1, 0)); break;
            case 6: SHOW(ways[way], read(client, buffer, 1)); break;
            case 7: SHOW(ways[way], readv(client, &part, 1)); break;
            case 8: SHOW(ways[way], recvmsg(client, &message, 0)); break;
            default: SHOW(ways[way], getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &length)); printf("  %d\n", error);
            }
        }
        SHOW("then send", send(client, "a", 1, 0));
        SHOW("then recv", recv(client, buffer, 1, 0));
        close(client);
    }
}

/* --- a thread that is cancelled in a call --- */

static _Atomic int cleaned;

static void clean(void *context)
{
    (void)context;
    cleaned++;
}

static void *blocked(void *which)
{
    char buffer[64];
    struct iovec part = {buffer, sizeof buffer};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    struct mmsghdr many = {.msg_hdr = message};
    struct pollfd look = {client, POLLIN, 0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(listener, &set);
    static char much[1 << 20];
    pthread_cleanup_push(clean, NULL);
    switch ((long)which) {
    case 0: (void)!read(client, buffer, 1); break;
    case 1: recv(client, buffer, 1, 0); break;
    case 2: recvfrom(client, buffer, 1, 0, NULL, NULL); break;
    case 3: recvmsg(client, &message, 0); break;
    case 4: recvmmsg(client, &many, 1, 0, NULL); break;
    case 5: (void)!readv(client, &part, 1); break;
    case 6: accept(listener, NULL, NULL); break;
    case 7: accept4(listener, NULL, NULL, 0); break;
    case 8: poll(&look, 1, -1); break;
    case 9: select(listener + 1, &set, NULL, NULL, NULL); break;
    case 10: look.fd = listener; ppoll(&look, 1, NULL, NULL); break;
    case 11: recv(client, buffer, sizeof buffer, MSG_WAITALL); break;
    case 12: recv(client, NULL, 100, MSG_TRUNC); break;
    case 13: for (;;) send(client, much, sizeof much, 0);
    case 14: for (;;) (void)!write(client, much, sizeof much);
    default: part = (struct iovec){much, sizeof much}; for (;;) sendmsg(client, &message, 0);
    }
    pthread_cleanup_pop(0);
    return NULL;
}

static void cancelled(void)
{
    for (long which = 0; which < 16; which++) {
        pthread_t thread;
        void *result = NULL;
        struct timespec until;
        open_pair();
        cleaned = 0;
        if (pthread_create(&thread, NULL, blocked, (void *)which) != 0)
            exit(4);
        usleep(which > 12 ? 30000 : 5000);
        pthread_cancel(thread);
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 5;
        int error = pthread_timedjoin_np(thread, &result, &until);
        printf("cancel %ld: %d %d %d\n", which, error, result == PTHREAD_CANCELED, cleaned);
        if (error)
            exit(5);
        close_pair();
    }
    open_pair();                       /* and the listener serves as before */
    close_pair();
}

int main(void)
{
    nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    readonly = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    signal(SIGPIPE, count_signal);
    signal(SIGURG, count_signal);
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_listener();
    static const struct {
        const char *name;
        void (*run)(void);
    } parts[] = {{"sending", sending}, {"receiving", receiving}, {"told", told}, {"urgency", urgency}, {"fast open", fast_open},
                 {"files", files}, {"pointers", pointers}, {"resets", resets}, {"cancelled", cancelled}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        printf("-- %s\n", parts[i].name);
        parts[i].run();
    }
    printf("companions %d\n", companions);
    return 0;
}
