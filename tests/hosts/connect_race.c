/* Two threads connect one socket at one moment, many times ("nonblocking": one that does not block); or, with "copies", one
 * connects it while the other makes and closes copies of it. Prints how often not exactly one of them connected, or both
 * were told of it at once, how often the listener got another number
 * of connections than one, and how often the socket, or the last copy, carried nothing afterwards. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define ROUNDS 300

static pthread_barrier_t line;
static struct sockaddr_in at = {.sin_family = AF_INET};
static int fd, copy, results[2];
static _Atomic bool connected;

static void *join(void *which)
{
    pthread_barrier_wait(&line);
    results[(uintptr_t)which] = connect(fd, (struct sockaddr *)&at, sizeof at);
    return NULL;
}

static void *connects(void *unused)
{
    join(unused);
    connected = true;
    return NULL;
}

static void *copies(void *unused)
{
    pthread_barrier_wait(&line);
    while (!connected) {
        close(copy);
        copy = dup(fd);
    }
    results[1] = -1;
    return unused;
}

static bool carries(int from, int to)
{
    char c = 0;
    return send(from, "x", 1, MSG_NOSIGNAL) == 1 && recv(to, &c, 1, 0) == 1 && c == 'x';
}

int main(int argc, char **argv)
{
    void *(*const join_twice[2])(void *) = {join, join}, *(*const join_and_copy[2])(void *) = {connects, copies};
    bool nonblocking = argc > 1 && *argv[1] == 'n';
    void *(*const *bodies)(void *) = argc > 1 && !nonblocking ? join_and_copy : join_twice;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), odd = 0, extra = 0, dead = 0;
    socklen_t length = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, length) < 0 || listen(listener, 16) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        return 1;
    pthread_barrier_init(&line, NULL, 2);
    for (int round = 0; round < (nonblocking ? 10 * ROUNDS : ROUNDS); round++) {
        pthread_t threads[2];
        fd = socket(AF_INET, SOCK_STREAM | (nonblocking ? SOCK_NONBLOCK : 0), 0);
        copy = dup(fd);
        connected = false;
        for (uintptr_t i = 0; i < 2; i++)
            pthread_create(&threads[i], NULL, bodies[i], (void *)i);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        odd += nonblocking ? results[0] + results[1] == 0 : (results[0] == 0) == (results[1] == 0);
        struct pollfd look = {listener, POLLIN, 0};
        int accepted = poll(&look, 1, 5000) == 1 ? accept(listener, NULL, NULL) : -1;
        dead += !carries(fd, accepted) || !carries(copy, accepted);
        extra += poll(&look, 1, 0) != 0;
        close(accepted);
        close(copy);
        close(fd);
    }
    printf("%d %d %d\n", odd, extra, dead);
    return 0;
}
