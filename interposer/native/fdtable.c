/* Owns the descriptor table, the pool of socket state and the hidden descriptors. Lock-free but for the per-socket
 * lock, which is held for a few instructions and never across a call. Runs after fork and in signal handlers. */
#include "fdtable.h"
#include "clock.h"
#include "companion.h"
#include "connecting.h"
#include "helper.h"
#include "lifecycle.h"
#include "provider_unix.h"
#include "private_epoll.h"
#include "readiness.h"
#include "real.h"
#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define HIDDEN_CEILING 16384           /* a larger kernel table costs every fork */
#define HIDDEN_DEPTH 64                /* below the limit, where there is no room above it */
#define LIMIT_MOMENTS 1000             /* for a holder that has to wait for a processor */
#define SPINS 10000                    /* of a lock that is held for a few instructions, before others may run */
#define RECLAIM 32                     /* parked sockets given up at a time */

_Atomic(_Atomic(struct sock *) *) fdtable_leaves[FDTABLE_LEAVES];
_Atomic bool fdtable_matters;
static _Atomic(struct sock *) first_leaf[FDTABLE_LEAF];
POOL(socks, struct sock);
static _Atomic bool outlived;          /* a listener was closed while a thread waited in accept() */
static _Atomic int limit_lock;         /* RLIMIT_NOFILE is raised for a moment */
static _Atomic int starting;           /* threads that are starting a process: it is not raised */
static struct sock hidden = {.refs = 1, .aliases = 1, .phase = SOCK_HIDDEN, .shadow = -1};

static _Atomic(struct sock *) *entry(int fd)
{
    unsigned number = (unsigned)fd;
    if (number >= FDTABLE_LEAF * FDTABLE_LEAVES)
        return NULL;
    _Atomic(_Atomic(struct sock *) *) *slot = &fdtable_leaves[number / FDTABLE_LEAF];
    _Atomic(struct sock *) *leaf = atomic_load_explicit(slot, memory_order_acquire);
    if (!leaf) {
        bool mapped = number >= FDTABLE_LEAF;
        _Atomic(struct sock *) *fresh = first_leaf, *expected = NULL;
        if (mapped) {
            fresh = mmap(NULL, sizeof first_leaf, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (fresh == MAP_FAILED)
                return NULL;
        }
        if (atomic_compare_exchange_strong(slot, &expected, fresh))
            leaf = fresh;
        else {
            leaf = expected;
            if (mapped)
                munmap(fresh, sizeof first_leaf);
        }
    }
    return &leaf[number % FDTABLE_LEAF];
}

static bool hold(struct sock *sock)
{
    uint32_t refs = atomic_load(&sock->refs);
    while (refs)
        if (atomic_compare_exchange_weak(&sock->refs, &refs, refs + 1))
            return true;
    return false;
}

struct sock *fdtable_get(int fd)
{
    for (int tries = 0; tries < 10000; tries++) {
        struct sock *sock = fdtable_peek(fd);
        if (!sock || sock == &hidden)
            break;
        if (!hold(sock))
            continue;                  /* given back between the two looks */
        if (fdtable_peek(fd) == sock)
            return sock;
        sock_put(sock);
    }
    return NULL;
}

struct sock *fdtable_at(uint32_t index)
{
    struct sock *sock = pool_at(&socks, index);
    return sock && hold(sock) ? sock : NULL;
}

struct search {
    const struct sock *sock;
    int fd;
};

static bool is_alias(int fd, struct sock *sock, void *context)
{
    struct search *search = context;
    if (sock != search->sock)
        return true;
    search->fd = fd;
    return false;
}

int fdtable_alias_of(const struct sock *sock, int hint)
{
    struct search search = {sock, -1};
    if (fdtable_peek(hint) == sock)
        return hint;
    fdtable_each(0, ~0u, is_alias, &search);
    return search.fd;
}

bool fdtable_same_file(int fd, int other)
{
    struct stat one, two;
    return fstat(fd, &one) == 0 && fstat(other, &two) == 0 && one.st_ino == two.st_ino && one.st_dev == two.st_dev;
}

void sock_put(struct sock *sock)
{
    if (atomic_fetch_sub(&sock->refs, 1) != 1)
        return;
    companion_dispose(sock);
    atomic_store(&sock->phase, SOCK_FREE);
    pool_give(&socks, sock);
}

struct sock *fdtable_new(int fd, int family, enum sock_phase phase)
{
    struct sock *sock = pool_take(&socks);
    if (!sock)
        return NULL;
    memset((char *)sock + offsetof(struct sock, aliases), 0,
           offsetof(struct sock, options) - offsetof(struct sock, aliases));
    sock->family = (uint8_t)family;
    sock->shadow = sock->epoll = sock->epoll_shared = -1;
    sock->rule = RULE_DEFAULT;
    if (phase != SOCK_FRESH && phase != SOCK_DECIDING && phase != SOCK_TCP)
        sock_becomes(sock, phase);
    else
        atomic_store(&sock->phase, phase);
    atomic_store(&sock->refs, 1);
    fdtable_alias(fd, sock);
    return sock;
}

static void drop_alias(struct sock *sock, int fd)
{
    int saved = errno;                 /* an epoll that is known here may be gone */
    readiness_forget_alias(sock, fd);
    atomic_fetch_sub(&sock->aliases, 1);
    sock_put(sock);
    errno = saved;
}

void fdtable_alias(int fd, struct sock *sock)
{
    _Atomic(struct sock *) *place = entry(fd);
    if (!place)
        return;
    atomic_fetch_add(&sock->refs, 1);
    atomic_fetch_add(&sock->aliases, 1);
    struct sock *old = atomic_exchange(place, sock);
    if (old && old != &hidden)
        drop_alias(old, fd);
}

void fdtable_drop(int fd)
{
    struct sock *known = fdtable_peek(fd);
    if (!known)
        return;
    if (atomic_load(&known->waiters) && atomic_load(&known->aliases) == 1) {   /* who waits in accept() is served still */
        outlived = true;
        atomic_store(&known->shadow, hidden_dup(fd));
    }
    struct sock *old = atomic_exchange(entry(fd), NULL);
    if (old && old != &hidden) {
        stats_row_clear(fd);
        drop_alias(old, fd);
    }
}

void fdtable_drop_if(int fd, struct sock *sock)
{
    if (atomic_compare_exchange_strong(entry(fd), &sock, NULL)) {
        stats_row_clear(fd);
        drop_alias(sock, fd);
    }
}

void fdtable_each(unsigned first, unsigned last, bool (*visit)(int fd, struct sock *sock, void *context), void *context)
{
    if (last >= FDTABLE_LEAF * FDTABLE_LEAVES)
        last = FDTABLE_LEAF * FDTABLE_LEAVES - 1;
    for (unsigned fd = first; fd <= last; fd++) {
        if (!atomic_load_explicit(&fdtable_leaves[fd / FDTABLE_LEAF], memory_order_acquire)) {
            fd |= FDTABLE_LEAF - 1;
            continue;
        }
        struct sock *sock = fdtable_peek((int)fd);
        if (sock && !visit((int)fd, sock, context))
            return;
    }
}

struct visitor {
    bool (*visit)(int fd, struct sock *sock, void *context);
    void *context;
};

static bool visit_held(int fd, struct sock *sock, void *context)
{
    struct visitor *visitor = context;
    sock = fdtable_get(fd);
    bool more = !sock || visitor->visit(fd, sock, visitor->context);
    if (sock)
        sock_put(sock);
    return more;
}

static _Atomic int visitors;           /* threads that use the numbers of others' sockets */

void fdtable_each_held(bool (*visit)(int fd, struct sock *sock, void *context), void *context)
{
    atomic_fetch_add(&visitors, 1);
    fdtable_each(0, ~0u, visit_held, &(struct visitor){visit, context});
    atomic_fetch_sub(&visitors, 1);
}

void fdtable_await_visitors(void)
{
    int64_t until = 0;
    while (atomic_load(&visitors) > 0)
        if (!clock_yield(&until, MOMENT_MS))
            atomic_store(&visitors, 0);   /* one that died, or that this thread has interrupted */
}

bool sock_lock(struct sock *sock)
{
    int64_t until = 0;
    uint8_t free = 0;
    int tries = 0;
    while (!atomic_compare_exchange_weak_explicit(&sock->lock, &free, 1, memory_order_acquire, memory_order_relaxed)) {
        if (++tries % SPINS == 0 && !clock_yield(&until, MOMENT_MS))   /* the holder may wait for this CPU */
            return false;
        free = 0;
    }
    return true;
}

void sock_unlock(struct sock *sock)
{
    atomic_store_explicit(&sock->lock, 0, memory_order_release);
}

/* The threads that held it otherwise do not exist here. */
static bool release_inherited(int fd, struct sock *sock, void *context)
{
    (void)context;
    if (sock == &hidden)
        return true;
    atomic_store(&sock->lock, 0);
    atomic_store(&sock->refs, atomic_load(&sock->aliases));
    atomic_store(&sock->waiters, 0);
    private_epoll_without_waiters(sock);
    if (sock_phase(sock) == SOCK_DECIDING)
        atomic_store(&sock->phase, SOCK_TCP);
    connecting_after_fork_child(sock, fd);
    return true;
}

/* A listener that only another thread's accept() kept. */
static void end_outlived(void)
{
    struct sock *sock;
    for (uint32_t i = 0; (sock = pool_at(&socks, i)); i++)
        if (atomic_load(&sock->waiters) && !atomic_load(&sock->aliases)) {
            atomic_store(&sock->waiters, 0);
            atomic_store(&sock->refs, 1);
            sock_put(sock);
        }
}

static bool end_connecting(int fd, struct sock *sock, void *context)
{
    (void)fd, (void)context;
    if (sock != &hidden)
        connecting_end_in_child(sock);
    return true;
}

/* Bounded: in a signal handler the holder may be the thread that it interrupted. */
static bool take_limit(void)
{
    int64_t until = 0;
    for (int tries = 1; atomic_exchange_explicit(&limit_lock, 1, memory_order_acquire); tries++)
        if (tries % SPINS == 0 && !clock_yield(&until, MOMENT_MS))
            return false;
    return true;
}

void fdtable_after_fork_child(void)
{
    limit_lock = starting = visitors = 0;
    connecting_unlock_in_child();
    fdtable_each(0, ~0u, release_inherited, NULL);
    if (outlived)
        end_outlived();
    if (connecting_count)
        fdtable_each(0, ~0u, end_connecting, NULL);
    connecting_count = 0;
}

void fdtable_before_fork(void)
{
    hidden_before_start();
}

void fdtable_after_fork_parent(void)
{
    hidden_after_start();
}

static bool reclaim(int fd, struct sock *sock, void *context)
{
    int *left = context;
    (void)fd;
    int shadow = sock_phase(sock) == SOCK_CONNECTED ? atomic_exchange(&sock->shadow, -1) : -1;
    if (shadow >= 0) {
        hidden_close(shadow);
        --*left;
    }
    return *left > 0;
}

/* One listener at a time. */
static bool reclaim_listener(int fd, struct sock *sock, void *context)
{
    bool *done = context;
    *done = sock_phase(sock) == SOCK_LISTENING && companion_yield(sock, fd);
    return !*done;
}

static bool reclaim_epoll(int fd, struct sock *sock, void *context)
{
    (void)fd;
    *(bool *)context |= sock_phase(sock) != SOCK_HIDDEN && readiness_yield(sock);
    return true;
}

extern char __libc_single_threaded __attribute__((weak));

bool hidden_reclaim(void)
{
    int left = RECLAIM, saved = errno;
    if (!lifecycle_active || lifecycle_borrowed())   /* borrowed: the hidden ones are the parent's */
        return false;
    fdtable_each(0, ~0u, reclaim, &left);
    bool done = left < RECLAIM || helper_yield();
    if (!done && &__libc_single_threaded && __libc_single_threaded) {   /* another thread could be using them */
        fdtable_each(0, ~0u, reclaim_epoll, &done);
        done |= provider_unix_yield();
        done |= stats_yield();
    }
    if (!done)
        fdtable_each(0, ~0u, reclaim_listener, &done);
    errno = saved;
    return done;
}

bool hidden_give(_Atomic int *place)
{
    int fd = atomic_exchange(place, -1);
    bool ours = fd >= 0 && hidden_is(fd);
    hidden_close(fd);
    return ours;
}

void hidden_before_start(void)
{
    const struct timespec moment = {0, 50000};
    int saved = errno;
    atomic_fetch_add(&starting, 1);
    /* Bounded: a signal handler may have interrupted the holder. By number: no thread may be cancelled here. */
    for (int tries = 0; tries < LIMIT_MOMENTS && limit_lock; tries++)
        real.syscall(SYS_nanosleep, (long)&moment, 0, 0, 0, 0, 0);
    errno = saved;
}

void hidden_after_start(void)
{
    atomic_fetch_sub(&starting, 1);
}

/* Just above the soft limit: the program loses no number. The limit is raised for this one call. */
static int above_limit(int fd, const struct rlimit *limit)
{
    struct rlimit seen;
    int copy = -1;
    rlim_t room = limit->rlim_max - limit->rlim_cur;
    struct rlimit raised = {limit->rlim_cur + (room < HIDDEN_CEILING ? room : HIDDEN_CEILING), limit->rlim_max};
    if (!take_limit())
        return -1;
    if (!starting && prlimit(0, RLIMIT_NOFILE, &raised, &seen) == 0) {
        if (seen.rlim_cur == limit->rlim_cur)
            copy = real.fcntl(fd, F_DUPFD_CLOEXEC, (long)limit->rlim_cur);
        struct rlimit restored = seen;
        if (prlimit(0, RLIMIT_NOFILE, &restored, &seen) == 0 && seen.rlim_cur != raised.rlim_cur)
            setrlimit(RLIMIT_NOFILE, &seen);   /* the program has just set its own */
    }
    limit_lock = 0;
    return copy;
}

/* As high below the limit as there is room. A program that may have only a few descriptors gets all of them. */
static int below_limit(int fd, const struct rlimit *limit)
{
    static _Atomic rlim_t depth = HIDDEN_DEPTH;
    rlim_t top = limit->rlim_cur < HIDDEN_CEILING ? limit->rlim_cur : HIDDEN_CEILING;
    if (top < HIDDEN_DEPTH)
        return -1;
    for (;;) {
        rlim_t below = depth < top ? depth : top;
        int copy = real.fcntl(fd, F_DUPFD_CLOEXEC, (long)(top - below));
        if (copy >= 0 || below == top)
            return copy;
        depth = below * 4;
    }
}

static int high_dup(int fd, bool to_park)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || (to_park && (rlim_t)fd >= limit.rlim_cur))
        return -1;
    int copy = limit.rlim_max > limit.rlim_cur && limit.rlim_cur < HIDDEN_CEILING ? above_limit(fd, &limit) : -1;
    return copy < 0 ? below_limit(fd, &limit) : copy;
}

static void mark_hidden(int fd)
{
    _Atomic(struct sock *) *place = entry(fd);
    struct sock *old = place ? atomic_exchange(place, &hidden) : NULL;
    if (old && old != &hidden)         /* closed by an instruction that no hook saw */
        drop_alias(old, fd);
}

void hidden_adopt(int fd)
{
    int saved = errno;
    mark_hidden(fd);
    real.fcntl(fd, F_SETFD, FD_CLOEXEC);
    errno = saved;
}

static int hide(int fd, bool to_park)
{
    int saved = errno, copy = high_dup(fd, to_park);
    if (copy >= 0)
        mark_hidden(copy);
    errno = saved;
    return copy;
}

int hidden_dup(int fd)
{
    return hide(fd, false);
}

static bool is_below(int fd, struct sock *sock, void *context)
{
    struct search *search = context;
    if (sock == search->sock && fd >= search->fd)
        search->sock = NULL;
    return search->sock;
}

int hidden_park(const struct sock *sock, int fd)
{
    struct rlimit limit;
    if (atomic_load(&sock->aliases) > 1) {
        if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
            return -1;
        struct search search = {sock, limit.rlim_cur < INT32_MAX ? (int)limit.rlim_cur : INT32_MAX};
        fdtable_each(0, ~0u, is_below, &search);
        if (!search.sock)
            return -1;
    }
    return hide(fd, true);
}

int hidden_fd(int fd)
{
    if (fd < 0)
        return -1;
    int copy = hidden_dup(fd);
    int saved = errno;
    real.close(fd);
    errno = saved;
    return copy;
}

void hidden_prepare(void)
{
    int saved = errno;
    hidden_close(hidden_fd(real.open("/", O_PATH | O_CLOEXEC, 0)));
    errno = saved;
}

bool hidden_is(int fd)
{
    return fdtable_peek(fd) == &hidden;
}

void hidden_close(int fd)
{
    if (fd < 0)
        return;
    int saved = errno;
    struct sock *expected = &hidden;   /* of two threads one closes */
    if (hidden_is(fd) && atomic_compare_exchange_strong(entry(fd), &expected, NULL))
        real.close(fd);
    errno = saved;
}
