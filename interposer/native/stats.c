/* Owner of this process's stats page (stats.h): made at the first write, made anew in a forked child, and made anew with
 * its contents when the program closed its descriptor. No lock: whoever makes the page holds the state MAKING, others
 * wait for it, but no longer than WAIT_MAX, and not at all inside a signal handler that interrupted the maker. May run
 * after fork and in a signal handler; allocates nothing and keeps errno. */
#include "real.h"
#include "clock.h"
#include "fdtable.h"
#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define BLOCK 4096u
#define ROWS_OFFSET (4u * sizeof(struct stats_row))
#define PAGE_SIZE_MAX (ROWS_OFFSET + (size_t)STATS_ROWS * sizeof(struct stats_row))
#define BLOCKS ((PAGE_SIZE_MAX + BLOCK - 1) / BLOCK)
#define ROW_WORDS (offsetof(struct stats_row, sequence) / sizeof(uint64_t))
#define ROWS_MIN 16u
#define SECOND 1000000000u
#define WAIT_MAX (SECOND / 50)

_Static_assert(sizeof(struct endpoint) == 24, "the reader knows this size");
_Static_assert(sizeof(struct stats_row) == 192, "the reader knows this size");
_Static_assert(sizeof(struct stats_page) <= ROWS_OFFSET, "the rows follow the header");
_Static_assert(_Alignof(struct stats_row) == sizeof(uint64_t), "rows are copied by words");

enum { NONE = 0, MAKING = 1, READY = 2, FAILED = 3 };

/* Alone on a page of its own that fork wipes: the child finds NONE, even one that a raw clone made. */
struct marker {
    _Atomic uint32_t state;
};
static _Atomic(struct marker *) marker;

/* The address never changes once set, in children neither, so that a writer never loses the ground under its feet. */
static _Atomic(struct stats_page *) page;
static uint32_t nrows;
static _Atomic uint8_t populated[BLOCKS];   /* blocks that are known to have memory: writing them raises no SIGBUS */
static int page_fd = -1;
static dev_t page_dev;
static ino_t page_ino;
static _Atomic uint64_t looked;             /* when the descriptor was last looked at, or making the page last failed */
static _Atomic bool replacing;              /* guards page_fd, page_dev and page_ino once the page is READY */
static _Atomic uint32_t engine_state, engine_why;
static _Atomic uint64_t generation;
static void (*_Atomic on_new_page)(void);
static _Atomic bool frozen;
static _Thread_local bool making;

static uint64_t now(clockid_t clock)
{
    return (uint64_t)clock_ns(clock);
}

static size_t page_size(uint32_t rows)
{
    return ROWS_OFFSET + (size_t)rows * sizeof(struct stats_row);
}

/* Memory can end at any new block of a shared mapping, and a plain write would then be SIGBUS in the program. */
static bool populate(struct stats_page *p, size_t offset, size_t size)
{
    static _Atomic bool plain;
    size_t last = (offset + size - 1) / BLOCK;
    int saved = errno;

    for (size_t block = offset / BLOCK; block <= last; block++) {
        if (atomic_load_explicit(&populated[block], memory_order_relaxed))
            continue;
        if (!atomic_load_explicit(&plain, memory_order_relaxed)
            && madvise((char *)p + block * BLOCK, BLOCK, MADV_POPULATE_WRITE)) {
            bool unknown = errno == EINVAL;          /* before Linux 5.14, or larger pages */

            errno = saved;
            if (!unknown)
                return false;
            atomic_store_explicit(&plain, true, memory_order_relaxed);
        }
        atomic_store_explicit(&populated[block], 1, memory_order_relaxed);
    }
    return true;
}

/* The kernel's limit on file size is checked first: growing a memfd beyond it would be SIGXFSZ in the program. */
static uint32_t rows_allowed(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_FSIZE, &limit))
        return 0;
    if (limit.rlim_cur >= PAGE_SIZE_MAX)
        return STATS_ROWS;
    return limit.rlim_cur < page_size(ROWS_MIN) ? 0 : (limit.rlim_cur - ROWS_OFFSET) / sizeof(struct stats_row);
}

static int memory_file(size_t size)
{
    int fd = real.memfd_create(STATS_NAME, MFD_CLOEXEC | MFD_NOEXEC_SEAL);

    if (fd < 0 && errno == EINVAL)     /* before Linux 6.3 */
        fd = real.memfd_create(STATS_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (ftruncate(fd, (off_t)size) || real.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        real.close(fd);
        return -1;
    }
    return fd;
}

/* At `at` if given, replacing what is there. Mapped without rights and unlocked first: in a program that locks all its
 * memory to come (mlockall), the whole sparse page would become real memory otherwise. */
static struct stats_page *map(void *at, int fd, size_t size)
{
    void *p = mmap(NULL, size, PROT_NONE, MAP_SHARED, fd, 0);

    if (p == MAP_FAILED)
        return NULL;
    munlock(p, size);
    madvise(p, size, MADV_NOHUGEPAGE);
    if (mprotect(p, size, PROT_READ | PROT_WRITE)
        || (at && mremap(p, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED)) {
        munmap(p, size);
        return NULL;
    }
    return at ? at : p;
}

static bool still_ours(int fd)
{
    struct stat st;

    return fd >= 0 && !fstat(fd, &st) && st.st_dev == page_dev && st.st_ino == page_ino;
}

/* Takes ownership of `fd`. The descriptor that a child inherited keeps its number, whose place is known to be good. */
static void keep_descriptor(int fd)
{
    struct stat st;

    if (fstat(fd, &st)) {
        real.close(fd);
        return;
    }
    if (still_ours(page_fd) && real.dup3(fd, page_fd, O_CLOEXEC) >= 0)
        real.close(fd);
    else
        page_fd = hidden_fd(fd);
    page_dev = st.st_dev;
    page_ino = st.st_ino;
}

/* The descriptor of the new page, or -1. */
static int make(void)
{
    struct stats_page *old = atomic_load(&page), *p;
    uint32_t rows = old ? nrows : rows_allowed();
    int fd = rows && rows_allowed() >= rows ? memory_file(page_size(rows)) : -1;

    if (fd < 0)
        return -1;
    p = map(old, fd, page_size(rows));
    if (p)
        memset((void *)populated, 0, sizeof populated);
    if (!p || !populate(p, 0, sizeof *p)) {
        real.close(fd);
        if (p && !old)
            munmap(p, page_size(rows));
        return -1;
    }
    nrows = rows;
    p->version = STATS_VERSION;
    p->pid = (uint32_t)getpid();
    p->row_size = sizeof(struct stats_row);
    p->nrows = rows;
    p->rows = ROWS_OFFSET;
    p->started = now(CLOCK_REALTIME);
    p->table_generation = atomic_load(&generation);
    atomic_store(&p->engine_reason, atomic_load(&engine_why));
    atomic_store(&p->engine, atomic_load(&engine_state));
    atomic_thread_fence(memory_order_release);
    memcpy(p->magic, STATS_MAGIC, sizeof p->magic);
    atomic_store(&page, p);
    return fd;
}

static struct marker *make_marker(void)
{
    size_t size = getauxval(AT_PAGESZ);
    struct marker *none = NULL, *m = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (m == MAP_FAILED)
        return NULL;
    madvise(m, size, MADV_WIPEONFORK);
    if (atomic_compare_exchange_strong(&marker, &none, m))
        return m;
    munmap(m, size);
    return none;
}

/* Waits for another thread that makes the page, but not for ever. True: this thread is to make it. */
static bool claim(struct marker *m)
{
    uint64_t since = 0;

    for (;;) {
        uint32_t state = atomic_load(&m->state);

        if (state == READY || (state == FAILED && now(CLOCK_REALTIME_COARSE) - atomic_load(&looked) < SECOND))
            return false;
        if (state != MAKING) {
            if (atomic_compare_exchange_strong(&m->state, &state, MAKING))
                return true;
            continue;
        }
        uint64_t t = now(CLOCK_MONOTONIC);
        since = since ? since : t;
        if (t - since > WAIT_MAX)
            return false;
        sched_yield();
    }
}

static struct stats_page *slow(void)
{
    struct marker *m = atomic_load(&marker);
    bool child = atomic_load(&page) != NULL;
    void (*rewrite)(void);
    uint32_t state = MAKING;
    int fd;

    if (making || atomic_load(&frozen) || (!m && !(m = make_marker())))
        return NULL;
    if (!claim(m))
        return atomic_load(&m->state) == READY ? atomic_load(&page) : NULL;
    making = true;
    atomic_store(&replacing, true);
    fd = make();
    atomic_store(&looked, now(CLOCK_REALTIME_COARSE));
    making = false;
    if (!atomic_compare_exchange_strong(&m->state, &state, fd >= 0 ? READY : FAILED) || fd < 0) {
        if (fd >= 0)                   /* a signal handler forked in the midst of it, and this is the child */
            real.close(fd);
        atomic_store(&replacing, false);
        return NULL;
    }
    keep_descriptor(fd);               /* others need not wait for it: with threads, a larger table takes milliseconds */
    atomic_store(&replacing, false);
    rewrite = atomic_load(&on_new_page);
    if (child && rewrite)
        rewrite();
    return atomic_load(&page);
}

static bool ready(void)
{
    struct marker *m = atomic_load_explicit(&marker, memory_order_acquire);

    return m && atomic_load_explicit(&m->state, memory_order_acquire) == READY;
}

static struct stats_page *get(void)
{
    int saved = errno;
    struct stats_page *p;

    if (ready())
        return atomic_load_explicit(&page, memory_order_relaxed);
    p = slow();
    errno = saved;
    return p;
}

static void *row_words(struct stats_page *p, int fd)
{
    return (char *)p + ROWS_OFFSET + (size_t)fd * sizeof(struct stats_row);
}

static bool has_row(int fd)
{
    return fd >= 0 && (uint32_t)fd < nrows;
}

static uint32_t row_role(struct stats_page *p, int fd)
{
    return atomic_load_explicit(&((struct stats_row *)row_words(p, fd))->role, memory_order_relaxed);
}

/* The first `count` words of a row. */
static void row_store(struct stats_page *p, int fd, const uint64_t *words, size_t count)
{
    struct stats_row *row = row_words(p, fd);
    uint64_t *to = row_words(p, fd);
    uint64_t sequence = (atomic_load_explicit(&row->sequence, memory_order_relaxed) | 1) + 2;
    uint32_t top = atomic_load_explicit(&p->max_row, memory_order_relaxed);

    atomic_store_explicit(&row->sequence, sequence, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    for (size_t i = 0; i < count; i++)
        __atomic_store_n(&to[i], words[i], __ATOMIC_RELAXED);
    atomic_store_explicit(&row->sequence, sequence + 1, memory_order_release);
    while (top < (uint32_t)fd
           && !atomic_compare_exchange_weak_explicit(&p->max_row, &top, (uint32_t)fd, memory_order_relaxed,
                                                     memory_order_relaxed))
        ;
}

/* The contents move to a new memfd that is laid over the old one: what other threads write in that moment may be lost. */
static void replace_lost(struct stats_page *p)
{
    size_t size = page_size(nrows);
    struct stats_page *copy;
    int fd;

    fd = rows_allowed() >= nrows ? memory_file(size) : -1;
    copy = fd < 0 ? NULL : map(NULL, fd, size);
    for (size_t block = 0; copy && block * BLOCK < size; block++) {
        size_t offset = block * BLOCK, length = size - offset < BLOCK ? size - offset : BLOCK;

        if (!atomic_load_explicit(&populated[block], memory_order_relaxed))
            continue;
        if (madvise((char *)copy + offset, BLOCK, MADV_POPULATE_WRITE) && errno != EINVAL) {
            munmap(copy, size);
            copy = NULL;
            break;
        }
        memcpy((char *)copy + offset, (char *)p + offset, length);
    }
    if (copy && mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, p) == MAP_FAILED) {
        munmap(copy, size);
        copy = NULL;
    }
    if (copy)
        keep_descriptor(fd);
    else if (fd >= 0)
        real.close(fd);
}

static void look_after_descriptor(struct stats_page *p, uint64_t t)
{
    uint64_t last = atomic_load_explicit(&looked, memory_order_relaxed);
    int saved = errno;

    if (t - last < SECOND || atomic_load(&frozen) || atomic_exchange(&replacing, true))
        return;
    atomic_store(&looked, t);
    if (!still_ours(page_fd))
        replace_lost(p);
    atomic_store(&replacing, false);
    errno = saved;
}

/* Never 0, which a new row has. */
static uint64_t rule_key(uint32_t rule)
{
    return (atomic_load_explicit(&generation, memory_order_relaxed) ^ rule * 0x9e3779b97f4a7c15ull) | 1;
}

void stats_row_set(int fd, uint32_t role, int family, uint32_t provider, uint32_t reason, const struct endpoint *local,
                   const struct endpoint *remote, uint64_t inode, uint32_t rule, stats_rule_text *text)
{
    static const struct endpoint nobody;
    union {
        struct stats_row row;
        uint64_t words[sizeof(struct stats_row) / sizeof(uint64_t)];
    } u;
    struct stats_page *p = get();
    struct stats_row *row;
    uint64_t key = rule_key(rule);

    if (!p || !has_row(fd))
        return;
    atomic_init(&u.row.role, role);
    u.row.family = (uint32_t)family;
    u.row.provider = provider;
    u.row.reason = reason;
    u.row.local = local ? *local : nobody;
    u.row.remote = remote ? *remote : nobody;
    u.row.inode = inode;
    u.row.started = now(CLOCK_REALTIME_COARSE);
    look_after_descriptor(p, u.row.started);
    row = row_words(p, fd);
    if (!populate(p, (size_t)((char *)row - (char *)p), sizeof u.row))
        return;
    if (__atomic_load_n(&row->rule_key, __ATOMIC_RELAXED) == key) {
        row_store(p, fd, u.words, offsetof(struct stats_row, rule) / sizeof(uint64_t));
        return;
    }
    memset(u.row.rule, 0, sizeof u.row.rule);
    text(rule, u.row.rule, sizeof u.row.rule);
    row_store(p, fd, u.words, ROW_WORDS);
    __atomic_store_n(&row->rule_key, key, __ATOMIC_RELAXED);
}

/* A forked child that closes a socket with a row gets its page here: it is one that works with sockets, and the rest of
 * those that it inherited would show nowhere when its parent closes them. */
void stats_row_clear(int fd)
{
    struct stats_page *p = atomic_load_explicit(&page, memory_order_acquire);

    if (!p || !has_row(fd) || row_role(p, fd) == ROW_FREE)
        return;
    p = get();
    if (p && row_role(p, fd) != ROW_FREE)
        atomic_store_explicit(&((struct stats_row *)row_words(p, fd))->role, ROW_FREE, memory_order_release);
}

void stats_row_copy(int from, int to)
{
    struct stats_page *p = atomic_load_explicit(&page, memory_order_acquire);
    uint64_t words[ROW_WORDS], *source;

    if (!p || !has_row(from) || !has_row(to) || from == to)
        return;
    if (row_role(p, from) == ROW_FREE) {
        stats_row_clear(to);
        return;
    }
    p = get();
    if (!p)
        return;
    source = row_words(p, from);
    for (size_t i = 0; i < ROW_WORDS; i++)
        words[i] = __atomic_load_n(&source[i], __ATOMIC_RELAXED);
    if (populate(p, (size_t)((char *)row_words(p, to) - (char *)p), sizeof(struct stats_row)))
        row_store(p, to, words, ROW_WORDS);
    __atomic_store_n(&((struct stats_row *)row_words(p, to))->rule_key,
                     __atomic_load_n(&((struct stats_row *)row_words(p, from))->rule_key, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

static void count(_Atomic uint64_t *counter)
{
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

void stats_connection(uint32_t provider)
{
    struct stats_page *p = get();

    if (p && provider < STATS_PROVIDERS)
        count(&p->connections[provider]);
}

void stats_listener(uint32_t provider)
{
    struct stats_page *p = get();

    if (p && provider < STATS_PROVIDERS)
        count(&p->listeners[provider]);
}

void stats_reason(uint32_t reason)
{
    struct stats_page *p = get();

    if (p && reason < STATS_REASONS)
        count(&p->reasons[reason]);
}

void stats_upcall(void)
{
    struct stats_page *p = get();

    if (p)
        count(&p->upcalls);
}

void stats_engine(uint32_t state, uint32_t reason)
{
    struct stats_page *p;

    atomic_store(&engine_why, reason);
    atomic_store(&engine_state, state);
    p = get();
    if (!p)
        return;
    atomic_store_explicit(&p->engine_reason, reason, memory_order_relaxed);
    atomic_store_explicit(&p->engine, state, memory_order_release);
}

void stats_generation(uint64_t number)
{
    if (atomic_load_explicit(&generation, memory_order_relaxed) == number)
        return;
    atomic_store(&generation, number);
    if (ready())
        __atomic_store_n(&atomic_load(&page)->table_generation, number, __ATOMIC_RELAXED);
}

bool stats_yield(void)
{
    if (atomic_load(&frozen) || atomic_exchange(&replacing, true))
        return false;
    bool ours = still_ours(page_fd);
    if (ours) {
        hidden_close(page_fd);
        page_fd = -1;
        atomic_store(&looked, now(CLOCK_REALTIME_COARSE));
    }
    atomic_store(&replacing, false);
    return ours;
}

void stats_freeze(void)
{
    get();
    atomic_store(&frozen, true);
}

/* Where the kernel does not wipe the marker. The inherited descriptor stays until the new page takes its number. */
void stats_after_fork_child(void)
{
    struct marker *m = atomic_load(&marker);

    if (m)
        atomic_store(&m->state, NONE);
    making = false;
    atomic_store(&replacing, false);
}

void stats_on_new_page(void (*rewrite)(void))
{
    atomic_store(&on_new_page, rewrite);
}
