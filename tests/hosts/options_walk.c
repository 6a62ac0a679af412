/* Every socket option by its number, set and read in all ways: one line for each answer, so that two runs can be
 * compared. Both ends of each connection are this process's.
 *
 *   options_walk FAMILY       4 or 6
 *
 * A line is: when, level, number, call, and what came of it. The last line counts the connections that were not TCP's. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define NUMBERS 256
#define ROOM 64
#define UNTOUCHED 4242

static int family, companions;
static char *nowhere;                  /* no memory, but no small number either */
static char *readonly;

static struct {
    int listener, client, accepted;
} now;

static void fail(const char *what)
{
    fprintf(stderr, "options_walk: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int fresh(void)
{
    int fd = socket(family, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

/* False: with that option it cannot. */
static int listen_on(int fd)
{
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return bind(fd, family == AF_INET ? (struct sockaddr *)&four : (struct sockaddr *)&six,
                family == AF_INET ? sizeof four : sizeof six) == 0 && listen(fd, 8) == 0;
}

/* What the kernel has under a descriptor, asked beside all hooks. */
static int true_domain(int fd)
{
    int domain = 0;
    socklen_t length = sizeof domain;
    int (*beside)(int, int, int, void *, socklen_t *) =
        (int (*)(int, int, int, void *, socklen_t *))dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "getsockopt");
    beside(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
    return domain;
}

/* False: with that option there is no connection. */
static int join(void)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    getsockname(now.listener, (struct sockaddr *)&address, &length);
    if (connect(now.client, (struct sockaddr *)&address, length) < 0)
        return 0;
    send(now.client, "x", 1, MSG_NOSIGNAL);   /* TCP_DEFER_ACCEPT and TCP_FASTOPEN_CONNECT want it */
    struct pollfd look = {now.listener, POLLIN, 0};
    if (poll(&look, 1, 2000) != 1)
        return 0;
    now.accepted = accept(now.listener, NULL, NULL);
    if (now.accepted < 0)
        return 0;
    companions += true_domain(now.client) == AF_UNIX && true_domain(now.accepted) == AF_UNIX;
    return 1;
}

static void start(void)
{
    now.listener = fresh();
    now.client = fresh();
    now.accepted = -1;
}

static void end(void)
{
    close(now.accepted);
    close(now.client);
    close(now.listener);
}

static const char *outcome(int result)
{
    if (result < 0)
        return strerrorname_np(errno);
    return errno == UNTOUCHED ? "ok" : "ok, but errno was touched";
}

static void print_value(int fd, int level, int number, const unsigned char *value, socklen_t length)
{
    int word = 0;
    memcpy(&word, value, length < sizeof word ? length : sizeof word);
    printf(" %u:", length);
    if (level == SOL_SOCKET && (number == SO_COOKIE || number == SO_MEMINFO))
        return;                        /* unique; what is queued */
    if (level == SOL_SOCKET && number == SO_INCOMING_CPU) {
        printf("%s", length < 4 ? "" : word < 0 ? "none" : "one");
    } else if (level == IPPROTO_TCP && (number == 24 || number == TCP_CC_INFO)) {
        return;                        /* clocks, counters */
    } else if (level == IPPROTO_TCP && number == TCP_MAXSEG) {
        printf("%s", word > 30000 ? "of the path" : word > 0 ? "least" : "0");
    } else if (level == IPPROTO_TCP && number == TCP_INFO) {   /* state, and the options agreed on */
        printf("%02x", value[0]);
        if (length > 5)
            printf(" %02x", value[5]);
    } else if (level == IPPROTO_IP && number == 52) {   /* IP_PROTOCOL: of TCP the local port */
        struct sockaddr_in6 own;
        socklen_t size = sizeof own;
        getsockname(fd, (struct sockaddr *)&own, &size);
        printf("%s", length < 4 ? "" : word == ntohs(own.sin6_port) ? "the port" : word ? "a number" : "0");
    } else if (level == SOL_SOCKET && number == 28) {
        struct sockaddr_storage peer;
        socklen_t size = sizeof peer;
        getpeername(fd, (struct sockaddr *)&peer, &size);
        printf("%s", memcmp(&peer, value, length) == 0 ? "the peer" : "not the peer");
    } else {
        for (socklen_t i = 0; i < length; i++)
            printf("%02x", value[i]);
    }
}

static void get(const char *when, int fd, int level, int number, int room)
{
    unsigned char value[512];
    socklen_t length = (socklen_t)room;
    memset(value, 0xaa, sizeof value);
    errno = UNTOUCHED;
    int result = getsockopt(fd, level, number, value, &length);
    printf("%s %d %d get %d: %s", when, level, number, room, outcome(result));
    if (result == 0)
        print_value(fd, level, number, value, length);
    for (int i = room < 0 ? 0 : room; i < 512; i++)
        if (value[i] != 0xaa) {
            printf(" WROTE BEYOND at %d", i);
            break;
        }
    putchar('\n');
}

static int set(const char *when, int fd, int level, int number, const void *value, int length)
{
    errno = UNTOUCHED;
    int result = setsockopt(fd, level, number, value, (socklen_t)length);
    printf("%s %d %d set %d: %s\n", when, level, number, length, outcome(result));
    return result;
}

static void wild(const char *when, int fd, int level, int number)
{
    socklen_t length = 4;
    unsigned char value[ROOM] = {0};
    void *const bad[] = {NULL, (void *)16, nowhere, readonly, (void *)-1L};
    for (int i = 0; i < 5; i++) {
        length = 4;
        errno = UNTOUCHED;
        printf("%s %d %d get to wild %d: ", when, level, number, i);
        printf("%s\n", outcome(getsockopt(fd, level, number, bad[i], &length)));
        errno = UNTOUCHED;
        printf("%s %d %d get length wild %d: ", when, level, number, i);
        printf("%s\n", outcome(getsockopt(fd, level, number, value, bad[i])));
        if (bad[i] != readonly) {
            errno = UNTOUCHED;
            printf("%s %d %d set wild %d: ", when, level, number, i);
            printf("%s\n", outcome(setsockopt(fd, level, number, bad[i], 4)));
        }
    }
}

static void everything(const char *when, int fd, int level, int number)
{
    static const int rooms[] = {-1, 0, 1, 3, 4, 8, 16, ROOM, 280};
    static const int values[] = {1, 0, -1, 10};
    unsigned char long_value[ROOM] = {1};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++)
        get(when, fd, level, number, rooms[i]);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        set(when, fd, level, number, &values[i], sizeof values[i]);
        get(when, fd, level, number, ROOM);
    }
    static const int sizes[] = {-1, 0, 1, 3, 8, 16, ROOM};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        set(when, fd, level, number, long_value, sizes[i]);
        get(when, fd, level, number, ROOM);
    }
    wild(when, fd, level, number);
}

/* Set before it matters, read at the end that has it. */
static void carried(int level, int number, int value)
{
    start();
    if (!(level == IPPROTO_TCP && number == TCP_REPAIR) &&   /* connects without a packet */
        set("before connect", now.client, level, number, &value, sizeof value) == 0) {
        if (listen_on(now.listener) && join()) {
            get("after connect", now.client, level, number, ROOM);
            get("at the peer", now.accepted, level, number, ROOM);
        } else {
            printf("before connect %d %d %d: no connection\n", level, number, value);
        }
    }
    end();
    start();
    if (!(level == IPPROTO_TCP && number == TCP_REPAIR) &&
        set("before listen", now.listener, level, number, &value, sizeof value) == 0) {
        if (listen_on(now.listener) && join()) {
            get("after listen", now.listener, level, number, ROOM);
            get("inherited", now.accepted, level, number, ROOM);
        } else {
            printf("before listen %d %d %d: no connection\n", level, number, value);
        }
    }
    end();
    start();
    listen_on(now.listener);
    if (set("listening", now.listener, level, number, &value, sizeof value) == 0 && join())
        get("inherited late", now.accepted, level, number, ROOM);
    end();
}

int main(int argc, char **argv)
{
    static const int levels[] = {SOL_SOCKET, IPPROTO_TCP, IPPROTO_IP, IPPROTO_IPV6, 77};
    if (argc != 2)
        return 64;
    family = argv[1][0] == '6' ? AF_INET6 : AF_INET;
    nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    readonly = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
        for (int number = 0; number < (levels[i] == 77 ? 3 : NUMBERS); number++) {
            start();
            everything("fresh", now.client, levels[i], number);
            end();
            start();
            listen_on(now.listener);
            everything("listener", now.listener, levels[i], number);
            end();
            start();
            listen_on(now.listener);
            if (!join())
                fail("join");
            everything("connected", now.client, levels[i], number);
            everything("accepted", now.accepted, levels[i], number);
            end();
            carried(levels[i], number, 1);
            carried(levels[i], number, 10);
        }
    }
    printf("companions %d\n", companions);
    return 0;
}
