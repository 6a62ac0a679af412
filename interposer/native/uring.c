/* Owns what is known of this process's rings and of the code that could make one. A ring is mapped memory, and a program
 * that makes one without libc's syscall() has the system call's number in its code: liburing, linked or loaded, and all
 * that was compiled with the call in it. No lock: threads that look at the same time store the same. Runs after fork and
 * in signal handlers. */
#include "uring.h"
#include "clock.h"
#include "real.h"
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LOOK_AGAIN_MS 1000
#define LINE 4096
#define CHUNK (128 << 10)
#define AROUND 64                      /* bytes of code between the number and the call that it is for */

_Atomic bool uring_made;
_Atomic bool uring_possible;
static _Atomic uint64_t known_code;    /* a sum over the objects that were searched */
static _Atomic int64_t look_again;

/* --- code --- */

/* io_uring_setup is system call 425, io_uring_enter 426: who got a ring from elsewhere needs that. The numbers' lowest
 * bytes, as instructions hold them. */
#if defined __x86_64__
static const int lowest_bytes[] = {0xa9, 0xaa};
#else
static const int lowest_bytes[] = {0x20, 0x28, 0x40, 0x48};
#endif

/* Is one of these numbers, whose lowest byte `at` points to, put where a system call looks for it? There are AROUND bytes
 * on both sides. */
static bool is_for_a_call(const unsigned char *at)
{
#if defined __x86_64__
    if (memcmp(at + 1, "\1\0\0", 3) != 0)
        return false;
    if (at[-1] == 0xb8)                /* mov $425, %eax; ... syscall */
        return memmem(at, AROUND, "\x0f\x05", 2);
    return at[-1] == 0xbf && (memchr(at, 0xe8, AROUND) || memmem(at, AROUND, "\xff\x15", 2));   /* mov $425, %edi; ... call */
#else
    uint32_t word;                     /* movz w0|x0|w8|x8, #425 */
    memcpy(&word, at, sizeof word);
    word &= 0x7ffffff7;
    return word == 0x52803520 || word == 0x52803540;
#endif
}

static bool holds_calls(const unsigned char *code, size_t size)
{
    for (size_t i = 0; i < sizeof lowest_bytes / sizeof *lowest_bytes; i++) {
        const unsigned char *at = code + AROUND, *end = code + size - AROUND;
        for (; at < end && (at = memchr(at, lowest_bytes[i], (size_t)(end - at))); at++)
            if (is_for_a_call(at))
                return true;
    }
    return false;
}

/* Reads the file, because the mapping may be another thread's to take away. What cannot be read may hold anything. */
static bool file_holds_calls(const char *path, uint64_t offset, uint64_t size, unsigned char *buffer)
{
    if (strcmp(strrchr(path, '/'), "/libc.so.6") == 0)
        return false;                  /* the largest in most programs, and known */
    int fd = real.open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0);
    if (fd < 0)
        return true;
    bool found = false;
    memset(buffer, 0, AROUND);
    size_t kept = AROUND;
    while (!found && size) {
        ssize_t got = pread(fd, buffer + kept, size < CHUNK ? size : CHUNK, (off_t)offset);
        if (got <= 0) {
            found = got < 0;
            break;
        }
        size -= (uint64_t)got;
        offset += (uint64_t)got;
        size_t filled = kept + (size_t)got;
        if (!size) {
            memset(buffer + filled, 0, AROUND);
            filled += AROUND;
        }
        found = holds_calls(buffer, filled);
        kept = filled < 2 * AROUND ? filled : 2 * AROUND;
        memmove(buffer, buffer + filled - kept, kept);
    }
    real.close(fd);
    return found;
}

/* --- mappings --- */

static uint64_t hexadecimal(const char **at)
{
    uint64_t value = 0;
    for (;; (*at)++) {
        unsigned digit = (unsigned char)**at - '0';
        if (digit > 9)
            digit = (unsigned char)(**at | 32) - 'a' + 10u;
        if (digit > 15)
            return value;
        value = value << 4 | digit;
    }
}

struct look {
    bool ring, code;
    uint64_t sum;                      /* of the objects with code */
    unsigned char *buffer;             /* to search them, or NULL */
};

/* start-end perms offset device inode path */
static void look_at(struct look *look, const char *line)
{
    const char *at = line;
    uint64_t start = hexadecimal(&at);
    at++;
    uint64_t end = hexadecimal(&at);
    if (*at++ != ' ' || strlen(at) < 5)
        return;
    bool executable = at[2] == 'x';
    const char *path = strchr(at, '/');
    if (strstr(at, "anon_inode:[io_uring]"))
        look->ring = true;
    if (!executable || !path)
        return;
    at += 5;
    uint64_t offset = hexadecimal(&at);
    for (const char *each = line; *each; each++)
        look->sum = (look->sum ^ (unsigned char)*each) * 0x100000001b3u;
    if (look->buffer && !look->code)
        look->code = file_holds_calls(path, offset, end - start, look->buffer);
}

/* False where nothing can be seen. */
static bool read_mappings(struct look *look)
{
    int fd = real.open("/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
    /* Not on the stack, which may be small. */
    char *text = fd < 0 ? MAP_FAILED : mmap(NULL, LINE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (text == MAP_FAILED) {
        if (fd >= 0)
            real.close(fd);
        return false;
    }
    size_t filled = 0;
    ssize_t got;
    while ((got = real.read(fd, text + filled, LINE - 1 - filled)) > 0) {
        filled += (size_t)got;
        text[filled] = 0;
        char *line = text, *end;
        for (; (end = strchr(line, '\n')); line = end + 1) {
            *end = 0;
            look_at(look, line);
        }
        filled = (size_t)(text + filled - line);
        memmove(text, line, filled);
        if (filled == LINE - 1)
            filled = 0;                /* a longer path than any can be */
    }
    munmap(text, LINE);
    real.close(fd);
    return got == 0;
}

/* What was searched before is not searched again. False where nothing can be seen. */
static bool look_for_code(struct look *look)
{
    look->buffer = mmap(NULL, CHUNK + 4 * AROUND, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (look->buffer == MAP_FAILED)
        return false;
    bool seen = read_mappings(look);
    munmap(look->buffer, CHUNK + 4 * AROUND);
    return seen;
}

bool uring_exists(bool listener)
{
    if (atomic_load_explicit(&uring_made, memory_order_relaxed))
        return true;
    int64_t now = clock_coarse_ms();
    if (!listener && now < look_again)
        return false;
    look_again = now + LOOK_AGAIN_MS;
    struct look look = {0};
    bool seen = read_mappings(&look);
    uint64_t sum = look.sum;
    if (listener && !uring_possible && (!seen || sum != known_code)) {
        uring_possible = !seen || !look_for_code(&look) || look.code;
        known_code = sum;
    }
    if (look.ring)
        uring_made = true;
    return look.ring;
}
