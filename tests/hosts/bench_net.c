/* Both ends of the measured connections, on 127.0.0.1. Commands come by standard input, each is answered by one line.
 *   bench_net serve PORT           one connection after the other; its first byte says what it is for
 *   bench_net hold PORT            all connections at once, with epoll: sends back what comes
 *   bench_net client PORT          commands: connect COUNT MS | roundtrip MS | stream MS | hold COUNT
 *   bench_net cacheline CPU CPU    nanoseconds for a cache line to go there and back */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SMALL 64
#define LARGE (128 << 10)
#define HELD_MAX 65536

static struct sockaddr_in at = {.sin_family = AF_INET};
static char buffer[LARGE];

static void need(bool good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static bool receive_all(int fd, size_t size)
{
    for (size_t got = 0; got < size;) {
        ssize_t more = read(fd, buffer + got, size - got);
        if (more <= 0)
            return false;
        got += (size_t)more;
    }
    return true;
}

/* --- the server --- */

static int open_listener(void)
{
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    need(bind(fd, (struct sockaddr *)&at, sizeof at) == 0 && listen(fd, 1024) == 0, "listen");
    return fd;
}

static void serve(void)
{
    int listener = open_listener();
    for (;;) {
        char kind;
        int fd = accept(listener, NULL, NULL);
        need(fd >= 0, "accept");
        if (read(fd, &kind, 1) != 1)
            kind = 0;
        if (kind == 'c') {
            need(write(fd, &kind, 1) == 1, "write");
        } else if (kind == 'r') {
            while (receive_all(fd, SMALL))
                need(write(fd, buffer, SMALL) == SMALL, "write");
        } else if (kind == 's') {
            uint64_t total = 0;
            ssize_t got;
            while ((got = read(fd, buffer, sizeof buffer)) > 0)
                total += (uint64_t)got;
            need(write(fd, &total, sizeof total) == sizeof total, "write");
        }
        close(fd);
    }
}

static void serve_many(void)
{
    int listener = open_listener(), epfd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[64];
    epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epfd, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            char byte;
            if (fd == listener) {
                event.data.fd = accept(listener, NULL, NULL);
                need(event.data.fd >= 0, "accept");
                need(epoll_ctl(epfd, EPOLL_CTL_ADD, event.data.fd, &event) == 0, "epoll_ctl");
            } else if (read(fd, &byte, 1) == 1) {
                need(write(fd, &byte, 1) == 1, "write");
            } else {
                close(fd);
            }
        }
    }
}

/* --- the client --- */

static int connect_for(char kind)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    need(fd >= 0, "socket");
    need(connect(fd, (struct sockaddr *)&at, sizeof at) == 0, "connect");
    need(write(fd, &kind, 1) == 1, "write");
    return fd;
}

static const char *congestion_control(int fd)
{
    static char name[17];
    socklen_t length = sizeof name - 1;
    memset(name, 0, sizeof name);
    if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length) < 0)
        strcpy(name, "unknown");
    return name;
}

/* Connections per second, until COUNT or MS is reached; what carries them; how many they were. */
static void measure_connect(int count, int ms)
{
    char byte;
    int made = 0, fd;
    double start = now(), end = start + ms / 1e3, elapsed;
    for (;;) {
        fd = connect_for('c');
        need(read(fd, &byte, 1) == 1, "read");
        if (++made == count || (made % 16 == 0 && now() >= end))
            break;
        close(fd);
    }
    elapsed = now() - start;
    printf("%.3f %s %d\n", made / elapsed, congestion_control(fd), made);
    close(fd);
}

/* Microseconds for a round trip. */
static void measure_round_trip(int ms)
{
    int fd = connect_for('r');
    long count = 0;
    double start = now(), end = start + ms / 1e3;
    do {
        for (int i = 0; i < 64; i++, count++) {
            need(write(fd, buffer, SMALL) == SMALL, "write");
            need(receive_all(fd, SMALL), "read");
        }
    } while (now() < end);
    printf("%.4f %s\n", (now() - start) * 1e6 / (double)count, congestion_control(fd));
    close(fd);
}

/* Bytes per second, until the last one has been read. */
static void measure_stream(int ms)
{
    int fd = connect_for('s');
    uint64_t sent = 0, received = 0;
    double start = now(), end = start + ms / 1e3;
    do {
        for (size_t done = 0; done < LARGE;) {
            ssize_t more = write(fd, buffer + done, LARGE - done);
            need(more > 0, "write");
            done += (size_t)more;
        }
        sent += LARGE;
    } while (now() < end);
    shutdown(fd, SHUT_WR);
    need(read(fd, &received, sizeof received) == sizeof received && received == sent, "the stream's end");
    printf("%.0f %s\n", (double)sent / (now() - start), congestion_control(fd));
    close(fd);
}

/* How many connections are open and carry a byte each way, all of them kept. */
static void hold(int count)
{
    static int held[HELD_MAX];
    static int open;
    int working = 0;
    char byte;
    for (; open < count && open < HELD_MAX; open++) {
        held[open] = connect_for('h');
        need(read(held[open], &byte, 1) == 1, "read");
    }
    for (int i = 0; i < open; i++) {
        char sent = (char)i;
        if (write(held[i], &sent, 1) == 1 && read(held[i], &byte, 1) == 1 && byte == sent)
            working++;
    }
    printf("%d %s\n", working, congestion_control(held[0]));
}

/* --- the machine --- */

#define TURNS 200000

static _Atomic int turn;

static void stay_on(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    need(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

static void take_turns(int mine)
{
    for (int i = 0; i < TURNS; i++) {
        while (atomic_load_explicit(&turn, memory_order_acquire) != mine)
            ;
        atomic_store_explicit(&turn, !mine, memory_order_release);
    }
}

static void *other_side(void *cpu)
{
    stay_on(atoi(cpu));
    take_turns(1);
    return NULL;
}

static void measure_cache_line(char **cpus)
{
    pthread_t thread;
    stay_on(atoi(cpus[0]));
    need(pthread_create(&thread, NULL, other_side, cpus[1]) == 0, "pthread_create");
    double start = now();
    take_turns(0);
    pthread_join(thread, NULL);
    printf("%.1f\n", (now() - start) * 1e9 / TURNS);
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "cacheline") == 0) {
        measure_cache_line(argv + 2);
        return 0;
    }
    const char *role = argc == 3 ? argv[1] : "";
    if (argc == 3)
        at.sin_port = htons((uint16_t)atoi(argv[2]));
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (strcmp(role, "serve") == 0)
        serve();
    if (strcmp(role, "hold") == 0)
        serve_many();
    if (strcmp(role, "client") != 0)
        return 64;
    static char line[64];
    int number, ms;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "connect %d %d", &number, &ms) == 2)
            measure_connect(number, ms);
        else if (sscanf(line, "roundtrip %d", &number) == 1)
            measure_round_trip(number);
        else if (sscanf(line, "stream %d", &number) == 1)
            measure_stream(number);
        else if (sscanf(line, "hold %d", &number) == 1)
            hold(number);
        else
            return 64;
        fflush(stdout);
    }
    return 0;
}
