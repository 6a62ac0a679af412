/* Drives the address table of native/netinfo.c by commands on stdin, one answer line each. It has two providers of its own,
 * which serve what they are told, and is linked with netinfo.c, endpoint.c and real.c only. Runs in a network name space
 * that the test has made. */
#include "lifecycle.h"
#include "netinfo.h"
#include "real.h"
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FOLLOW_MS 4000

_Atomic bool lifecycle_moved;

/* --- the system calls of netinfo.c --- */

static struct real kernel;
static _Atomic unsigned sockets, sends, receives, closes;
static int denied;

static int count_socket(int family, int type, int protocol)
{
    sockets++;
    if (denied && family == AF_NETLINK) {
        errno = denied;
        return -1;
    }
    return kernel.socket(family, type, protocol);
}

static ssize_t count_send(int fd, const void *data, size_t size, int flags)
{
    sends++;
    return kernel.send(fd, data, size, flags);
}

static ssize_t count_recv(int fd, void *data, size_t size, int flags)
{
    receives++;
    return kernel.recv(fd, data, size, flags);
}

static int count_close(int fd)
{
    closes++;
    return kernel.close(fd);
}

/* --- providers --- */

struct served {
    struct subnet within;              /* prefix 255: nothing */
    uint32_t interface;                /* 0: any */
};

static struct served served[2] = {{.within.prefix = 255}, {.within.prefix = 255}};
static char asked[65536];              /* what the first provider was asked */
static bool quiet;                     /* ... unless there are threads */
static void (*during)(void);           /* runs once, inside the next question */

static bool is_within(const struct subnet *wide, const struct endpoint *address)
{
    for (unsigned bit = 0; bit < wide->prefix; bit++)
        if ((wide->address.ip[bit / 8] ^ address->ip[bit / 8]) >> (7 - bit % 8) & 1)
            return false;
    return true;
}

static bool serves(const struct served *mine, const struct subnet *subnet)
{
    void (*run)(void) = during;
    if (run) {
        during = NULL;
        run();
    }
    if (mine->within.prefix == 255 || (mine->interface && mine->interface != subnet->interface))
        return false;
    return is_within(&mine->within, &subnet->address);
}

static bool first_serves(const struct subnet *subnet)
{
    char text[64];
    size_t length = quiet ? sizeof asked : strlen(asked);
    endpoint_text(&subnet->address, text, sizeof text);
    if (length < sizeof asked)
        snprintf(asked + length, sizeof asked - length, " %s/%u@%u", text, subnet->prefix, subnet->interface);
    return serves(&served[0], subnet);
}

static bool second_serves(const struct subnet *subnet)
{
    return serves(&served[1], subnet);
}

static const struct san_provider providers[2] = {{.name = "first", .id = 3, .wsp_serves = first_serves},
                                                 {.name = "second", .id = 31, .wsp_serves = second_serves}};

const struct san_provider *provider_nth(int index)
{
    return index < 2 ? &providers[index] : NULL;
}

/* --- commands --- */

static struct endpoint parse(const char *text)
{
    struct endpoint ep;
    char copy[64], *scope;
    snprintf(copy, sizeof copy, "%s", text);
    scope = strchr(copy, '%');
    if (scope)
        *scope++ = 0;
    endpoint_set_wildcard(&ep, !strchr(copy, ':'));
    ep.port = 80;
    ep.scope = scope ? (uint32_t)atoi(scope) : 0;
    if (inet_pton(strchr(copy, ':') ? AF_INET6 : AF_INET, copy, strchr(copy, ':') ? ep.ip : ep.ip + 12) != 1)
        abort();
    return ep;
}

static double milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static bool served_now(unsigned which, const char *address)
{
    struct endpoint local = parse(address);
    return netinfo_serves(&providers[which], &local);
}

static bool local_now(const char *address)
{
    struct endpoint ep = parse(address), source;
    return netinfo_local(&ep, &source) == 0;
}

/* Bits: the first provider serves the address, it is local, the loopback is up. */
static int look(const char *address)
{
    return served_now(0, address) | local_now(address) << 1 | netinfo_loopback_up() << 2;
}

/* The answers after `command`, and when the last of the questions began that were not answered so: milliseconds after its
 * end. */
static void follow(int want, const char *address, const char *command)
{
    double last = 0, start, now;
    int seen = look(address);
    if (system(command) != 0)
        abort();
    for (start = now = milliseconds(); now - start < FOLLOW_MS; now = milliseconds()) {
        seen = look(address);
        if (seen == want)
            break;
        last = now - start;
        usleep(500);
    }
    printf("%d %.1f\n", seen, last);
}

static char nested_address[64];
static int nested_answer;

static void nest(void)
{
    nested_answer = served_now(0, nested_address);
}

static void nest_fork(void)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        netinfo_after_fork_child();
        unsigned before = sockets;
        bool one = served_now(0, nested_address), two = served_now(0, nested_address);
        _exit(one * 4 + two * 2 + (sockets - before == 1));
    }
    int status;
    waitpid(child, &status, 0);
    nested_answer = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* One more question inside the first one that renews the table, whose age is what the switch wants. */
static void renewal(void)
{
    during = nest;
    sockets = 0;
    for (double end = milliseconds() + FOLLOW_MS; during && milliseconds() < end; usleep(500))
        served_now(0, nested_address);
    printf("%d %u\n", nested_answer, sockets);
}

static _Atomic bool stop;
static _Atomic unsigned wrong, questions;
static struct endpoint yes, no;
static pthread_barrier_t together;

static void *hammer(void *unused)
{
    pthread_barrier_wait(&together);
    while (!stop) {
        wrong += !netinfo_serves(&providers[0], &yes) + netinfo_serves(&providers[0], &no);
        questions++;
        usleep(100);
    }
    return unused;
}

static void rate(unsigned seconds, unsigned threads, const char *in, const char *out)
{
    pthread_t ids[16];
    yes = parse(in);
    no = parse(out);
    stop = false;
    quiet = true;
    wrong = questions = sockets = 0;
    pthread_barrier_init(&together, NULL, threads);
    for (unsigned i = 0; i < threads; i++)
        pthread_create(&ids[i], NULL, hammer, NULL);
    sleep(seconds);
    stop = true;
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    quiet = false;
    printf("%u %u %u\n", questions, wrong, sockets);
}

static void obey(char *line)
{
    char one[64] = "", two[64] = "";
    unsigned number = 0, index = 0, interface = 0;
    int rest = 0;
    if (sscanf(line, "own %u %63s %u %u", &number, one, &index, &interface) == 4) {
        served[number] = (struct served){{.address = parse(one), .prefix = (uint8_t)index}, interface};
        puts("ok");
    } else if (sscanf(line, "serves %u %63s", &number, one) == 2) {
        printf("%d\n", served_now(number, one));
    } else if (sscanf(line, "local %63s", one) == 1) {
        printf("%d\n", local_now(one));
    } else if (strcmp(line, "loopback") == 0) {
        printf("%d\n", netinfo_loopback_up());
    } else if (strcmp(line, "asked") == 0) {
        printf("%s\n", asked);
        *asked = 0;
    } else if (strcmp(line, "calls") == 0) {
        printf("%u %u %u %u\n", sockets, sends, receives, closes);
        sockets = sends = receives = closes = 0;
    } else if (sscanf(line, "deny %u", &number) == 1) {
        denied = (int)number;
        puts("ok");
    } else if (sscanf(line, "follow %u %63s %n", &number, one, &rest) == 2) {
        follow((int)number, one, line + rest);
    } else if (sscanf(line, "nested %63s", nested_address) == 1) {
        during = nest;
        puts("ok");
    } else if (sscanf(line, "fork %63s", nested_address) == 1) {
        during = nest_fork;
        puts("ok");
    } else if (sscanf(line, "renewal %63s", nested_address) == 1) {
        renewal();
    } else if (strcmp(line, "nested") == 0) {
        printf("%d\n", nested_answer);
    } else if (strcmp(line, "leave") == 0) {
        if (unshare(CLONE_NEWNET) != 0)
            abort();
        lifecycle_moved = true;
        puts("ok");
    } else if (sscanf(line, "rate %u %u %63s %63s", &number, &index, one, two) == 4) {
        rate(number, index, one, two);
    } else if (strncmp(line, "sh ", 3) == 0) {
        printf("%d\n", system(line + 3));
    } else {
        abort();
    }
    fflush(stdout);
}

int main(void)
{
    static char line[4096];
    real_resolve();
    kernel = real;
    real.socket = count_socket;
    real.send = count_send;
    real.recv = count_recv;
    real.close = count_close;
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        obey(line);
    }
    return 0;
}
