/* What all fuzz targets share. A target includes the sources that it looks at; all other native code is linked to it as
 * it is. Included first, this file gives their mappings an exact size and a place where the sanitizers look, and their
 * files to the fuzzer: real.open gives a descriptor of nothing, real.read what fuzz_serve() was given. */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "interposer/native/real.h"

#define FUZZ_FD 1000

#define check(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);

static inline void *fuzz_map(size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, size ? size : 1))
        return MAP_FAILED;
    memset(memory, 0, size);
    return memory;
}

static inline int fuzz_unmap(void *memory)
{
    free(memory);
    return 0;
}

/* What comes next of the input; zeros when it is used up. */
struct fuzz_input {
    const uint8_t *at, *end;
};

static inline void fuzz_take(struct fuzz_input *in, void *out, size_t size)
{
    size_t left = (size_t)(in->end - in->at), some = size < left ? size : left;
    memset(out, 0, size);
    if (some)
        memcpy(out, in->at, some);
    in->at += some;
}

static inline uint8_t fuzz_byte(struct fuzz_input *in)
{
    uint8_t byte;
    fuzz_take(in, &byte, 1);
    return byte;
}

/* The file that is read: served in pieces of at most `piece` bytes. */
static struct {
    const uint8_t *at, *end;
    size_t piece;
} fuzz_file;

static inline void fuzz_serve(const uint8_t *data, size_t size, size_t piece)
{
    fuzz_file.at = data;
    fuzz_file.end = data + size;
    fuzz_file.piece = piece ? piece : SIZE_MAX;
}

static inline ssize_t fuzz_read(int fd, void *buffer, size_t size)
{
    check(fd == FUZZ_FD);
    size_t left = (size_t)(fuzz_file.end - fuzz_file.at);
    size = size < left ? size : left;
    size = size < fuzz_file.piece ? size : fuzz_file.piece;
    if (size)
        memcpy(buffer, fuzz_file.at, size);
    fuzz_file.at += size;
    return (ssize_t)size;
}

static inline int fuzz_close(int fd)
{
    check(fd == FUZZ_FD);
    return 0;
}

/* The rest of a buffer of which `used` bytes were filled: whoever looks at it is caught. */
static struct {
    char *at;
    size_t size;
} fuzz_unread;

static inline void fuzz_forbid(void *buffer, size_t used, size_t size)
{
    used = (used + 7) & ~(size_t)7;    /* poison begins at eight bytes */
    if (used >= size)
        return;
    fuzz_unread.at = (char *)buffer + used;
    fuzz_unread.size = size - used;
    __asan_poison_memory_region(fuzz_unread.at, fuzz_unread.size);
}

static inline void fuzz_allow(void)
{
    if (fuzz_unread.at)
        __asan_unpoison_memory_region(fuzz_unread.at, fuzz_unread.size);
    fuzz_unread.at = NULL;
}

static inline int fuzz_open(const char *path, int flags, unsigned mode)
{
    (void)path, (void)flags, (void)mode;
    return FUZZ_FD;
}

static inline void fuzz_files(void)
{
    real.open = fuzz_open;
    real.read = fuzz_read;
    real.close = fuzz_close;
}
#define mmap(at, size, protection, flags, fd, offset) fuzz_map(size)
#define munmap(memory, size) fuzz_unmap(memory)
#endif
