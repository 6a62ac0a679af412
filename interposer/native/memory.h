/* Is there memory where the program points? What the kernel answers with EFAULT must not become a crash of the switch,
 * which looks at some arguments before the kernel does. The near stack and the heap are known; the kernel is asked about
 * other pages, and its answers are remembered: a program that gives such a page back and points there again is not seen. */
#ifndef INTERPOSER_MEMORY_H
#define INTERPOSER_MEMORY_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MEMORY_NEAR 65536
#define MEMORY_PAGE_BITS 12            /* a page, or a part of one */
#define MEMORY_KNOWN 64
/* Complements of the numbers of pages that can be read, and of those that can be written. */
extern _Atomic uintptr_t memory_known[2][MEMORY_KNOWN];
bool memory_far(const void *pointer, size_t size, bool write);

static inline bool memory_quick(const void *pointer, size_t size, bool write)
{
    uintptr_t first = (uintptr_t)pointer, page = first >> MEMORY_PAGE_BITS;
    if (size >= MEMORY_NEAR)
        return false;
    if (first - (uintptr_t)__builtin_frame_address(0) < MEMORY_NEAR)
        return true;
    return (first + size) >> MEMORY_PAGE_BITS == page &&
           __atomic_load_n((uintptr_t *)&memory_known[write][page % MEMORY_KNOWN], __ATOMIC_RELAXED) == ~page;
}

static inline bool memory_reads(const void *pointer, size_t size)
{
    return memory_quick(pointer, size, false) || memory_far(pointer, size, false);
}

static inline bool memory_takes(const void *pointer, size_t size)
{
    return memory_quick(pointer, size, true) || memory_far(pointer, size, true);
}
#endif
