/* Sixteen threads make their first socket calls at one moment: each connects to the address in argv[1] (a port) and
 * exchanges a byte. Prints how many succeeded. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define THREADS 16

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

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    at = (struct sockaddr_in){AF_INET, htons((uint16_t)atoi(argc > 1 ? argv[1] : "0")), {htonl(INADDR_LOOPBACK)}, {0}};
    pthread_barrier_init(&line, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, run, NULL);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    printf("%d\n", good);
    return 0;
}
