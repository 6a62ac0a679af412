/* Decides and asks without connecting: the library's objects linked into a program, which reads its table as every
 * interposed one does. Commands come by standard input, each is answered by one line.
 *   decide ADDRESS PORT COUNT      nanoseconds for one decision about a connect; the action; the rule
 *   ask COUNT                      microseconds for one decision that asks a function, each about another connection; the
 *                                  action; the rule */
#define _GNU_SOURCE
#include "flows.h"
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static struct verdict decide(const struct endpoint *remote)
{
    struct endpoint local = {0};
    struct verdict verdict;
    flows_decide(ROLE_CONNECT, AF_INET, &local, remote, NULL, 0, &verdict);
    return verdict;
}

int main(void)
{
    char line[128], address[64];
    unsigned port, count, next = 0;
    while (fgets(line, sizeof line, stdin)) {
        struct endpoint remote = {.ip = {[10] = 0xff, 0xff, 127}};
        struct verdict verdict = {0};
        double start, unit;
        if (sscanf(line, "decide %63s %u %u", address, &port, &count) == 3) {
            if (inet_pton(AF_INET, address, remote.ip + 12) != 1)
                return 64;
            remote.port = (uint16_t)port;
            unit = 1e9;
            start = now();
            for (unsigned i = 0; i < count; i++)
                verdict = decide(&remote);
        } else if (sscanf(line, "ask %u", &count) == 1) {
            unit = 1e6;
            start = now();
            for (unsigned i = 0; i < count; i++, next++) {
                remote.port = (uint16_t)(next % 60000 + 1);
                remote.ip[15] = (uint8_t)(next / 60000 + 1);
                verdict = decide(&remote);
            }
        } else {
            return 64;
        }
        printf("%.4f %u %d\n", (now() - start) * unit / count, verdict.action, (int)verdict.rule);
        fflush(stdout);
    }
    return 0;
}
