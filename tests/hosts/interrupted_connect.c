/* Connects many times, and at some moment of each a handler asks for the name of the very socket and connects it, too; then
 * a socket that a vfork child has connected. Prints how often the handler saw a name that is not TCP's, took more than a
 * second, or was told what TCP would not tell; how often the connection carried nothing; and whether the child's is one,
 * and whether connect(AF_UNSPEC) ends the recv() of another thread. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 1500

static struct sockaddr_in at = {.sin_family = AF_INET};
static volatile int fd = -1, names, late, odd;

static void handler(int number)
{
    struct sockaddr_storage name;
    struct timespec before, after;
    socklen_t length = sizeof name;
    int saved = errno;
    (void)number;
    clock_gettime(CLOCK_MONOTONIC, &before);
    names += getsockname(fd, (struct sockaddr *)&name, &length) == 0 && name.ss_family != AF_INET;
    length = sizeof name;
    names += getpeername(fd, (struct sockaddr *)&name, &length) == 0 && name.ss_family != AF_INET;
    odd += connect(fd, (struct sockaddr *)&at, sizeof at) < 0 && errno != EALREADY && errno != EISCONN && errno != EBADF;
    clock_gettime(CLOCK_MONOTONIC, &after);
    late += after.tv_sec - before.tv_sec > 1;
    errno = saved;
}

static bool carries(int from, int to)
{
    char c = 0;
    return send(from, "x", 1, MSG_NOSIGNAL) == 1 && recv(to, &c, 1, 0) == 1 && c == 'x';
}

static bool once_by_a_child(int listener)
{
    int joined = socket(AF_INET, SOCK_STREAM, 0);
    pid_t child = vfork();
    if (child == 0)
        _exit(connect(joined, (struct sockaddr *)&at, sizeof at) < 0);
    waitpid(child, NULL, 0);
    bool again = connect(joined, (struct sockaddr *)&at, sizeof at) == 0 || errno != EISCONN;
    int accepted = accept(listener, NULL, NULL);
    struct pollfd look = {listener, POLLIN, 0};
    return !again && carries(joined, accepted) && poll(&look, 1, 0) == 0;
}

static _Atomic int sleeper;

static void *receives(void *unused)
{
    char c;
    sleeper = gettid();
    return recv(fd, &c, 1, 0) <= 0 ? NULL : unused;
}

static bool asleep(void)
{
    char path[64], state = 0;
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", sleeper);
    FILE *file = fopen(path, "re");
    if (file && fscanf(file, "%*d %*s %c", &state) < 1)
        state = 0;
    if (file)
        fclose(file);
    return state == 'S';
}

static bool wakes(int listener)
{
    const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    struct timespec end;
    pthread_t thread;
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0 || accept(listener, NULL, NULL) < 0 ||
        pthread_create(&thread, NULL, receives, &at) != 0)
        return false;
    while (!sleeper || !asleep())
        sched_yield();
    if (connect(fd, &nowhere, sizeof nowhere) < 0)
        return false;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 5;
    return pthread_timedjoin_np(thread, NULL, &end) == 0;
}

int main(void)
{
    const struct itimerval never = {{0, 0}, {0, 0}};
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    int listener = socket(AF_INET, SOCK_STREAM, 0), dead = 0;
    socklen_t length = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, length) < 0 || listen(listener, 16) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        return 1;
    sigaction(SIGALRM, &action, NULL);
    for (int round = 0; round < ROUNDS; round++) {
        int mine = socket(AF_INET, SOCK_STREAM, 0);
        fd = mine;
        setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {0, 1 + round % 150}}, NULL);
        int result = connect(mine, (struct sockaddr *)&at, sizeof at), error = errno;
        setitimer(ITIMER_REAL, &never, NULL);
        fd = -1;
        odd += result < 0 && error != EISCONN && error != EALREADY;
        int accepted = accept(listener, NULL, NULL);
        dead += !carries(mine, accepted);
        close(accepted);
        close(mine);
    }
    bool once = once_by_a_child(listener);
    printf("%d %d %d %d %d %d\n", names, late, odd, dead, once, wakes(listener));
    return 0;
}
