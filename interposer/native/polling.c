/* Owns nothing but the size of the descriptor table that select() would see. No lock is held while waiting. */
#include "polling.h"
#include "cleanup.h"
#include "clock.h"
#include "common.h"
#include "companion.h"
#include "lifecycle.h"
#include "private_epoll.h"
#include "sandbox.h"
#include "switch.h"
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* --- poll --- */

#define LONG_WAIT_S 1000000000l
#define MANY 1024                      /* descriptors in one call */
#define COPIED 0x1000                  /* an event that no file shows: of a polling_copy() */
/* What the hang-up of an AF_UNIX socket never comes without. */
#define WITH_HANG_UP (POLLIN | POLLRDNORM | POLLRDHUP | POLLOUT | POLLWRNORM | POLLWRBAND)

/* Nothing that TCP would show: the peer has closed, and the program has asked for neither direction. */
static bool only_hangs_up(struct sock *sock, const struct pollfd *entry)
{
    struct pollfd look = {entry->fd, entry->events, 0};
    if (sock->shut_write || real.poll(&look, 1, 0) != 1 || look.revents != POLLHUP)
        return false;
    common_recall(sock, entry->fd);
    return !sock->shut_write;
}

/* A hang-up that is not to be shown would end every wait. An epoll that has told of it waits for what comes after; where no
 * descriptor is free for it, nobody does: nothing comes from the peer any more. */
static int past_hang_up(struct sock *sock, const struct pollfd *entry)
{
    struct epoll_event told;
    if (!only_hangs_up(sock, entry))
        return entry->fd;
    int private = private_epoll(sock, entry->fd);
    if (private < 0)
        return -1;
    epoll_wait(private, &told, 1, 0);
    return only_hangs_up(sock, entry) ? private : entry->fd;
}

struct pollfd polling_copy(const struct pollfd *entry)
{
    struct pollfd copy = {sandbox_closed ? -1 : hidden_dup(entry->fd), entry->events | COPIED, 0};
    return copy.fd < 0 ? *entry : copy;
}

struct copies {
    struct pollfd *fds;
    nfds_t count;
};

/* One that the program has closed by an instruction of its own may be another's by now. */
static void close_copies(void *argument)
{
    struct copies *copies = argument;
    for (nfds_t i = 0; i < copies->count; i++)
        if (copies->fds[i].events & COPIED && !(copies->fds[i].revents & POLLNVAL))
            hidden_close(copies->fds[i].fd);
}

static int sleep_on_copies(struct copies copies, const struct timespec *timeout, const sigset_t *mask)
{
    int result;
    pthread_cleanup_push(close_copies, &copies);
    result = real.ppoll(copies.fds, copies.count, timeout, mask);
    pthread_cleanup_pop(1);
    return result;
}

int polling_sleep(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    for (nfds_t i = 0; i < count; i++)
        if (fds[i].events & COPIED)
            return sleep_on_copies((struct copies){fds, count}, timeout, mask);
    return real.ppoll(fds, count, timeout, mask);
}

/* Who waits in the place of a descriptor: a private epoll of a listener, or of a connection that hung up, or nobody; a copy
 * of one that is connecting; else itself. */
static struct pollfd stand_in(const struct pollfd *entry)
{
    struct sock *sock = fdtable_peek(entry->fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_FREE;
    struct pollfd other = *entry;
    if (phase == SOCK_CONNECTING)
        return polling_copy(entry);
    if (phase != SOCK_LISTENING && phase != SOCK_INHERITED && (phase != SOCK_CONNECTED || entry->events & WITH_HANG_UP))
        return *entry;
    sock = fdtable_get(entry->fd);
    if (!sock)
        return *entry;
    switch_serve(sock, entry->fd);
    if (sock_phase(sock) == SOCK_LISTENING && !companion_is_alone(sock))
        companion_ask(sock, entry->fd);
    if (sock_phase(sock) == SOCK_LISTENING)
        companion_serve(sock, entry->fd);
    if (sock_phase(sock) == SOCK_LISTENING) {
        int private = private_epoll(sock, entry->fd);
        if (private >= 0)
            other = (struct pollfd){private, entry->events & (POLLIN | POLLRDNORM), 0};
    } else if (sock_phase(sock) == SOCK_CONNECTED) {
        other.fd = past_hang_up(sock, entry);
        if (other.fd != entry->fd)
            other.events = POLLIN;
    }
    sock_put(sock);
    return other;
}

static bool is_listener(int fd)
{
    struct sock *sock = fdtable_peek(fd);
    return sock && sock_phase(sock) == SOCK_LISTENING && !common_is_shut(sock);
}

/* Has the program shut its reading side? The kernel was not told (data.c), so it shows nothing. */
static bool is_shut(int fd)
{
    struct sock *sock = fdtable_companion(fd);
    return sock && sock_is_slow(sock, SLOW_SHUT_READ);
}

/* The kernel adds POLLHUP when the peer of an AF_UNIX socket has closed; TCP only when both directions are shut. */
static short without_hang_up(int fd, short events)
{
    struct sock *sock = events & (POLLHUP | POLLERR) ? fdtable_companion(fd) : NULL;
    if (!sock || sock_phase(sock) == SOCK_CONNECTING)
        return events;
    if (events & POLLERR)
        sock_is_over(sock);
    common_recall(sock, fd);
    return sock->shut_write ? events : events & (short)~POLLHUP;
}

/* What the kernel shows is the truth, or shows a hang-up too many, or is not all. */
enum { KERNEL_ALONE, KERNEL_MASKED, KERNEL_HELPED };

/* What the kernel refuses may be more than the program's memory holds. */
static bool is_too_many(nfds_t count)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_NOFILE, &limit) == 0 && count > limit.rlim_cur;
}

static inline unsigned needs(int fd, short events)
{
    struct sock *sock = fdtable_peek(fd);
    if (!sock)
        return KERNEL_ALONE;
    switch (sock_phase(sock)) {
    case SOCK_INHERITED:
    case SOCK_LISTENING: return KERNEL_HELPED;
    case SOCK_CONNECTED:
    case SOCK_CONNECTING:
        return sock_is_slow(sock, SLOW_SHUT_READ | SLOW_CONNECTING) || !(events & WITH_HANG_UP) ? KERNEL_HELPED
                                                                                                : KERNEL_MASKED;
    default: return atomic_load_explicit(&sock->connect_error, memory_order_relaxed) ? KERNEL_HELPED : KERNEL_ALONE;
    }
}

static inline unsigned most_needed(const struct pollfd *fds, nfds_t count)
{
    unsigned most = KERNEL_ALONE;
    if (count > MANY && is_too_many(count))
        return most;
    for (nfds_t i = 0; i < count; i++) {
        unsigned need = needs(fds[i].fd, fds[i].events);
        most = need > most ? need : most;
    }
    return most;
}

/* What to show for one descriptor, of which the kernel showed `events` where it looked. */
static short shown(struct pollfd *entry, int via, short events)
{
    const short ended = POLLIN | POLLRDNORM | POLLRDHUP;
    struct sock *sock = fdtable_peek(entry->fd);
    /* Who stood in for it may be gone: a listener was shut down, a connect has ended. */
    bool lost = via != entry->fd && events & POLLNVAL;   /* closed by an instruction of the program's own */
    if (lost)
        hidden_close(via);
    if (events && (via != entry->fd ? lost || !is_listener(entry->fd) : sock && events & POLLHUP)) {
        struct pollfd look = {entry->fd, entry->events, 0};
        real.poll(&look, 1, 0);
        events = look.revents;
    }
    if (entry->events & ended && is_shut(entry->fd))
        events |= entry->events & ended;
    if (sock && atomic_load_explicit(&sock->connect_error, memory_order_relaxed))
        events |= POLLERR | POLLHUP;   /* the kernel has told the switch */
    return without_hang_up(entry->fd, events);
}

/* Where no descriptor is free for a listener's epoll, its companions are asked beside it. */
static nfds_t ask_companions(int fd, struct pollfd *out)
{
    struct sock *sock = is_listener(fd) ? fdtable_get(fd) : NULL;
    nfds_t count = 0;
    for (int i = 0; sock && sock_phase(sock) == SOCK_LISTENING && i < sock->ncompanions; i++)
        out[count++] = (struct pollfd){companion_poll_fd(sock, i), POLLIN, 0};
    if (sock)
        sock_put(sock);
    return count;
}

static short companions_show(const struct pollfd *entry, const struct pollfd *asked, nfds_t count)
{
    struct sock *sock = count && is_listener(entry->fd) ? fdtable_get(entry->fd) : NULL;
    short events = 0;
    for (nfds_t i = 0; sock && i < count; i++)
        for (int j = 0; asked[i].revents && j < sock->ncompanions; j++)
            if (companion_poll_fd(sock, j) == asked[i].fd)
                events = entry->events & (POLLIN | POLLRDNORM);
    if (sock)
        sock_put(sock);
    return events;
}

static bool is_timeout(const struct timespec *time)
{
    return time->tv_sec >= 0 && time->tv_nsec >= 0 && time->tv_nsec < 1000000000;
}

static int poll_with_help(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    if (timeout && !is_timeout(timeout))
        return real.ppoll(fds, count, timeout, mask);
    struct pollfd few[64], *copy = few;
    nfds_t listeners = 0;
    for (nfds_t i = 0; i < count; i++)
        listeners += is_listener(fds[i].fd);
    size_t room = count + listeners * PROVIDERS_MAX, size = room * sizeof *fds;
    if (room > sizeof few / sizeof *few) {
        copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (copy == MAP_FAILED) {
            errno = ENOMEM;
            return -1;
        }
    }
    static const struct timespec at_once;
    int64_t deadline = timeout && timeout->tv_sec < LONG_WAIT_S
                           ? clock_ns(CLOCK_MONOTONIC) + timeout->tv_sec * 1000000000ll + timeout->tv_nsec : INT64_MAX;
    struct timespec left = timeout ? *timeout : at_once;
    int result, ready, saved, before = errno;
    do {                               /* until there is something to show: who stood in may have been woken to go */
        bool some = false;
        nfds_t asked = count;
        for (nfds_t i = 0; i < count; i++) {
            copy[i] = stand_in(&fds[i]);
            if (copy[i].fd == fds[i].fd && asked + PROVIDERS_MAX <= room)
                asked += ask_companions(fds[i].fd, &copy[asked]);
            some |= shown(&fds[i], fds[i].fd, 0) != 0;
        }
        errno = before;
        result = polling_sleep(copy, asked, some ? &at_once : timeout ? &left : NULL, mask);
        saved = errno;
        ready = 0;
        for (nfds_t i = 0; (result >= 0 || saved == EINTR) && i < count; i++) {
            short events = copy[i].revents | companions_show(&fds[i], &copy[count], asked - count);
            fds[i].revents = result < 0 ? 0 : shown(&fds[i], copy[i].fd, events);
            ready += fds[i].revents != 0;
        }
        int64_t rest = deadline - clock_ns(CLOCK_MONOTONIC);
        left = rest > 0 ? (struct timespec){rest / 1000000000, rest % 1000000000} : at_once;
    } while (result > 0 && !ready && (left.tv_sec || left.tv_nsec));
    if (copy != few)
        munmap(copy, size);
    errno = saved;
    return result < 0 ? result : ready;
}

/* A hang-up that came without anything else stays where the call was to wait for something. */
static int mask_hang_ups(struct pollfd *fds, nfds_t count, int ready, bool waits)
{
    for (nfds_t i = 0; ready > 0 && i < count; i++) {
        short events = without_hang_up(fds[i].fd, fds[i].revents);
        if (events == fds[i].revents || (!events && waits))
            continue;
        fds[i].revents = events;
        ready -= !events;
    }
    return ready;
}

int polling_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    unsigned need = most_needed(fds, count);
    if (need == KERNEL_HELPED)
        return poll_with_help(fds, count, timeout, mask);
    int result = real.ppoll(fds, count, timeout, mask);
    return need == KERNEL_ALONE ? result : mask_hang_ups(fds, count, result, !timeout || timeout->tv_sec || timeout->tv_nsec);
}

int polling_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    unsigned need = most_needed(fds, count);
    if (need == KERNEL_ALONE)
        return real.poll(fds, count, timeout);
    if (need == KERNEL_HELPED) {
        struct timespec limit = {timeout / 1000, timeout % 1000 * 1000000L};
        return poll_with_help(fds, count, timeout < 0 ? NULL : &limit, NULL);
    }
    int result = real.poll(fds, count, timeout);
    return mask_hang_ups(fds, count, result, timeout != 0);
}

/* --- select --- */

#define WORD_BITS (8 * (int)sizeof(unsigned long))

static unsigned long word(const fd_set *set, int index)
{
    return set ? ((const unsigned long *)(const void *)set)[index] : 0;
}

/* Has the program any descriptor among these numbers? */
static bool has_descriptors(int first, int last)
{
    struct pollfd look[256];
    while (first < last) {
        int count = 0;
        for (; count < (int)(sizeof look / sizeof *look) && first < last; first++)
            if (!hidden_is(first))
                look[count++] = (struct pollfd){first, 0, 0};
        if (real.poll(look, (nfds_t)count, 0) < 0)
            return false;
        while (count--)
            if (!(look[count].revents & POLLNVAL))
                return true;
    }
    return false;
}

static _Atomic bool looked_up;

/* Numbers are given lowest first, so that a higher one is found from the next power of two; but for dup2(). */
void polling_high_number(void)
{
    looked_up = false;
}

int polling_select_bound(int count)
{
    static _Atomic int places = FD_SETSIZE;
    int bound = places;
    bool all = !looked_up, grown = true;
    if (!lifecycle_active || sandbox_closed)
        return lifecycle_active && count > bound ? bound : count;
    looked_up = true;
    for (int from = bound, to; from < count && (all || grown); from = to) {
        to = from <= INT_MAX / 2 ? from * 2 : INT_MAX;
        grown = has_descriptors(from, to < count ? to : count);
        if (grown)
            places = bound = to;
    }
    return count < bound ? count : bound;
}

bool polling_selects(int count, const fd_set *in, const fd_set *out, const fd_set *except)
{
    for (int first = 0; first < count; first += WORD_BITS) {
        unsigned long bits = word(in, first / WORD_BITS) | word(out, first / WORD_BITS) | word(except, first / WORD_BITS);
        for (; bits; bits &= bits - 1) {
            int fd = first + __builtin_ctzl(bits);
            if (fd < count && needs(fd, WITH_HANG_UP) == KERNEL_HELPED)
                return true;
        }
    }
    return false;
}

static bool holds(const fd_set *set, int fd)
{
    return word(set, fd / WORD_BITS) >> fd % WORD_BITS & 1;
}

static int keep(fd_set *set, int fd, bool ready)
{
    if (!holds(set, fd))
        return 0;
    unsigned long *words = (unsigned long *)(void *)set;
    if (ready)
        return 1;
    words[fd / WORD_BITS] &= ~(1ul << fd % WORD_BITS);
    return 0;
}

/* select() over a set with a listener: ppoll, because hidden descriptors may exceed FD_SETSIZE. */
int polling_select(int count, fd_set *in, fd_set *out, fd_set *except, struct timespec *timeout, const sigset_t *mask)
{
    size_t size = (size_t)count * sizeof(struct pollfd);
    struct pollfd few[64], *fds = few;
    if (count > (int)(sizeof few / sizeof *few)) {
        fds = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fds == MAP_FAILED) {
            errno = ENOMEM;
            return -1;
        }
    }
    nfds_t used = 0;
    for (int fd = 0; fd < count; fd++) {
        short events = (short)((holds(in, fd) ? POLLIN | POLLRDNORM | POLLRDBAND : 0) |
                               (holds(out, fd) ? POLLOUT | POLLWRNORM | POLLWRBAND : 0) | (holds(except, fd) ? POLLPRI : 0));
        if (events)
            fds[used++] = (struct pollfd){fd, events, 0};
    }
    int64_t start = timeout ? clock_ns(CLOCK_MONOTONIC) : 0;
    int result = polling_ppoll(fds, used, timeout, mask), saved = errno;
    if (timeout && is_timeout(timeout)) {   /* Linux tells how much time was left */
        int64_t passed = clock_ns(CLOCK_MONOTONIC) - start;
        timeout->tv_sec -= passed / 1000000000;
        timeout->tv_nsec -= passed % 1000000000;
        if (timeout->tv_nsec < 0) {
            timeout->tv_sec--;
            timeout->tv_nsec += 1000000000;
        }
        if (timeout->tv_sec < 0)
            *timeout = (struct timespec){0};
    }
    for (nfds_t i = 0; i < used && result >= 0; i++)
        if (fds[i].revents & POLLNVAL) {
            result = -1;
            saved = EBADF;
        }
    if (result >= 0) {
        result = 0;
        for (nfds_t i = 0; i < used; i++) {
            short events = fds[i].revents;
            result += keep(in, fds[i].fd, events & (POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR));
            result += keep(out, fds[i].fd, events & (POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR));
            result += keep(except, fds[i].fd, events & POLLPRI);
        }
        /* The kernel writes whole words. */
        for (int fd = count; fd % WORD_BITS; fd++)
            keep(in, fd, false), keep(out, fd, false), keep(except, fd, false);
    }
    if (fds != few)
        munmap(fds, size);
    errno = saved;
    return result;
}
