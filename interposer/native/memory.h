/* Is there memory where the program points? What the kernel answers with EFAULT must not become a crash of the switch,
 * which looks at some arguments before the kernel does. The near stack and the heap are known; the kernel is asked about
 * other places, and the last answer of each thread is remembered. */
#ifndef INTERPOSER_MEMORY_H
#define INTERPOSER_MEMORY_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MEMORY_NEAR 65536
bool memory_far(const void *pointer, size_t size, bool write);

static inline bool memory_near(const void *pointer, size_t size)
{
    uintptr_t above = (uintptr_t)pointer - (uintptr_t)__builtin_frame_address(0);
    return above < MEMORY_NEAR && size < MEMORY_NEAR;
}

static inline bool memory_reads(const void *pointer, size_t size)
{
    return memory_near(pointer, size) || memory_far(pointer, size, false);
}

static inline bool memory_takes(const void *pointer, size_t size)
{
    return memory_near(pointer, size) || memory_far(pointer, size, true);
}
#endif
