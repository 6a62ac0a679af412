/* A process that does nothing but decide: flows.c and what it needs, with a stub in place of the policy engine. Reads
 * commands from standard input, answers each with one line. Linked with --wrap=mmap and --wrap=clock_gettime.
 *   facts USER EXE NAME ARGUMENTS ENVIRONMENT CGROUPS   hex; lists NUL-separated and ended by an empty string
 *   load PATH | decide ROLE FAMILY LOCAL PORT REMOTE PORT [SCOPE SCOPE] | answer ACTION OTHERWISE PROVIDER REASON RULE
 *   text RULE SIZE | state | sleep MS | user UID | bench COUNT ROLE LOCAL PORT REMOTE PORT
 *   starve 0|1                 whether there is no memory
 *   hurry FACTOR               the clock that says when to look for a new table runs faster
 *   storm THREADS MS           threads decide and the process forks
 *   generations THREADS        threads decide under tables that count themselves, see there, until the next line */
#define _GNU_SOURCE
#include "flows.h"
#include "reasons.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct process_facts facts;
static struct verdict answer = {.action = ACTION_TCP, .reason = 26, .rule = RULE_DEFAULT};
static _Thread_local struct decision_request asked;
static _Atomic unsigned long questions;
static _Atomic bool starving, counting;
static _Atomic unsigned hurry = 1;

/* Between the opening of a table and its reading. */
void *__real_mmap(void *where, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *where, size_t size, int protection, int flags, int fd, off_t offset)
{
    static _Atomic unsigned times;
    if (counting && times++ % 4 == 0)
        usleep(8000);                  /* so that somebody may overtake */
    return starving ? MAP_FAILED : __real_mmap(where, size, protection, flags, fd, offset);
}

int __real_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = __real_clock_gettime(clock == CLOCK_MONOTONIC_COARSE ? CLOCK_MONOTONIC : clock, now);
    if (clock == CLOCK_MONOTONIC_COARSE) {
        uint64_t ns = ((uint64_t)now->tv_sec * 1000000000u + (uint64_t)now->tv_nsec) * hurry;
        *now = (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    }
    return result;
}

/* What table number `number` says, by a rule or by the engine. */
static struct verdict counted(unsigned number)
{
    if (number % 2 == 0)
        return (struct verdict){.action = ACTION_TCP, .otherwise = OTHERWISE_TCP,
                                .reason = REASON_POLICY_TCP};
    return (struct verdict){.action = ACTION_SAN, .otherwise = OTHERWISE_ERROR, .providers = {1}};
}

static unsigned number_of(const void *table)
{
    return ((const struct table_header *)table)->nrules - 2;
}

void engine_ask(const void *table, const struct decision_request *request, struct verdict *out)
{
    asked = *request;
    if (questions++ % 16 == 0 && counting)
        usleep(2000);
    *out = counting ? counted(number_of(table)) : answer;
}

static void *unhex(const char *hex, size_t room)
{
    size_t length = strcmp(hex, "-") == 0 ? 0 : strlen(hex) / 2;
    uint8_t *bytes = calloc(1, (length > room ? length : room) + 2);
    for (size_t i = 0; i < length; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], 0};
        bytes[i] = (uint8_t)strtoul(digits, NULL, 16);
    }
    return bytes;
}

static struct endpoint endpoint_of(const char *hex, unsigned port)
{
    struct endpoint endpoint = {.port = (uint16_t)port};
    uint8_t *ip = unhex(hex, 16);
    memcpy(endpoint.ip, ip, 16);
    free(ip);
    return endpoint;
}

static void print_verdict(const struct verdict *v)
{
    printf("%u %u %u,%u,%u,%u %u %u %u", v->action, v->otherwise, v->providers[0], v->providers[1], v->providers[2],
           v->providers[3], v->reason, v->rule, v->function);
    if (v->send_buffer || v->receive_buffer)
        printf(" buffers %u %u", v->send_buffer, v->receive_buffer);
}

static _Atomic bool stopping;
static _Atomic unsigned long decisions, nonsense;

static void *storm_thread(void *argument)
{
    struct endpoint local = endpoint_of("-", 0), remote = endpoint_of("00000000000000000000ffff7f000001", 80);
    (void)argument;
    while (!stopping) {
        struct verdict verdict;
        char text[64];
        remote.port = (uint16_t)(decisions % 100 + 1);
        flows_decide(ROLE_CONNECT, AF_INET, &local, &remote, NULL, 0, &verdict);
        flows_rule_text(verdict.rule, text, sizeof text);
        if (verdict.action != ACTION_TCP && verdict.action != ACTION_SAN)
            nonsense++;
        decisions++;
    }
    return NULL;
}

static _Atomic unsigned long mixed, backward;
static _Atomic unsigned last_number;

/* Table number N has N rules that match nothing here, then one for ports up to 50, then one that asks. */
static void *generation_thread(void *argument)
{
    struct endpoint local = endpoint_of("-", 0), remote = endpoint_of("00000000000000000000ffff7f000001", 80);
    unsigned newest = 0;
    (void)argument;
    for (unsigned i = 0; !stopping; i++) {
        struct verdict verdict;
        remote.port = (uint16_t)(i % 100 + 1);
        flows_decide(ROLE_CONNECT, AF_INET, &local, &remote, NULL, 0, &verdict);
        decisions++;
        if (verdict.reason == REASON_ENGINE_BUSY && verdict.action == ACTION_TCP)
            continue;                  /* the engine was too busy: no table said that */
        unsigned number = verdict.rule - (remote.port > 50);
        struct verdict wanted = counted(number);
        if (verdict.action != wanted.action || verdict.otherwise != wanted.otherwise || verdict.reason != wanted.reason ||
            memcmp(verdict.providers, wanted.providers, sizeof wanted.providers) != 0)
            mixed++;
        if (number < newest)
            backward++;
        newest = number;
    }
    if (newest > last_number)
        last_number = newest;
    return NULL;
}

static void generations(unsigned threads)
{
    pthread_t ids[64];
    char line[16];
    stopping = false;
    counting = true;
    decisions = mixed = backward = questions = last_number = 0;
    for (unsigned i = 0; i < threads && i < 64; i++)
        pthread_create(&ids[i], NULL, generation_thread, NULL);
    if (!fgets(line, sizeof line, stdin))
        exit(1);
    stopping = true;
    for (unsigned i = 0; i < threads && i < 64; i++)
        pthread_join(ids[i], NULL);
    counting = false;
    printf("%lu %lu %lu %lu %u\n", (unsigned long)decisions, (unsigned long)questions, (unsigned long)mixed,
           (unsigned long)backward, (unsigned)last_number);
}

static void storm(unsigned threads, unsigned ms)
{
    pthread_t ids[64];
    stopping = false;
    decisions = nonsense = 0;
    for (unsigned i = 0; i < threads && i < 64; i++)
        pthread_create(&ids[i], NULL, storm_thread, NULL);
    for (unsigned i = 0; i < ms; i += 10) {
        pid_t child = fork();
        if (child == 0) {
            struct endpoint remote = endpoint_of("00000000000000000000ffff7f000001", 80);
            struct verdict verdict;
            alarm(5);
            flows_decide(ROLE_CONNECT, AF_INET, NULL, &remote, NULL, 0, &verdict);
            _exit(verdict.action == ACTION_ASK);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
            nonsense++;
        usleep(10000);
    }
    stopping = true;
    for (unsigned i = 0; i < threads && i < 64; i++)
        pthread_join(ids[i], NULL);
    printf("%lu %lu\n", (unsigned long)decisions, (unsigned long)nonsense);
}

static void bench(unsigned long count, unsigned role, const struct endpoint *local, const struct endpoint *remote)
{
    struct timespec before, after;
    struct verdict verdict;

    flows_decide((uint8_t)role, AF_INET, local, remote, NULL, 0, &verdict);
    clock_gettime(CLOCK_MONOTONIC, &before);
    for (unsigned long i = 0; i < count; i++)
        flows_decide((uint8_t)role, AF_INET, local, remote, NULL, 0, &verdict);
    clock_gettime(CLOCK_MONOTONIC, &after);
    double ns = (double)(after.tv_sec - before.tv_sec) * 1e9 + (double)(after.tv_nsec - before.tv_nsec);
    printf("%.1f\n", ns / (double)count);
}

int main(void)
{
    static char line[1 << 16], a[1 << 16], b[1 << 12], c[1 << 16], d[1 << 16], e[1 << 12];
    unsigned x, y, z, u, v, w;
    unsigned long count;
    int given;

    while (fgets(line, sizeof line, stdin)) {
        alarm(60);                     /* for one command; the next may be long in coming */
        if (sscanf(line, "facts %u %s %s %s %s %s", &x, a, b, c, d, e) == 6) {
            facts = (struct process_facts){.user = x, .exe = unhex(a, 0), .name = unhex(b, 0),
                                           .arguments = unhex(c, 0), .environment = unhex(d, 0),
                                           .cgroups = unhex(e, 0)};
            puts("ok");
        } else if (sscanf(line, "load %[^\n]", a) == 1) {
            printf("%d\n", flows_load(a, &facts));
        } else if ((given = sscanf(line, "decide %u %u %s %u %s %u %u %u", &x, &y, a, &z, b, &u, &v, &w)) >= 6) {
            struct endpoint local = endpoint_of(a, z), remote = endpoint_of(b, u);
            if (given == 8) {
                local.scope = v;
                remote.scope = w;
            }
            struct verdict verdict;
            unsigned long before = questions;
            flows_decide((uint8_t)x, (int)y, &local, &remote, NULL, 0, &verdict);
            print_verdict(&verdict);
            if (questions != before)
                printf(" asked %u %u %u", asked.role, asked.function, asked.rule);
            puts("");
        } else if (sscanf(line, "answer %u %u %u %u %u", &x, &y, &z, &u, &v) == 5) {
            answer = (struct verdict){.action = (uint8_t)x, .otherwise = (uint8_t)y, .providers = {(uint8_t)z},
                                      .reason = (uint16_t)u, .rule = v};
            puts("ok");
        } else if (sscanf(line, "text %u %u", &x, &y) == 2) {
            size_t length = flows_rule_text(x, a, y);
            printf("%zu %s\n", length, y ? a : "");
        } else if (strcmp(line, "state\n") == 0) {
            printf("%llu %u %lu %d\n", (unsigned long long)flows_generation(), flows_engine(), (unsigned long)questions,
                   flows_table() != NULL);
        } else if (sscanf(line, "sleep %u", &x) == 1) {
            usleep(x * 1000);
            puts("ok");
        } else if (sscanf(line, "user %u", &x) == 1) {
            printf("%d\n", seteuid(x));
        } else if (sscanf(line, "starve %u", &x) == 1) {
            starving = x;
            puts("ok");
        } else if (sscanf(line, "hurry %u", &x) == 1) {
            hurry = x;
            puts("ok");
        } else if (sscanf(line, "generations %u", &x) == 1) {
            generations(x);
        } else if (sscanf(line, "storm %u %u", &x, &y) == 2) {
            storm(x, y);
        } else if (sscanf(line, "bench %lu %u %s %u %s %u", &count, &x, a, &y, b, &z) == 6) {
            struct endpoint local = endpoint_of(a, y), remote = endpoint_of(b, z);
            bench(count, x, &local, &remote);
        } else {
            puts("?");
        }
        fflush(stdout);
        alarm(0);
    }
    return 0;
}
