/* Connects to itself, listens and polls while its address space cannot grow: no_memory ROUNDS SPARE. Keeps every second
 * connection. Prints how many rounds worked, and how many descriptors there are more than the program has. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define check(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("round %d: %s: %s\n", rounds, #condition, strerrorname_np(errno));                                  \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static int descriptors(DIR *directory)
{
    int count = 0;
    rewinddir(directory);
    while (readdir(directory))
        count++;
    return count;
}

int main(int argc, char **argv)
{
    int rounds = 0, wanted = argc > 1 ? atoi(argv[1]) : 0, kept = 0;
    long pages = 0, spare = argc > 2 ? atol(argv[2]) : 0;
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    check(bind(listener, (struct sockaddr *)&at, length) == 0 && listen(listener, 16) == 0);
    check(getsockname(listener, (struct sockaddr *)&at, &length) == 0);
    DIR *directory = opendir("/proc/self/fd");
    int before = descriptors(directory);
    puts("begins");
    fflush(stdout);
    FILE *file = fopen("/proc/self/statm", "r");
    check(fscanf(file, "%ld", &pages) == 1);
    fclose(file);
    rlim_t size = (rlim_t)(pages * sysconf(_SC_PAGESIZE) + spare);
    check(setrlimit(RLIMIT_AS, &(struct rlimit){size, size}) == 0);
    for (; rounds < wanted; rounds++) {
        errno = 0;
        int client = socket(AF_INET, SOCK_STREAM, 0);
        check(client >= 0 && errno == 0);
        check(connect(client, (struct sockaddr *)&at, sizeof at) == 0);
        int accepted = accept(listener, NULL, NULL);
        check(accepted >= 0);
        char c = 'a';
        check(send(client, &c, 1, 0) == 1 && recv(accepted, &c, 1, 0) == 1);
        check(send(accepted, &c, 1, 0) == 1 && recv(client, &c, 1, 0) == 1);
        int other = socket(AF_INET, SOCK_STREAM, 0);
        struct pollfd look = {other, POLLIN, 0};
        check(listen(other, 4) == 0 && poll(&look, 1, 0) == 0);
        close(other);
        if (rounds % 2) {
            kept += 2;
            continue;
        }
        close(client);
        close(accepted);
    }
    printf("%d rounds, %d kept, %d descriptors\n", rounds, kept, descriptors(directory) - before);
    return 0;
}
