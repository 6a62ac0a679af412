/* One thread connects and closes, over and over, while another starts processes in the way that the first argument names.
 * Prints how many of them had another limit of open files than the program. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT 500
#define ROUNDS 300

static struct sockaddr_in at = {.sin_family = AF_INET};
static char *own, *empty[] = {NULL};
static int listener;

static bool is_as_set(void)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur == LIMIT;
}

static void *accepts(void *unused)
{
    for (int fd;; close(fd))
        if ((fd = accept(listener, NULL, NULL)) < 0)
            return unused;
}

static void *connects(void *unused)
{
    for (;;) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0)
            abort();
        close(fd);
    }
    return unused;
}

static int looks(void *arguments)
{
    execve(own, arguments, empty);
    _exit(2);
}

static pid_t begin(const char *way)
{
    static char stack[1 << 16] __attribute__((aligned(16)));
    char *arguments[] = {own, NULL};
    pid_t pid = -1;
    if (strcmp(way, "posix_spawn") == 0)
        return posix_spawn(&pid, own, NULL, NULL, arguments, empty) == 0 ? pid : -1;
    if (strcmp(way, "clone") == 0)
        return clone(looks, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, arguments);
    pid = strcmp(way, "vfork") == 0 ? vfork() : fork();
    if (pid == 0)
        looks(arguments);
    return pid;
}

int main(int count, char **arguments)
{
    pthread_t thread;
    socklen_t length = sizeof at;
    struct rlimit limit;
    int wrong = 0;
    if (count == 1)
        return !is_as_set();
    own = realpath("/proc/self/exe", NULL);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = LIMIT;
    setrlimit(RLIMIT_NOFILE, &limit);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    bind(listener, (struct sockaddr *)&at, length);
    listen(listener, 64);
    getsockname(listener, (struct sockaddr *)&at, &length);
    pthread_create(&thread, NULL, accepts, NULL);
    pthread_create(&thread, NULL, connects, NULL);
    for (int i = 0; i < ROUNDS; i++) {
        int status;
        pid_t pid = begin(arguments[1]);
        if (pid < 0 || waitpid(pid, &status, 0) != pid || (status && status != 1 << 8))
            abort();
        wrong += status != 0;
    }
    printf("%d\n", wrong);
    fflush(stdout);
    _exit(0);
}
