/* Owns what is remembered of pages. Async-signal-safe, runs after fork; errno stays as it is. */
#include "memory.h"
#include "real.h"
#include "sandbox.h"
#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

_Atomic uintptr_t memory_known[2][MEMORY_KNOWN];
static char *heap;                     /* where it began when the library came */

__attribute__((constructor)) static void find_heap(void)
{
    heap = sbrk(0);
}

/* How sigprocmask is to change the mask is looked at after the mask: nothing changes. */
static bool kernel_reads(uintptr_t place)
{
    return real.syscall(SYS_rt_sigprocmask, -1, (long)place, 0, 8, 0, 0) == 0 || errno != EFAULT;
}

/* A wake-up of nobody, which on its way sets no bit there. */
static bool kernel_writes(uintptr_t place)
{
    static int nobody;
    return real.syscall(SYS_futex, (long)&nobody, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, 0, (long)place,
                        FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_LT, 0)) >= 0 || errno != EFAULT;
}

bool memory_far(const void *pointer, size_t size, bool write)
{
    uintptr_t first = (uintptr_t)pointer, end = first + size;
    if (!size)
        return true;
    if (first >> MEMORY_PAGE_BITS == 0 || end < first)
        return false;
    if (sandbox_closed)                /* its filter may kill for a question */
        return true;
    if (heap && first >= (uintptr_t)heap && end <= (uintptr_t)sbrk(0))
        return true;
    int saved = errno;
    bool there = true;
    for (uintptr_t page = first >> MEMORY_PAGE_BITS; there && page <= (end - 1) >> MEMORY_PAGE_BITS; page++) {
        _Atomic uintptr_t *known = &memory_known[write][page % MEMORY_KNOWN];
        if (atomic_load_explicit(known, memory_order_relaxed) == ~page)
            continue;
        there = write ? kernel_writes(page << MEMORY_PAGE_BITS) : kernel_reads(page << MEMORY_PAGE_BITS);
        if (there)
            atomic_store_explicit(known, ~page, memory_order_relaxed);
    }
    errno = saved;
    return there;
}
