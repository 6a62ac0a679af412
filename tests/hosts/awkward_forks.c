/* awkward_forks PORT CHILDREN THREADS: threads connect in a loop, each time to another address, so that each connection
 * wants a decision, while the main thread forks; each child connects too. Prints how the connections were carried and
 * how the children ended. */
#include "awkward.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#define PATIENCE 20

static int port;
static _Atomic uint32_t addresses;
static _Atomic bool over;
static _Atomic int san, tcp, wrong;

static uint32_t another_address(void)
{
    uint32_t number = atomic_fetch_add(&addresses, 1) + 2;
    return 127u << 24 | (number & 0x7fffff) << 1 | 1;
}

static void count(char letter)
{
    _Atomic int *which = letter == 'U' ? &san : letter == 'T' ? &tcp : &wrong;
    atomic_fetch_add(which, 1);
}

static void *connect_in_a_loop(void *unused)
{
    (void)unused;
    while (!over)
        count(talk_to(another_address(), port));
    return NULL;
}

int main(int argc, char **argv)
{
    int children = argc > 3 ? atoi(argv[2]) : 0, threads = argc > 3 ? atoi(argv[3]) : 0, ended[3] = {0};
    pthread_t thread[64];
    port = atoi(argv[1]);
    alarm(PATIENCE + (unsigned)children / 4);
    for (int i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, connect_in_a_loop, NULL))
            return 10;
    while (threads && san + tcp < threads)
        usleep(1000);
    for (int i = 0; i < children; i++) {
        pid_t child = fork();
        if (child < 0)
            return 11;
        if (child == 0) {
            char letter = talk_to(another_address(), port);
            _exit(letter == 'U' ? 0 : letter == 'T' ? 1 : 2);
        }
        int status = ended_within(child, PATIENCE);
        if (status < 0 || status > 1)
            SAY("child %d of %d: %d\n", i, children, status);
        ended[status == 0 ? 0 : status == 1 ? 1 : 2]++;
        if (status == 1000)
            break;
    }
    over = true;
    for (int i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    SAY("children: san %d, tcp %d, wrong %d\n", ended[0], ended[1], ended[2]);
    SAY("parent: san %d, tcp %d, wrong %d\n", san, tcp, wrong);
    return 0;
}
