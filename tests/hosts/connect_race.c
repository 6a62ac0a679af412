/* Two threads connect one socket at one moment, many times ("nonblocking": one that does not block); or, with "copies", one
 * connects it while the other makes and closes copies of it, or with "ends", while the other closes it and opens a file under
 * its number. Prints how often not exactly one of them connected, or both
 * were told of it at once, how often the listener got another number
 * of connections than one, and how often the socket, or the last copy, carried nothing afterwards, had
 * no end, or had taken the file's number. */
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
#include <sys/stat.h>
#include <time.h>
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

static void *passing_copies(void *unused)
{
    pthread_barrier_wait(&line);
    while (!connected)
        close(dup(fd));
    results[1] = -1;
    return unused;
}

static void *ends(void *after)
{
    struct timespec moment = {0, (intptr_t)after};
    pthread_barrier_wait(&line);
    nanosleep(&moment, NULL);
    close(fd);
    results[1] = open("/dev/null", O_RDWR | O_CLOEXEC);
    return NULL;
}

/* How often the number of a socket that was closed while it connected shows another file than was opened since. */
static int reused(int listener)
{
    int wrong = 0, accepted;
    for (uintptr_t round = 0; round < 2 * ROUNDS; round++) {
        pthread_t threads[2];
        struct stat file;
        fd = socket(AF_INET, SOCK_STREAM, 0);
        pthread_create(&threads[0], NULL, join, NULL);
        pthread_create(&threads[1], NULL, ends, (void *)(round % 100 * 1000));
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        wrong += fstat(results[1], &file) < 0 || !S_ISCHR(file.st_mode);
        close(results[1]);
        while ((accepted = accept(listener, NULL, NULL)) >= 0)
            close(accepted);
    }
    return wrong;
}

static bool ended(int peer)
{
    struct pollfd look = {peer, POLLIN, 0};
    char c;
    return poll(&look, 1, 5000) == 1 && recv(peer, &c, 1, 0) == 0;
}

static bool carries(int from, int to)
{
    char c = 0;
    return send(from, "x", 1, MSG_NOSIGNAL) == 1 && recv(to, &c, 1, 0) == 1 && c == 'x';
}

int main(int argc, char **argv)
{
    char mode = argc > 1 ? *argv[1] : 0;
    bool nonblocking = mode == 'n', passing = mode == 'p';
    void *(*const bodies[2])(void *) = {mode == 'c' || passing ? connects : join,
                                        mode == 'c' ? copies : passing ? passing_copies : join};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), odd = 0, extra = 0, dead = 0;
    socklen_t length = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, length) < 0 || listen(listener, 16) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        return 1;
    pthread_barrier_init(&line, NULL, 2);
    dead = mode == 'e' ? reused(listener) : 0;
    for (int round = 0; round < (nonblocking ? 10 * ROUNDS : ROUNDS); round++) {
        pthread_t threads[2];
        fd = socket(AF_INET, SOCK_STREAM | (nonblocking ? SOCK_NONBLOCK : 0), 0);
        copy = passing ? -1 : dup(fd);
        connected = false;
        for (uintptr_t i = 0; i < 2; i++)
            pthread_create(&threads[i], NULL, bodies[i], (void *)i);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        odd += nonblocking ? results[0] + results[1] == 0 : (results[0] == 0) == (results[1] == 0);
        struct pollfd look = {listener, POLLIN, 0};
        int accepted = poll(&look, 1, 5000) == 1 ? accept(listener, NULL, NULL) : -1;
        dead += !carries(fd, accepted) || (!passing && !carries(copy, accepted));
        extra += poll(&look, 1, 0) != 0;
        close(copy);
        close(fd);
        dead += !ended(accepted);
        close(accepted);
    }
    printf("%d %d %d\n", odd, extra, dead);
    return 0;
}
