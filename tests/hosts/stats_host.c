/* Drives native/stats.c by commands on stdin, one answer line each: "ok ERRNO" (ERRNO was 77 before), or what the
 * command prints. Linked with stats.c and real.c only. */
#include "real.h"
#include "stats.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

int hidden_fd(int fd)
{
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 500);

    close(fd);
    return moved;
}

void hidden_close(int fd)
{
    close(fd);
}

static char texts[64][STATS_RULE_SIZE];
static uint32_t ntexts;

static size_t rule_text(uint32_t rule, char *out, size_t size)
{
    return (size_t)snprintf(out, size, "%s", texts[rule]);
}

static uint32_t rule_of(const char *text)
{
    for (uint32_t i = 0; i < ntexts; i++)
        if (strcmp(texts[i], text) == 0)
            return i;
    snprintf(texts[ntexts], sizeof texts[ntexts], "%s", text);
    return ntexts++;
}

static int rows[64], nrows;
static pthread_barrier_t barrier;

static void rewrite(void)
{
    for (int i = 0; i < nrows; i++)
        stats_row_set(rows[i], ROW_ACCEPT, AF_INET, 1, 0, NULL, NULL, 0, rule_of("inherited"), rule_text);
}

static struct endpoint endpoint(const char *ip, int port)
{
    struct endpoint ep = {.port = (uint16_t)port};
    struct in_addr v4;

    if (strcmp(ip, "-") == 0)
        return ep;
    if (inet_pton(AF_INET, ip, &v4) == 1) {
        ep.ip[10] = ep.ip[11] = 0xff;
        memcpy(ep.ip + 12, &v4, 4);
    } else {
        inet_pton(AF_INET6, ip, ep.ip);
    }
    return ep;
}

static bool line(char *out, size_t size)
{
    size_t n = 0;

    while (n + 1 < size && read(0, out + n, 1) == 1)
        if (out[n++] == '\n') {
            out[n - 1] = 0;
            return true;
        }
    return false;
}

static uint64_t clock_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static unsigned long inode(int fd)
{
    struct stat st;

    return fstat(fd, &st) ? 0 : st.st_ino;
}

static void *counter(void *count)
{
    pthread_barrier_wait(&barrier);
    for (int i = 0; i < *(int *)count; i++)
        stats_connection(1);
    return NULL;
}

static void run_threads(int threads, int count)
{
    pthread_t ids[64];

    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++)
        pthread_create(&ids[i], NULL, counter, &count);
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
}

/* Row `fd` is one of two whole rows at any time. */
static void *hammer(void *number)
{
    struct endpoint one = endpoint("1.1.1.1", 1111), two = endpoint("2.2.2.2", 2222);

    uint32_t ones = rule_of("11111111111111111111111111111111"), twos = rule_of("22222222222222222222222222222222");
    for (unsigned pause = 0;; pause = (pause + 37) % 5000) {
        stats_row_set(*(int *)number, ROW_CONNECT, AF_INET, 0, 1, &one, &one, 1111, ones, rule_text);
        stats_row_set(*(int *)number, ROW_CONNECT, AF_INET, 1, 2, &two, &two, 2222, twos, rule_text);
        for (volatile unsigned i = 0; i < pause; i++)
            ;
    }
    return NULL;
}

static void layout(void)
{
#define FIELD(type, name) printf(" " #type "." #name "=%zu", offsetof(struct type, name))
    printf("stats_row=%zu stats_page=%zu", sizeof(struct stats_row), sizeof(struct stats_page));
    FIELD(stats_row, role), FIELD(stats_row, family), FIELD(stats_row, provider), FIELD(stats_row, reason);
    FIELD(stats_row, local), FIELD(stats_row, remote), FIELD(stats_row, inode), FIELD(stats_row, started);
    FIELD(stats_row, rule), FIELD(stats_row, sequence), FIELD(endpoint, ip), FIELD(endpoint, scope);
    FIELD(endpoint, port), FIELD(stats_page, magic), FIELD(stats_page, version), FIELD(stats_page, pid);
    FIELD(stats_page, row_size), FIELD(stats_page, nrows), FIELD(stats_page, rows), FIELD(stats_page, engine);
    FIELD(stats_page, engine_reason), FIELD(stats_page, max_row), FIELD(stats_page, started);
    FIELD(stats_page, table_generation), FIELD(stats_page, connections), FIELD(stats_page, listeners);
    FIELD(stats_page, reasons), FIELD(stats_page, upcalls);
    printf(" providers=%d reasons=%d rows=%d rule=%d\n", STATS_PROVIDERS, STATS_REASONS, STATS_ROWS, STATS_RULE_SIZE);
}

/* An AF_UNIX socket bound to an abstract name, or for "" to one that the kernel finds. */
static int bound(const char *text)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    size_t length = strlen(text);
    int fd = real.socket(AF_UNIX, SOCK_STREAM, 0);

    memcpy(name.sun_path + 1, text, length);
    if (real.bind(fd, (struct sockaddr *)&name, (socklen_t)(sizeof(sa_family_t) + (length ? length + 1 : 0))))
        abort();
    return fd;
}

static int listening(const char *text)
{
    int fd = bound(text);

    real.listen(fd, 5);
    return fd;
}

/* Prints both ends of a new connection, the connecting one bound to `text`. */
static void meet(const char *text, int listener)
{
    struct sockaddr_un name;
    socklen_t size = sizeof name;
    int fd = bound(text);

    real.getsockname(listener, (struct sockaddr *)&name, &size);
    if (real.connect(fd, (struct sockaddr *)&name, size))
        abort();
    printf("%d %d\n", fd, real.accept(listener, NULL, NULL));
}

int main(void)
{
    char text[4096], a[64], b[64], rule[2048];
    int fd, role, family, provider, reason, lport, rport, n, m;
    unsigned long long number;

    setvbuf(stdout, NULL, _IOLBF, 0);
    stats_on_new_page(rewrite);
    pthread_atfork(NULL, NULL, stats_after_fork_child);
    while (line(text, sizeof text)) {
        errno = 77;
        if (strcmp(text, "layout") == 0) {
            layout();
            continue;
        } else if (sscanf(text, "row %d %d %d %d %d %63s %d %63s %d %llu %2047s", &fd, &role, &family, &provider, &reason,
                          a, &lport, b, &rport, &number, rule) == 11) {
            struct endpoint local = endpoint(a, lport), remote = endpoint(b, rport);

            errno = 77;
            stats_row_set(fd, (uint32_t)role, family == 4 ? AF_INET : AF_INET6, (uint32_t)provider, (uint32_t)reason,
                          &local, &remote, number, rule_of(rule), rule_text);
        } else if (sscanf(text, "rename %63s %63s", a, b) == 2) {
            strcpy(texts[rule_of(a)], b);
        } else if (sscanf(text, "keep %d", &fd) == 1) {
            rows[nrows++] = fd;
        } else if (sscanf(text, "clear %d", &fd) == 1) {
            stats_row_clear(fd);
        } else if (sscanf(text, "copy %d %d", &n, &m) == 2) {
            stats_row_copy(n, m);
        } else if (sscanf(text, "connection %d", &n) == 1) {
            stats_connection((uint32_t)n);
        } else if (sscanf(text, "listener %d", &n) == 1) {
            stats_listener((uint32_t)n);
        } else if (sscanf(text, "reason %d", &n) == 1) {
            stats_reason((uint32_t)n);
        } else if (strcmp(text, "upcall") == 0) {
            stats_upcall();
        } else if (sscanf(text, "engine %d %d", &n, &m) == 2) {
            stats_engine((uint32_t)n, (uint32_t)m);
        } else if (sscanf(text, "generation %llu", &number) == 1) {
            stats_generation(number);
        } else if (sscanf(text, "close %d", &fd) == 1) {
            real.close(fd);
        } else if (sscanf(text, "closefrom %d", &fd) == 1) {
            real.closefrom(fd);
        } else if (sscanf(text, "take %d", &fd) == 1) {
            real.dup2(0, fd);
            errno = 77;
        } else if (sscanf(text, "hammer %d", &fd) == 1) {
            static int number;
            pthread_t id;

            number = fd;
            pthread_create(&id, NULL, hammer, &number);
            errno = 77;
        } else if (sscanf(text, "limit %63s %llu", a, &number) == 2) {
            struct rlimit limit = {number, number};

            setrlimit(strcmp(a, "fsize") == 0 ? RLIMIT_FSIZE : strcmp(a, "as") == 0 ? RLIMIT_AS : RLIMIT_NOFILE, &limit);
            errno = 77;
        } else if (strcmp(text, "mlockall") == 0) {
            if (mlockall(MCL_CURRENT | MCL_FUTURE))
                abort();
        } else if (sscanf(text, "threads %d %d", &n, &m) == 2) {
            run_threads(n, m);
            errno = 77;
        } else if (strcmp(text, "first") == 0) {
            uint64_t start = clock_now();

            stats_connection(0);
            printf("%llu\n", (unsigned long long)(clock_now() - start));
            continue;
        } else if (sscanf(text, "bench %d", &n) == 1) {
            struct endpoint local = endpoint("127.0.0.1", 1), remote = endpoint("127.0.0.1", 2);
            uint32_t rule = rule_of("/etc/interposer/policy.toml:12");
            uint64_t start = clock_now();

            for (int i = 0; i < n; i++)
                stats_row_set(40 + i % 100, ROW_CONNECT, AF_INET, 1, 0, &local, &remote, 5, rule, rule_text);
            printf("%llu\n", (unsigned long long)(clock_now() - start) / (unsigned)n);
            continue;
        } else if (strcmp(text, "listen") == 0 || strcmp(text, "accept") == 0 || strcmp(text, "connect") == 0) {
            static int listener, client;
            struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            socklen_t size = sizeof address;

            if (text[0] == 'l') {
                fd = listener = real.socket(AF_INET, SOCK_STREAM, 0);
                real.bind(fd, (struct sockaddr *)&address, size);
                real.listen(fd, 5);
            } else if (text[0] == 'c') {
                real.getsockname(listener, (struct sockaddr *)&address, &size);
                fd = client = real.socket(AF_INET, SOCK_STREAM, 0);
                if (real.connect(fd, (struct sockaddr *)&address, size))
                    abort();
            } else {
                fd = real.accept(listener, NULL, NULL);
            }
            size = sizeof address;
            real.getsockname(fd, (struct sockaddr *)&address, &size);
            printf("%d %lu %d\n", fd, inode(fd), ntohs(address.sin_port));
            continue;
        } else if (sscanf(text, "unix %2047s", rule) == 1) {
            printf("%d\n", listening(rule));
            continue;
        } else if (sscanf(text, "meet %2047s %d", rule, &n) == 2) {
            meet(rule, n);
            continue;
        } else if (sscanf(text, "pair %2047s", rule) == 1) {
            meet(rule, listening(""));
            continue;
        } else if (strcmp(text, "fork") == 0 || strcmp(text, "clone") == 0) {
            /* The child goes on with the commands until "exit", then the parent does. */
            pid_t child = text[0] == 'f' ? fork() : (pid_t)real.syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);

            if (child) {
                waitpid(child, NULL, 0);
                printf("parent\n");
                continue;
            }
            printf("%ld\n", (long)real.syscall(SYS_getpid, 0, 0, 0, 0, 0, 0));
            continue;
        } else if (strcmp(text, "exit") == 0) {
            _exit(0);
        } else {
            printf("what?\n");
            continue;
        }
        printf("ok %d\n", errno);
    }
    return 0;
}
