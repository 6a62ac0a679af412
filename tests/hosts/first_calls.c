/* Threads make their first calls at one moment: with a port as argument sixteen connect to it and exchange a byte, and
 * the number that succeeded is printed; without one there is a thread for each call, and those that did not do what
 * they should are printed. */
#include "each_call.h"
#include <pthread.h>
#include <stdatomic.h>

enum { THREADS = 16 };

static pthread_barrier_t line;
static _Atomic int good;
static struct sockaddr_in at;

static void *run(void *unused)
{
    (void)unused;
    char c = '?';
    pthread_barrier_wait(&line);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof at) == 0 && write(fd, &c, 1) == 1 && read(fd, &c, 1) == 1 &&
        c == 'x' && close(fd) == 0)
        good++;
    return NULL;
}

static void *make_one(void *argument)
{
    const struct each *each = argument;
    pthread_barrier_wait(&line);
    return (void *)(each->call() ? NULL : each->name);
}

static void each_in_a_thread(void)
{
    pthread_t threads[EACH_COUNT];
    void *bad;
    pthread_barrier_init(&line, NULL, EACH_COUNT);
    for (int i = 0; i < EACH_COUNT; i++)
        pthread_create(&threads[i], NULL, make_one, (void *)&each_call[i]);
    for (int i = 0; i < EACH_COUNT; i++)
        if (pthread_join(threads[i], &bad) == 0 && bad)
            puts(bad);
    printf("%d\n", EACH_COUNT);
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    if (argc < 2) {
        each_in_a_thread();
        return 0;
    }
    at = (struct sockaddr_in){AF_INET, htons((uint16_t)atoi(argv[1])), {htonl(INADDR_LOOPBACK)}, {0}};
    pthread_barrier_init(&line, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, run, NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    printf("%d\n", good);
    return 0;
}
