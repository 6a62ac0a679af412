/* What time it is, for whoever waits or remembers. */
#ifndef INTERPOSER_CLOCK_H
#define INTERPOSER_CLOCK_H
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#define MOMENT_MS 100                  /* what another thread does without a pause takes no longer */

static inline int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t clock_ms(void)
{
    return clock_ns(CLOCK_MONOTONIC) / 1000000;
}

/* Cheaper, and as old as a tick of the kernel. */
static inline int64_t clock_coarse_ms(void)
{
    return clock_ns(CLOCK_MONOTONIC_COARSE) / 1000000;
}

/* Lets other threads run. False once `ms` have passed since the first call, when `*until` was 0: the one that is waited
 * for may be the very thread that a signal handler has interrupted. Time, because on a busy machine a yield may take long. */
static inline bool clock_yield(int64_t *until, int64_t ms)
{
    int64_t now = clock_ms();
    *until = *until ? *until : now + ms;
    sched_yield();
    return now < *until;
}
#endif
