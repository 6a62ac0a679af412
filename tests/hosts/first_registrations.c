/* In each of many children two threads register a listener with an epoll each, at one moment, the first registrations of their
 * process. Prints how many listeners have a companion then. */
#include <arpa/inet.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILDREN = 100, THREADS = 2 };

static int listener;
static pthread_barrier_t line;

static void *add(void *unused)
{
    struct epoll_event event = {.events = EPOLLIN};
    int epfd = epoll_create1(EPOLL_CLOEXEC);
    pthread_barrier_wait(&line);
    return epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event) < 0 ? &line : unused;
}

static int has_companion(in_port_t port)
{
    struct sockaddr_un name = {AF_UNIX, ""};
    int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "san1/L/127.0.0.1:%d/0", ntohs(port));
    return connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&name,
                   (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) == 0;
}

static int child(void)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof at;
    pthread_t threads[THREADS];
    void *error = NULL;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 8) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        return 0;
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, add, NULL);
    for (int i = 0; i < THREADS && !error; i++)
        pthread_join(threads[i], &error);
    return !error && has_companion(at.sin_port);
}

int main(void)
{
    int good = 0, status;
    pthread_barrier_init(&line, NULL, THREADS);
    for (int i = 0; i < CHILDREN; i++) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(child());
        good += waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 1;
    }
    printf("%d\n", good);
    return 0;
}
