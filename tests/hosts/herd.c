/* Many who wait at one listener.
 *
 *   herd serve MODE WORKERS CONNECTIONS     prints the port; at the end the workers' context switches, how often one was
 *                                           woken for nothing, and how many connections each of them got
 *   herd ask PORT CONNECTIONS AT_ONCE       so many connections, some at once, a byte there and back on each; then waits for
 *                                           the end of its input
 *
 * MODE says how the workers wait: accept, exclusive, edge, level (processes, each with an epoll of its own), threads (in
 * accept), oneshot, edge-threads (threads at one epoll), mixed (threads in accept, poll and epoll_wait), nested (processes,
 * an epoll in an epoll). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORKERS_MAX 64

struct worker {
    _Atomic int task;
    _Atomic long accepted, vain;
};

static struct shared {
    _Atomic long left;
    struct worker workers[WORKERS_MAX];
} *shared;
static int listener, done[2], epoll = -1;
static const char *mode;

static int is(const char *word)
{
    return strcmp(mode, word) == 0;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* One connection, if there is one. */
static int serve(struct worker *me)
{
    char byte;
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) {
        if (errno != EAGAIN)
            die("accept");
        return 0;
    }
    if (read(fd, &byte, 1) != 1 || write(fd, &byte, 1) != 1)
        die("exchange");
    close(fd);
    me->accepted++;
    if (atomic_fetch_sub(&shared->left, 1) == 1 && write(done[1], "", 1) != 1)
        die("write");
    return 1;
}

static int registered(uint32_t events)
{
    struct epoll_event event = {.events = events};
    int fd = epoll_create1(0);
    if (fd < 0 || epoll_ctl(fd, EPOLL_CTL_ADD, listener, &event) < 0)
        die("epoll_ctl");
    return fd;
}

static void wait_at(int fd)
{
    struct epoll_event event;
    while (epoll_wait(fd, &event, 1, -1) != 1)
        if (errno != EINTR)
            die("epoll_wait");
}

static void work(struct worker *me, int number)
{
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT};
    int own = -1, turn = number % 3;
    me->task = gettid();
    if (is("exclusive"))
        own = registered(EPOLLIN | EPOLLEXCLUSIVE);
    else if (is("edge"))
        own = registered(EPOLLIN | EPOLLET);
    else if (is("level"))
        own = registered(EPOLLIN);
    else if (is("nested")) {
        struct epoll_event event = {.events = EPOLLIN};
        own = epoll_create1(0);
        if (epoll_ctl(own, EPOLL_CTL_ADD, registered(EPOLLIN), &event) < 0)
            die("epoll_ctl");
    }
    for (;;) {
        struct pollfd look = {listener, POLLIN, 0};
        int got;
        if (is("mixed") && turn == 1 && poll(&look, 1, -1) != 1)
            die("poll");
        if (is("mixed") && turn == 2)
            wait_at(epoll);
        if (own >= 0 || is("oneshot") || is("edge-threads"))
            wait_at(own >= 0 ? own : epoll);
        got = serve(me);
        me->vain += !got;
        if (is("edge") || is("edge-threads"))
            while (serve(me))
                ;
        if (is("oneshot") && epoll_ctl(epoll, EPOLL_CTL_MOD, listener, &again) < 0)
            die("epoll_ctl");
    }
}

static void *thread(void *number)
{
    work(&shared->workers[(intptr_t)number], (int)(intptr_t)number);
    return NULL;
}

/* Of both kinds, so far. */
static long switches(int task)
{
    char path[64], line[256];
    long sum = 0, count;
    snprintf(path, sizeof path, "/proc/%d/status", task);   /* a thread has a place there, too, though unlisted */
    FILE *file = fopen(path, "r");
    if (!file)
        die(path);
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "voluntary_ctxt_switches: %ld", &count) == 1 ||
            sscanf(line, "nonvoluntary_ctxt_switches: %ld", &count) == 1)
            sum += count;
    fclose(file);
    return sum;
}

/* Until it sleeps. */
static void settle(int task)
{
    char path[64], state = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", task);
    for (int tries = 0; state != 'S' && tries < 5000; tries++) {
        usleep(1000);
        FILE *file = fopen(path, "r");
        if (!file || fscanf(file, "%*d (%*[^)]) %c", &state) != 1)
            die(path);
        fclose(file);
    }
}

static int server(int workers, long connections)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int threads = is("threads") || is("oneshot") || is("edge-threads") || is("mixed");
    pid_t children[WORKERS_MAX];
    long before = 0, after = 0, vain = 0;
    char byte;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->left = connections;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (pipe(done) < 0 || bind(listener, (struct sockaddr *)&address, length) < 0 || listen(listener, 1024) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) < 0)
        die("listen");
    if (!is("accept") && !is("threads") && !is("mixed"))
        fcntl(listener, F_SETFL, O_NONBLOCK);
    if (is("oneshot"))
        epoll = registered(EPOLLIN | EPOLLONESHOT);
    else if (is("edge-threads"))
        epoll = registered(EPOLLIN | EPOLLET);
    else if (is("mixed"))
        epoll = registered(EPOLLIN);
    for (intptr_t i = 0; i < workers; i++) {
        pthread_t id;
        if (threads && pthread_create(&id, NULL, thread, (void *)i) != 0)
            die("pthread_create");
        children[i] = threads ? 0 : fork();
        if (!threads && children[i] == 0)
            work(&shared->workers[i], (int)i);
    }
    for (int i = 0; i < workers; i++) {
        while (!shared->workers[i].task)
            usleep(1000);
        settle(shared->workers[i].task);
        before += switches(shared->workers[i].task);
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    if (read(done[0], &byte, 1) != 1)
        die("read");
    for (int i = 0; i < workers; i++) {
        if (!is("mixed"))
            settle(shared->workers[i].task);
        after += switches(shared->workers[i].task);
        vain += shared->workers[i].vain;
    }
    printf("%ld %ld", after - before, vain);
    for (int i = 0; i < workers; i++)
        printf(" %ld", shared->workers[i].accepted);
    printf("\n");
    fflush(stdout);
    for (int i = 0; i < workers && !threads; i++)
        kill(children[i], SIGKILL);
    return 0;
}

static int client(int port, long connections, long at_once)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port)};
    int fds[64];
    char byte = 'x';
    for (long made = 0; made < connections; made += at_once) {
        for (long i = 0; i < at_once; i++) {
            fds[i] = socket(AF_INET, SOCK_STREAM, 0);
            if (connect(fds[i], (struct sockaddr *)&address, sizeof address) < 0)
                die("connect");
        }
        for (long i = 0; i < at_once; i++)
            if (write(fds[i], &byte, 1) != 1)
                die("write");
        for (long i = 0; i < at_once; i++) {
            if (read(fds[i], &byte, 1) != 1)
                die("read");
            close(fds[i]);
        }
    }
    printf("done\n");
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    mode = argc > 2 ? argv[2] : "";
    if (argc == 5 && strcmp(argv[1], "serve") == 0)
        return server(atoi(argv[3]), atol(argv[4]));
    if (argc == 5 && strcmp(argv[1], "ask") == 0)
        return client(atoi(argv[2]), atol(argv[3]), atol(argv[4]));
    return 64;
}
