/* stress_host MILLISECONDS [SEED]: sixteen threads connect, accept, duplicate, close, shut down, set options, register
 * in epolls and fork, and verify every byte. Plain C that knows nothing of the switch: preloaded, or linked with it by
 * tests/unit/build_c.py. Prints counts and what it found amiss, then waits for the end of its stdin. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ACCEPTORS = 5, CLIENTS = 6, PUMPS = 2, FORKERS = 2, LISTENERS = 1, THREADS = 16, PATIENCE_MS = 30000 };

struct message {
    uint64_t seed;
    uint32_t length, abandon;
};

extern char **environ;
static _Atomic bool stop, ended;
static _Atomic unsigned long made, served, forked, pumped_in, pumped_out, relistened, turned;
static struct sockaddr_in at[2];       /* a listener that blocks, and one that does not */
static int listener[2], shared_epoll, pump_in[2], pump_out[2];
static _Thread_local uint64_t dice;

#define amiss(...)                                                                                                     \
    do {                                                                                                               \
        int error_ = errno;                                                                                            \
        char text_[256];                                                                                               \
        int size_ = snprintf(text_, sizeof text_, "amiss, line %d: ", __LINE__);                                       \
        size_ += snprintf(text_ + size_, sizeof text_ - (size_t)size_, __VA_ARGS__);                                   \
        size_ += snprintf(text_ + size_, sizeof text_ - (size_t)size_, " (%s)\n", strerror(error_));                   \
        if (write(2, text_, (size_t)size_) < 0)                                                                        \
            abort();                                                                                                   \
        _exit(1);                                                                                                      \
    } while (0)

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static unsigned roll(unsigned sides)
{
    return (unsigned)(next(&dice) >> 33) % sides;
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void wait_ready(int fd, short events)
{
    struct pollfd look = {fd, events, 0};
    int64_t end = now_ms() + PATIENCE_MS;
    while (poll(&look, 1, 1000) <= 0)
        if (now_ms() > end)
            amiss("descriptor %d is not ready for %d", fd, events);
}

/* The same in an epoll of its own, or in one that all threads share. */
static void wait_in_epoll(int fd, uint32_t events)
{
    struct epoll_event event = {.events = events | (roll(2) ? EPOLLONESHOT : 0), .data.fd = fd}, got;
    int epfd = epoll_create1(EPOLL_CLOEXEC), count;
    if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) < 0)
        amiss("epoll_ctl of %d", fd);
    while ((count = epoll_wait(epfd, &got, 1, PATIENCE_MS)) < 0 && errno == EINTR)
        ;
    if (count != 1 || got.data.fd != fd)
        amiss("epoll: %d events of %d", count, fd);
    if (roll(2) && epoll_ctl(epfd, EPOLL_CTL_DEL, fd, NULL) < 0)
        amiss("EPOLL_CTL_DEL of %d", fd);
    close(epfd);
}

/* --- bytes --- */

static void fill(char *buffer, size_t size, uint64_t *state)
{
    for (size_t i = 0; i < size; i++)
        buffer[i] = (char)next(state);
}

static bool send_all(int fd, const void *data, size_t size)
{
    const char *bytes = data;
    while (size) {
        ssize_t done;
        struct iovec parts[2] = {{(void *)bytes, size / 2}, {(void *)(bytes + size / 2), size - size / 2}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        switch (roll(4)) {
        case 0: done = write(fd, bytes, size); break;
        case 1: done = writev(fd, parts, 2); break;
        case 2: done = sendmsg(fd, &message, MSG_NOSIGNAL); break;
        default: done = send(fd, bytes, size, MSG_NOSIGNAL);
        }
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && errno == EAGAIN) {
            wait_ready(fd, POLLOUT);
            continue;
        }
        if (done < 0)
            return false;
        bytes += done;
        size -= (size_t)done;
    }
    return true;
}

/* How many bytes came before the end. */
static size_t receive_all(int fd, void *data, size_t size)
{
    char *bytes = data;
    size_t got = 0;
    while (got < size) {
        ssize_t done;
        size_t left = size - got;
        struct iovec parts[2] = {{bytes + got, left / 2}, {bytes + got + left / 2, left - left / 2}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        switch (roll(4)) {
        case 0: done = read(fd, bytes + got, size - got); break;
        case 1: done = readv(fd, parts, 2); break;
        case 2: done = recvmsg(fd, &message, 0); break;
        default: done = recv(fd, bytes + got, size - got, 0);
        }
        if (done < 0 && errno == EINTR)  /* under the listener's SO_RCVTIMEO by any signal */
            continue;
        if (done < 0 && errno == EAGAIN) {
            if (roll(2))
                wait_in_epoll(fd, EPOLLIN);
            else
                wait_ready(fd, POLLIN);
            continue;
        }
        if (done <= 0)
            return got;
        got += (size_t)done;
    }
    return got;
}

static bool send_stream(int fd, uint64_t state, size_t size)
{
    char buffer[8192];
    for (size_t part; size; size -= part) {
        part = size < sizeof buffer ? size : sizeof buffer;
        fill(buffer, part, &state);
        if (!send_all(fd, buffer, part))
            return false;
    }
    return true;
}

/* True: all came. False: the peer ended before. */
static bool receive_stream(int fd, uint64_t state, size_t size)
{
    char buffer[8192], wanted[8192];
    for (size_t part, got; size; size -= part) {
        part = size < sizeof buffer ? size : sizeof buffer;
        got = receive_all(fd, buffer, part);
        fill(wanted, got, &state);
        if (memcmp(buffer, wanted, got) != 0)
            amiss("bytes of another connection, or out of order");
        if (got < part)
            return false;
    }
    return true;
}

static void options(int fd)
{
    int on = 1, size = 65536;
    struct sockaddr_in name;
    struct linger linger = {1, 60};
    socklen_t length = sizeof name;
    switch (roll(9)) {
    case 0: setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); break;
    case 1: setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on); break;
    case 2: setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size); break;
    case 3: length = sizeof on; getsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &on, &length); break;
    case 4: length = sizeof on; getsockopt(fd, SOL_SOCKET, SO_ERROR, &on, &length); break;
    case 5: setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger); break;
    case 6:
        if (getsockname(fd, (struct sockaddr *)&name, &length) < 0 || name.sin_family != AF_INET)
            amiss("getsockname of %d", fd);
        break;
    case 7: fcntl(fd, F_SETFD, FD_CLOEXEC); break;
    default: fcntl(fd, F_SETFL, fcntl(fd, F_GETFL));
    }
}

/* The connection goes on under another number. */
static int move(int fd)
{
    int copy = roll(2) ? dup(fd) : fcntl(fd, F_DUPFD_CLOEXEC, 3 + (int)roll(200));
    if (copy < 0)
        amiss("dup of %d", fd);
    close(fd);
    return copy;
}

/* --- both sides --- */

static void serve(int fd)
{
    struct message message;
    struct sockaddr_in name;
    socklen_t length = sizeof name;
    char c;
    fcntl(fd, F_SETFL, roll(2) ? O_NONBLOCK : 0);
    if (getpeername(fd, (struct sockaddr *)&name, &length) == 0 && name.sin_family != AF_INET)
        amiss("a peer of family %d", name.sin_family);
    if (roll(3) == 0)
        options(fd);
    if (roll(4) == 0)
        fd = move(fd);
    if (receive_all(fd, &message, sizeof message) == sizeof message &&
        receive_stream(fd, message.seed, message.length) && send_stream(fd, ~message.seed, message.length)) {
        shutdown(fd, SHUT_WR);
        while (!message.abandon && receive_all(fd, &c, 1) == 1)
            ;
        served++;
    }
    close(fd);
}

static int join(const struct sockaddr_in *to)
{
    bool blocks = roll(2);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (blocks ? 0 : SOCK_NONBLOCK), 0), error = 0;
    socklen_t length = sizeof error;
    if (fd < 0)
        amiss("socket");
    if (roll(4) == 0)
        options(fd);
    int result = connect(fd, (const struct sockaddr *)to, sizeof *to);
    if (result < 0 && !blocks && errno == EINPROGRESS) {
        if (roll(2))
            wait_in_epoll(fd, EPOLLOUT);
        else
            wait_ready(fd, POLLOUT);
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
        errno = error;
        result = error ? -1 : 0;
    }
    if (result < 0)
        amiss("connect to port %d", ntohs(to->sin_port));
    return fd;
}

static void talk(int fd)
{
    static const uint32_t sizes[] = {1, 17, 600, 4096, 20000, 300000};
    struct message message = {next(&dice), sizes[roll(roll(4) ? 3 : 6)], roll(8) == 0};
    char c;
    if (roll(3) == 0)
        options(fd);
    if (roll(4) == 0)
        fd = move(fd);
    if (roll(10) == 0) {               /* says nothing, or not all */
        if (roll(2))
            send_all(fd, &message, sizeof message);
        shutdown(fd, roll(2) ? SHUT_WR : SHUT_RDWR);   /* close() alone ends nothing while a child has a copy */
        close(fd);
        return;
    }
    if (!send_all(fd, &message, sizeof message) || !send_stream(fd, message.seed, message.length))
        amiss("send");
    if (!message.abandon && roll(2))
        shutdown(fd, SHUT_WR);
    if (!receive_stream(fd, ~message.seed, message.length))
        amiss("the answer is short");
    if (!message.abandon) {
        shutdown(fd, SHUT_WR);
        if (receive_all(fd, &c, 1) != 0)
            amiss("more than the answer");
    }
    close(fd);
    made++;
}

/* --- threads --- */

static void seed(void *argument)
{
    dice = 88172645463325252u + (uint64_t)(uintptr_t)argument * 15485863;
    for (int i = 0; i < 10; i++)
        next(&dice);
}

/* Each takes connections in its own way. */
static void *acceptor(void *argument)
{
    unsigned way = (unsigned)(uintptr_t)argument % ACCEPTORS;
    int from = listener[way != 0], epfd = way == 1 ? shared_epoll : epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | (way == 2 ? EPOLLEXCLUSIVE : 0), .data.fd = from};
    seed(argument);
    if (way > 0 && way < 4 && epoll_ctl(epfd, EPOLL_CTL_ADD, from, &event) < 0 && (way != 1 || errno != EEXIST))
        amiss("epoll_ctl of the listener");
    while (!ended) {
        struct pollfd look = {from, POLLIN, 0};
        if (way == 4 ? poll(&look, 1, 100) <= 0 : way > 0 && epoll_wait(epfd, &event, 1, 100) <= 0)
            continue;
        int fd = way % 2 ? accept(from, NULL, NULL) : accept4(from, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            serve(fd);
        else if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)   /* under SO_RCVTIMEO by any signal */
            amiss("accept");
    }
    if (epfd != shared_epoll)
        close(epfd);
    return NULL;
}

static void *client(void *argument)
{
    seed(argument);
    while (!stop)
        talk(join(&at[roll(2)]));
    return NULL;
}

/* One connection of all: bytes are sent to it and taken from it through duplicates that live for a moment. */
static void *pump(void *argument)
{
    seed(argument);
    char bytes[64] = "";
    while (!stop) {
        int which = (int)roll(2);
        int in = dup(pump_in[which]), out = dup(pump_out[which]);
        ssize_t count = send(in, bytes, 1 + roll(sizeof bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count > 0)
            pumped_in += (unsigned long)count;
        count = recv(out, bytes, 1 + roll(sizeof bytes), MSG_DONTWAIT);
        if (count > 0)
            pumped_out += (unsigned long)count;
        if (roll(8) == 0)
            options(in);
        if (roll(8) == 0) {
            struct epoll_event event = {.events = EPOLLOUT | EPOLLET, .data.fd = in};
            if (epoll_ctl(shared_epoll, EPOLL_CTL_ADD, in, &event) == 0 &&
                epoll_ctl(shared_epoll, EPOLL_CTL_DEL, in, NULL) < 0)
                amiss("EPOLL_CTL_DEL of a duplicate");
        }
        close(in);
        close(out);
    }
    return NULL;
}

static int in_child(unsigned way, int inherited)
{
    alarm(60);
    if (way == 0) {
        talk(join(&at[roll(2)]));
    } else if (way == 1) {
        talk(inherited);
    } else {
        struct pollfd look = {listener[1], POLLIN, 0};
        int fd = poll(&look, 1, 20) > 0 ? accept(listener[1], NULL, NULL) : -1;
        if (fd >= 0)
            serve(fd);
    }
    return 0;
}

static pid_t spawn(void)
{
    char *arguments[] = {(char *)"true", NULL};
    pid_t child;
    if (posix_spawn(&child, "/bin/true", NULL, NULL, arguments, environ) != 0)
        amiss("posix_spawn");
    return child;
}

/* The child has its parent's memory, but its own descriptors: what it closes stays open there. */
static pid_t closing_vfork(void)
{
#ifdef __SANITIZE_THREAD__
    pid_t child = fork();              /* the sanitizer's own end of a process is not for a borrowed memory */
#else
    pid_t child = vfork();
#endif
    if (child == 0) {
        close(listener[0]);
        dup2(listener[1], pump_in[0]);
        _exit(0);
    }
    return child;
}

static void *forker(void *argument)
{
    seed(argument);
    while (!stop) {
        unsigned way = roll(5);
        int status = 0, inherited = way == 1 ? join(&at[roll(2)]) : -1;
        pid_t child = way == 3 ? spawn() : way == 4 ? closing_vfork() : fork();
        if (child == 0)
            _exit(in_child(way, inherited));
        if (child < 0)
            amiss("fork");
        if (inherited >= 0)
            close(inherited);
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
        if (status)
            amiss("a child ended with %#x in way %u", (unsigned)status, way);
        forked++;
    }
    return NULL;
}

/* Listeners that come and go, with connections that nobody accepts any more. */
static void *relisten(void *argument)
{
    seed(argument);
    while (!stop) {
        struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof own;
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, accepted;
        setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&own, length) < 0 || listen(fd, 4) < 0 ||
            getsockname(fd, (struct sockaddr *)&own, &length) < 0)
            amiss("listen");
        int one = join(&own), other = join(&own);
        if ((accepted = accept(fd, NULL, NULL)) < 0 || !send_all(one, "1", 1) || !send_all(other, "2", 1))
            amiss("accept of a listener of its own");
        char c;
        if (receive_all(accepted, &c, 1) != 1 || (c != '1' && c != '2'))
            amiss("a byte");
        if (roll(2))
            shutdown(fd, SHUT_RDWR);
        close(fd);
        if (roll(2)) {                 /* who was left in the backlog is reset; a fork may have put one of them on TCP */
            wait_ready(c == '1' ? other : one, POLLIN | POLLRDHUP);
            turned++;
        }
        close(one);
        close(accepted);
        close(other);
        relistened++;
    }
    return NULL;
}

static void prepare(void)
{
    for (int i = 0; i < 2; i++) {
        socklen_t length = sizeof at[i];
        at[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        listener[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (i ? SOCK_NONBLOCK : 0), 0);
        if (bind(listener[i], (struct sockaddr *)&at[i], length) < 0 || listen(listener[i], 256) < 0 ||
            getsockname(listener[i], (struct sockaddr *)&at[i], &length) < 0)
            amiss("listen");
        pump_in[i] = join(&at[i]);
        wait_ready(listener[i], POLLIN);
        if ((pump_out[i] = accept(listener[i], NULL, NULL)) < 0)
            amiss("accept");
    }
    struct timeval limit = {0, 100000};   /* the blocking acceptor looks for the end now and then */
    setsockopt(listener[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    shared_epoll = epoll_create1(EPOLL_CLOEXEC);
}

static void run(int milliseconds, uintptr_t base)
{
    static void *(*const bodies[])(void *) = {acceptor, client, pump, forker, relisten};
    static const int counts[] = {ACCEPTORS, CLIENTS, PUMPS, FORKERS, LISTENERS};
    pthread_t threads[THREADS];
    int count = 0;
    stop = ended = false;
    for (int kind = 0; kind < 5; kind++)
        for (int i = 0; i < counts[kind]; i++, count++)
            if (pthread_create(&threads[count], NULL, bodies[kind], (void *)(base + (uintptr_t)count)) != 0)
                amiss("pthread_create");
    usleep((unsigned)milliseconds * 1000);
    stop = true;
    while (count > ACCEPTORS)
        pthread_join(threads[--count], NULL);
    ended = true;                      /* the clients need them until then */
    while (count > 0)
        pthread_join(threads[--count], NULL);
    for (int i = 0; i < 2; i++) {
        char bytes[4096];
        ssize_t got;
        while ((got = recv(pump_out[i], bytes, sizeof bytes, MSG_DONTWAIT)) > 0)
            pumped_out += (unsigned long)got;
    }
    if (pumped_in != pumped_out)
        amiss("%lu bytes went into the pump and %lu came out", pumped_in, pumped_out);
}

static int descriptors(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

int main(int argc, char **argv)
{
    int milliseconds = argc > 1 ? atoi(argv[1]) : 1000;
    uintptr_t base = argc > 2 ? (uintptr_t)atol(argv[2]) * 1000 : 1000;
    char c;
    seed((void *)base);
    signal(SIGPIPE, SIG_IGN);
    prepare();
    run(300, base + 100);              /* what is kept for good has been made */
    int before = descriptors();
    run(milliseconds, base);
    int after = descriptors();
    printf("{\"made\": %lu, \"served\": %lu, \"forked\": %lu, \"pumped\": %lu, \"relistened\": %lu, \"turned\": %lu, "
           "\"before\": %d, \"after\": %d}\n", made, served, forked, pumped_in, relistened, turned, before, after);
    fflush(stdout);
    while (read(0, &c, 1) > 0)
        ;
    return 0;
}
