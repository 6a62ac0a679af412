/* Owns what processes that share a socket know of it together: words of a page that forked ones share, and words that the
 * kernel keeps in the sockets themselves. No lock. Runs after fork. */
#include "common.h"
#include "companion.h"
#include "lifecycle.h"
#include "real.h"
#include "sandbox.h"
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>

/* What forked processes share of a listener: a word on a page of theirs, its number above, COMMON_* below. A listener whose
 * word another has taken is each process's own. The first word counts. */
#define COMMON_WORDS 4096
#define COMMON_TRIES 64
enum { COMMON_WAITED = 1, COMMON_ACCEPTED = 2, COMMON_NONBLOCKING = 4, COMMON_SHUT = 8, COMMON_LEFT = 16, COMMON_HANDED_ON = 32 };

static _Atomic(_Atomic uint64_t *) words;

/* A word of every socket that only TCP and UDP use: all ones in one of AF_UNIX, unless something is kept there. */
static unsigned kept(int fd)
{
    unsigned word = ~0u;
    int saved = errno;
    socklen_t length = sizeof word;
    if (!sandbox_closed && real.getsockopt(fd, SOL_SOCKET, SO_INCOMING_CPU, &word, &length) < 0)
        errno = saved;
    return word;
}

static void keep(int fd, unsigned word)
{
    int saved = errno;
    if (!sandbox_closed && real.setsockopt(fd, SOL_SOCKET, SO_INCOMING_CPU, &word, sizeof word) < 0)
        errno = saved;
}

#define MARKED 0x53414e00u             /* in a connection's word, above its marks */
#define MARKS 0xffu

unsigned common_marks(int fd)
{
    unsigned word = kept(fd);
    return (word & ~MARKS) == MARKED ? word & MARKS : 0;
}

void common_mark(int fd, unsigned marks)
{
    unsigned before = common_marks(fd);
    if ((before | marks) != before)
        keep(fd, MARKED | before | marks);
}

void common_recall(struct sock *sock, int fd)
{
    unsigned marks = sock->shut_write || sock->fork_count == lifecycle_forks() ? 0 : common_marks(fd);
    if (marks & MARK_SHUT_WRITE)
        sock->shut_write = true;
    if (marks & MARK_SHUT_READ)
        atomic_fetch_or(&sock->slow, SLOW_SHUT_READ);
}

static _Atomic uint64_t *place(uint32_t number)
{
    return &atomic_load_explicit(&words, memory_order_relaxed)[1 + number % (COMMON_WORDS - 1)];
}

/* The word, or `otherwise` where there is none. */
static uint32_t word_of(const struct sock *sock, uint32_t otherwise)
{
    uint32_t number = atomic_load_explicit(&sock->common, memory_order_relaxed);
    uint64_t word = number ? atomic_load_explicit(place(number), memory_order_relaxed) : 0;
    return word >> 32 == number && number ? (uint32_t)word : otherwise;
}

static void change(const struct sock *sock, uint32_t clear, uint32_t set)
{
    uint32_t number = atomic_load_explicit(&sock->common, memory_order_relaxed);
    uint64_t word = number ? atomic_load(place(number)) : 0;
    while (number && word >> 32 == number &&
           !atomic_compare_exchange_weak(place(number), &word, (word & ~(uint64_t)clear) | set))
        continue;
}

static _Atomic uint64_t *get_page(void)
{
    _Atomic uint64_t *page = atomic_load(&words), *none = NULL;
    size_t size = COMMON_WORDS * sizeof *page;
    if (page)
        return page;
    page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return NULL;
    if (atomic_compare_exchange_strong(&words, &none, page))
        return page;
    munmap((void *)(uintptr_t)page, size);
    return none;
}

/* Where no other process can know the listener, its word is the next one's. */
void common_give(struct sock *sock)
{
    uint32_t number = atomic_exchange(&sock->common, 0);
    uint64_t word = number ? atomic_load(place(number)) : 0;
    if (number && word >> 32 == number && sock->fork_count == lifecycle_forks())
        atomic_compare_exchange_strong(place(number), &word, 0);
}

/* Where all words are taken, another listener's. */
void common_take(struct sock *sock)
{
    _Atomic uint64_t *page = get_page();
    uint32_t number = 0;
    common_give(sock);
    for (int tries = 0; page && tries < COMMON_TRIES; tries++) {
        uint64_t nobody = 0;
        do
            number = (uint32_t)atomic_fetch_add(page, 1);
        while (!number);
        if (atomic_compare_exchange_strong(place(number), &nobody, (uint64_t)number << 32))
            break;
        if (tries == COMMON_TRIES - 1)
            atomic_store(place(number), (uint64_t)number << 32);
    }
    atomic_store(&sock->common, number);
    common_set_nonblocking(sock, sock->nonblocking);
}

/* In a listener's word, for every program that has its companions: who accepts, or is about to become another program. */
#define TOLD 0x4c000000u
enum { TOLD_PID = (1 << 23) - 1, TOLD_NONBLOCKING = 1 << 23, TOLD_GOES = 1 << 24 };

static unsigned told(const struct sock *sock, int index)
{
    unsigned word = kept(companion_poll_fd(sock, index));
    return word >> 25 == TOLD >> 25 ? word & ~TOLD : 0;
}

static void tell_programs(const struct sock *sock, unsigned clear, unsigned set)
{
    for (int i = 0; i < sock->ncompanions; i++)
        keep(companion_poll_fd(sock, i), TOLD | (told(sock, i) & ~clear) | set);
}

bool common_is_handed_on(const struct sock *sock)
{
    return word_of(sock, sock->handed_on ? COMMON_HANDED_ON : 0) & COMMON_HANDED_ON;
}

void common_hand_on(struct sock *sock)
{
    bool on = common_is_nonblocking(sock);
    sock->handed_on = true;
    change(sock, 0, COMMON_HANDED_ON);
    common_set_nonblocking(sock, on);
}

void common_adopt(struct sock *sock)
{
    sock->nonblocking = told(sock, 0) & TOLD_NONBLOCKING;
    common_take(sock);
    sock->handed_on = true;
    change(sock, 0, COMMON_HANDED_ON);
}

bool common_is_nonblocking(const struct sock *sock)
{
    if (common_is_handed_on(sock) && sock->ncompanions && !sandbox_closed)
        return told(sock, 0) & TOLD_NONBLOCKING;
    return word_of(sock, sock->nonblocking ? COMMON_NONBLOCKING : 0) & COMMON_NONBLOCKING;
}

void common_set_nonblocking(struct sock *sock, bool on)
{
    sock->nonblocking = on;
    change(sock, COMMON_NONBLOCKING, on ? COMMON_NONBLOCKING : 0);
    if (common_is_handed_on(sock))
        tell_programs(sock, TOLD_NONBLOCKING, on ? TOLD_NONBLOCKING : 0);
}

void common_tell_shut(const struct sock *sock)
{
    change(sock, 0, COMMON_SHUT);
}

bool common_is_shut(const struct sock *sock)
{
    return word_of(sock, 0) & COMMON_SHUT;
}

void common_tell_left(const struct sock *sock)
{
    change(sock, 0, COMMON_LEFT);
}

bool common_is_left(const struct sock *sock)
{
    return word_of(sock, 0) & COMMON_LEFT;
}

void common_mark_waiting(const struct sock *sock)
{
    if (!(word_of(sock, COMMON_WAITED) & COMMON_WAITED))
        change(sock, 0, COMMON_WAITED);
}

void common_mark_accepting(const struct sock *sock)
{
    if (word_of(sock, COMMON_ACCEPTED) & COMMON_ACCEPTED)
        return;
    change(sock, 0, COMMON_ACCEPTED);
    tell_programs(sock, TOLD_PID | TOLD_GOES, (unsigned)lifecycle_pid);
}

void common_tell_exec(const struct sock *sock, bool goes)
{
    unsigned pid = goes || word_of(sock, COMMON_ACCEPTED) & COMMON_ACCEPTED ? (unsigned)lifecycle_pid : 0;
    tell_programs(sock, TOLD_PID | TOLD_GOES, pid | (goes ? TOLD_GOES : 0));
}

bool common_came_by_exec(const struct sock *sock)
{
    bool came = (told(sock, 0) & ~(unsigned)TOLD_NONBLOCKING) == (TOLD_GOES | (unsigned)lifecycle_pid);
    if (came)
        tell_programs(sock, TOLD_PID | TOLD_GOES, 0);
    return came;
}

/* Another program, which has made them or got them. */
static bool accepted_elsewhere(const struct sock *sock)
{
    int saved = errno;
    bool found = false;
    for (int i = 0; i < sock->ncompanions; i++) {
        unsigned word = told(sock, i), pid = word & TOLD_PID;
        found |= pid && !(word & TOLD_GOES) && (kill((pid_t)pid, 0) == 0 || errno == EPERM);
    }
    errno = saved;
    return found;
}

bool common_is_accepting(const struct sock *sock)
{
    return word_of(sock, COMMON_ACCEPTED) & COMMON_ACCEPTED || accepted_elsewhere(sock);
}

bool common_is_served(const struct sock *sock)
{
    return word_of(sock, COMMON_WAITED) & (COMMON_WAITED | COMMON_ACCEPTED);
}
