/* signal_host MILLISECONDS: four threads connect, accept, juggle descriptors and move bytes, each interrupted a
 * thousand times a second by a handler that makes socket calls of its own, also on the socket that the thread is at
 * work on, and forks now and then, the child using its sockets at once. Plain C that knows nothing of the switch:
 * preloaded, or linked with it by tests/unit/build_c.py. Prints counts and what it found amiss, then waits for the end
 * of its stdin. */
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
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, PERIOD_NS = 1000000, PATIENCE_MS = 10000, END_SECONDS = 30, FORK_EVERY = 40, BEFORE = 4711 };

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* What a thread has, and what its handler has: a listener, a connection and a spare number. */
struct own {
    int work[2];
    struct sockaddr_in at;
    int listener, pair[2], spare;
    unsigned turn;
    _Atomic int current;               /* what the thread is working on */
    _Atomic bool ended;
    _Atomic unsigned long rounds;
};

static struct own threads[THREADS];
static _Thread_local struct own *mine;
static struct sockaddr_in meeting;
static int meeting_listener;
static _Atomic bool stop;
static _Atomic unsigned long handled, joined, forked;

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

/* T12: a call that succeeds leaves errno alone. */
#define good(call)                                                                                                     \
    ({                                                                                                                 \
        errno = BEFORE;                                                                                                \
        __typeof__(call) result_ = (call);                                                                             \
        if (result_ < 0)                                                                                               \
            amiss("%s", #call);                                                                                        \
        if (errno != BEFORE)                                                                                           \
            amiss("%s changed errno", #call);                                                                          \
        result_;                                                                                                       \
    })

static void ready(int fd, short events)
{
    struct pollfd look = {fd, events, 0};
    int count;
    while ((count = poll(&look, 1, PATIENCE_MS)) < 0 && errno == EINTR)
        ;
    if (count != 1)
        amiss("descriptor %d is not ready for %d", fd, events);
}

static void put(int fd, const void *data, size_t size)
{
    if ((size_t)good(send(fd, data, size, MSG_NOSIGNAL)) != size)
        amiss("send on %d", fd);
}

static void take(int fd, const void *wanted, size_t size)
{
    char bytes[4096];
    for (size_t got = 0; got < size;) {
        ready(fd, POLLIN);
        ssize_t count = good(read(fd, bytes + got, size - got));
        if (count == 0)
            amiss("end of file on %d", fd);
        got += (size_t)count;
    }
    if (memcmp(bytes, wanted, size) != 0)
        amiss("wrong bytes on %d", fd);
}

static void take_end(int fd)
{
    char c;
    ready(fd, POLLIN);
    if (good(recv(fd, &c, 1, 0)) != 0)
        amiss("bytes beyond the last on %d", fd);
}

/* A handler that runs before close() returns may find another thread's descriptor under the number: to the thread
 * sanitizer that is a race. */
static void end(int fd)
{
#ifdef __SANITIZE_THREAD__
    atomic_store(&mine->current, -1);
#endif
    good(close(fd));
}

static int join(const struct sockaddr_in *to, bool blocks)
{
    int fd = good(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (blocks ? 0 : SOCK_NONBLOCK), 0)), error = 0;
    socklen_t length = sizeof error;
    atomic_store(&mine->current, fd);
    int result = connect(fd, (const struct sockaddr *)to, sizeof *to);
    if (result < 0 && !blocks && errno == EINPROGRESS) {
        ready(fd, POLLOUT);
        good(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length));
        errno = error;
        result = error ? -1 : 0;
    }
    if (result < 0)
        amiss("connect");
    if (!blocks)
        good(fcntl(fd, F_SETFL, 0));
    return fd;
}

static int listener(struct sockaddr_in *at)
{
    socklen_t length = sizeof *at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *at = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (struct sockaddr *)at, length) < 0 || listen(fd, 64) < 0 ||
        getsockname(fd, (struct sockaddr *)at, &length) < 0)
        amiss("listen");
    return fd;
}

/* --- the handler: async-signal-safe calls only --- */

static void connect_and_end(unsigned turn)
{
    int fd = good(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    good(connect(fd, (struct sockaddr *)&mine->at, sizeof mine->at));
    int accepted = good(accept(mine->listener, NULL, NULL));
    put(fd, &turn, sizeof turn);
    take(accepted, &turn, sizeof turn);
    good(shutdown(fd, SHUT_WR));
    take_end(accepted);
    good(close(fd));
    good(close(accepted));
    joined++;
}

static void through_copies(unsigned turn)
{
    int copy = good(dup(mine->pair[0]));
    good(dup2(mine->pair[1], mine->spare));
    put(copy, &turn, sizeof turn);
    take(mine->spare, &turn, sizeof turn);
    good(dup2(mine->pair[0], mine->spare));
    good(close(copy));
    if (good(write(mine->spare, &turn, sizeof turn)) != sizeof turn)
        amiss("write");
    take(mine->pair[1], &turn, sizeof turn);
}

/* What the thread works on may be gone by now, or be another thread's: then the calls fail, or change nothing. */
static void on_the_threads_own(void)
{
    int fd = atomic_load(&mine->current), on = 1;
    socklen_t length = sizeof on;
    struct pollfd look = {fd, POLLIN | POLLOUT, 0};
    int copy = dup(fd);
    poll(&look, 1, 0);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, &length);
    if (copy >= 0)
        close(copy);
}

static void fork_here(unsigned turn)
{
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        alarm(PATIENCE_MS / 1000);
        put(mine->pair[1], &turn, sizeof turn);
        take(mine->pair[0], &turn, sizeof turn);
        connect_and_end(turn);
        through_copies(turn);
        put(mine->pair[0], &turn, sizeof turn);
        _exit(0);
    }
    if (child < 0)
        amiss("fork");
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            amiss("waitpid");
    if (status)
        amiss("a child ended with %#x", (unsigned)status);
    take(mine->pair[1], &turn, sizeof turn);
    forked++;
}

static void handler(int number)
{
    int saved = errno;
    unsigned turn = ++mine->turn;
    (void)number;
    handled++;
    if (turn % FORK_EVERY == 0)
        fork_here(turn);
    else if (turn % 3 == 0)
        connect_and_end(turn);
    else if (turn % 3 == 1)
        through_copies(turn);
    else
        on_the_threads_own();
    errno = saved;
}

/* --- the threads --- */

static void connects(struct own *own)
{
    unsigned long round = ++own->rounds;
    bool last = atomic_load(&stop);
    uint64_t message[2] = {round, last};
    int fd = join(&meeting, round % 2);
    put(fd, message, sizeof message);
    take(fd, message, sizeof message);
    end(fd);
    own->ended = last;
}

static void accepts(struct own *own)
{
    uint64_t message[2];
    atomic_store(&own->current, meeting_listener);
    int fd = good(accept(meeting_listener, NULL, NULL));
    atomic_store(&own->current, fd);
    if (good(recv(fd, message, sizeof message, MSG_WAITALL)) != sizeof message)
        amiss("recv");
    put(fd, message, sizeof message);
    take_end(fd);
    end(fd);
    own->rounds++;
    own->ended = message[1];
}

/* What the switch does under a lock it does most often here. */
static void set_options(void)
{
    int fd = good(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)), on = 1;
    atomic_store(&mine->current, fd);
    for (int i = 0; i < 200; i++)
        good(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on));
    end(fd);
}

static void juggles(struct own *own)
{
    struct epoll_event event = {.events = EPOLLIN}, got;
    unsigned long round = ++own->rounds;
    int copy = good(dup(own->work[0])), other = good(fcntl(own->work[1], F_DUPFD_CLOEXEC, 100)), count;
    int epfd = good(epoll_create1(EPOLL_CLOEXEC));
    atomic_store(&own->current, copy);
    put(copy, &round, sizeof round);
    good(epoll_ctl(epfd, EPOLL_CTL_ADD, other, &event));
    while ((count = epoll_wait(epfd, &got, 1, PATIENCE_MS)) < 0 && errno == EINTR)
        ;
    if (count != 1)
        amiss("epoll");
    good(epoll_ctl(epfd, EPOLL_CTL_DEL, other, NULL));
    good(dup2(other, copy));
    take(copy, &round, sizeof round);
    end(copy);
    good(close(other));
    good(close(epfd));
    set_options();
    own->ended = atomic_load(&stop);
}

static void pumps(struct own *own)
{
    unsigned char bytes[4096];
    unsigned long round = ++own->rounds;
    size_t size = 1 + round * 7919 % sizeof bytes;
    for (size_t i = 0; i < size; i++)
        bytes[i] = (unsigned char)(round + i * 31);
    atomic_store(&own->current, own->work[round % 2]);
    put(own->work[0], bytes, size);
    take(own->work[1], bytes, size);
    own->ended = atomic_load(&stop);
}

static void *run(void *argument)
{
    static void (*const bodies[THREADS])(struct own *) = {connects, accepts, juggles, pumps};
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1};
    const struct itimerspec often = {{0, PERIOD_NS}, {0, PERIOD_NS}};
    mine = argument;
    event.sigev_notify_thread_id = gettid();
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) < 0 || timer_settime(timer, 0, &often, NULL) < 0)
        amiss("timer");
    while (!mine->ended)
        bodies[mine - threads](mine);
    timer_delete(timer);
    return NULL;
}

static void couple(struct own *own, int pair[2])
{
    pair[0] = good(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    good(connect(pair[0], (struct sockaddr *)&own->at, sizeof own->at));
    pair[1] = good(accept(own->listener, NULL, NULL));
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

static void go(int milliseconds)
{
    pthread_t ids[THREADS];
    struct timespec end;
    stop = false;
    for (int i = 0; i < THREADS; i++) {
        threads[i].ended = false;
        if (pthread_create(&ids[i], NULL, run, &threads[i]) != 0)
            amiss("pthread_create");
    }
    usleep((unsigned)milliseconds * 1000);
    stop = true;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += END_SECONDS;
    for (int i = 0; i < THREADS; i++)
        if (pthread_timedjoin_np(ids[i], NULL, &end) != 0)
            amiss("thread %d hangs after %lu rounds", i, threads[i].rounds);
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    char c;
    meeting_listener = listener(&meeting);
    for (struct own *own = threads; own < threads + THREADS; own++) {
        own->listener = listener(&own->at);
        couple(own, own->work);
        couple(own, own->pair);
        own->spare = dup(own->pair[0]);
    }
    sigaction(SIGUSR1, &action, NULL);
    go(200);                           /* what is kept for good has been made */
    int before = descriptors();
    go(atoi(argc > 1 ? argv[1] : "1000"));
    int after = descriptors();
    printf("{\"connected\": %lu, \"accepted\": %lu, \"juggled\": %lu, \"pumped\": %lu, \"handled\": %lu, "
           "\"joined\": %lu, \"forked\": %lu, \"before\": %d, \"after\": %d}\n", threads[0].rounds, threads[1].rounds,
           threads[2].rounds, threads[3].rounds, handled, joined, forked, before, after);
    fflush(stdout);
    while (read(0, &c, 1) > 0)
        ;
    return 0;
}
