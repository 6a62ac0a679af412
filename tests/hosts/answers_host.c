/* What flows.c does with the answers of the policy engine, which is a stub here: how long it keeps them, for which
 * questions, and what becomes of one that a new table overtakes. Each question prints its answer and how often the
 * engine was asked for it. Linked with --wrap=clock_gettime, so that time passes when told.
 *   answers_host TABLE SCENARIO [NEW-TABLE...] */
#include "flows.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *table_path;
static char **new_tables;
static struct verdict answer = {.action = ACTION_SAN, .providers = {PROVIDER_UNIX}};
static unsigned asked, options_seen;
static uint64_t later_ms;

int __real_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = __real_clock_gettime(clock, now);
    now->tv_sec += (time_t)(later_ms / 1000);
    now->tv_nsec += (long)(later_ms % 1000) * 1000000;
    if (now->tv_nsec >= 1000000000) {
        now->tv_sec++;
        now->tv_nsec -= 1000000000;
    }
    return result;
}

/* A function so slow that the policy changes while it runs, as often as there are new tables. */
void engine_ask(const void *table, const struct decision_request *request, struct verdict *out)
{
    (void)table;
    asked++;
    options_seen = request->noptions;
    *out = answer;
    if (*new_tables) {
        if (rename(*new_tables++, table_path))
            abort();
        later_ms += 1000;
    }
}

static void decide(uint16_t port, const struct sock_option *options, uint32_t noptions)
{
    struct endpoint remote = {.ip = {[10] = 0xff, 0xff, 127, 0, 0, 1}, .port = port};
    struct verdict verdict;

    asked = options_seen = 0;
    flows_decide(ROLE_CONNECT, AF_INET, NULL, &remote, options, noptions, &verdict);
    printf("asked=%u action=%u reason=%u rule=%d buffers=%u,%u options=%u\n", asked, verdict.action, verdict.reason,
           (int)verdict.rule, verdict.send_buffer, verdict.receive_buffer, options_seen);
}

static void options(void)
{
    struct sock_option set[SOCK_OPTIONS + 1] = {{SOL_SOCKET, SO_KEEPALIVE, 4, {1}}, {IPPROTO_TCP, TCP_NODELAY, 4, {1}}};

    decide(80, set, 0);
    decide(80, set, 1);
    decide(80, set, 2);
    for (int i = 0; i < 3; i++)        /* all three are known now */
        decide(80, set, (uint32_t)i);
    set[0].value[0] = 2;
    decide(80, set, 1);
    set[0].value[15] = 9;
    set[0].length = 16;
    decide(80, set, 1);
    decide(80, set, 1);
    decide(80, set, SOCK_OPTIONS + 1);
}

static void buffers(void)
{
    answer.send_buffer = 1u << 30;
    answer.receive_buffer = 7;
    decide(80, NULL, 0);
    decide(80, NULL, 0);
}

static void after(uint64_t ms)
{
    later_ms += ms;
    decide(80, NULL, 0);
}

static void memory(void)
{
    answer.remember_ms = 5000;
    decide(80, NULL, 0);
    after(4900);
    after(200);
    after(4900);
    after(200);
    answer.remember_ms = REMEMBER_NOT;
    after(5000);
    after(0);
    answer.remember_ms = 0;
    after(0);
    after(100ull * 24 * 3600 * 1000);
}

static void connect_to(uint8_t last, uint16_t port)
{
    struct endpoint remote = {.ip = {[10] = 0xff, 0xff, 127, 0, 0, last}, .port = port};
    struct verdict verdict;

    flows_decide(ROLE_CONNECT, AF_INET, NULL, &remote, NULL, 0, &verdict);
}

/* More short answers than there is room for, then as many lasting ones as there is room for if the others give way. */
static void room(void)
{
    answer.remember_ms = 1;
    for (uint16_t i = 0; i < 20000; i++) {
        connect_to(1, i);
        later_ms += 2;
    }
    answer.remember_ms = asked = 0;
    for (int round = 0; round < 2; round++)
        for (uint16_t i = 0; i < 1000; i++)
            connect_to(2, i);
    printf("asked=%u\n", asked);
}

static void overtaken(void)
{
    decide(80, NULL, 0);
    decide(80, NULL, 0);
    decide(80, NULL, 0);
}

int main(int argc, char **argv)
{
    static const struct process_facts facts;
    const char *scenario = argc > 2 ? argv[2] : "";

    table_path = argv[1];
    new_tables = argv + argc;
    if (argc < 3 || flows_load(table_path, &facts))
        return 2;
    if (!strcmp(scenario, "options"))
        options();
    else if (!strcmp(scenario, "buffers"))
        buffers();
    else if (!strcmp(scenario, "memory"))
        memory();
    else if (!strcmp(scenario, "room"))
        room();
    else if (!strcmp(scenario, "overtaken")) {
        new_tables = argv + 3;
        overtaken();
    } else {
        return 2;
    }
    return 0;
}
