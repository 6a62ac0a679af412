/* Owns the placeholders, and one lock, held around the exchange of descriptors and the program's own closing and
 * duplicating of numbers while a connect is in progress; waits for it are bounded. sock->completion says who may end a
 * connect: the provider's up-call, or the program's thread. Runs after fork. */
#include "connecting.h"
#include "clock.h"
#include "companion.h"
#include "lifecycle.h"
#include "options.h"
#include "polling.h"
#include "real.h"
#include "switch.h"
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define LOOK_AGAIN_MS 1000             /* the number may be another's already */
#define HOLD_MS 1000
#define FINISH_MS 100

struct connecting {
    struct pool_item item;
    int own, other;                    /* hidden: the placeholder once more, and the end that keeps it silent */
    int fd, provider;
    struct verdict verdict;
};

POOL(places, struct connecting);
_Atomic uint32_t connecting_count;
static _Thread_local char here;
static _Atomic(char *) exchange;       /* whose it is */

bool connecting_hold(void)
{
    int64_t until = 0;
    for (;;) {
        char *nobody = NULL;
        if (atomic_compare_exchange_weak_explicit(&exchange, &nobody, &here, memory_order_acquire, memory_order_relaxed))
            return true;
        /* This is a signal handler that has interrupted the holder, or the holder is held up by one. */
        if (nobody == &here || !clock_yield(&until, HOLD_MS))
            return false;
    }
}

void connecting_let_go(bool held)
{
    if (held)
        atomic_store_explicit(&exchange, NULL, memory_order_release);
}

/* Neither readable nor writable: nothing was sent to it, and what it sent is not read. */
static int placeholder(int pair[2])
{
    static const char filling[4096];
    int least = 1;
    if (real.socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    real.setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
    while (real.send(pair[0], filling, sizeof filling, MSG_NOSIGNAL) > 0)
        ;
    while (real.send(pair[0], filling, 1, MSG_NOSIGNAL) > 0)
        ;
    return 0;
}

static void forget(struct sock *sock)
{
    struct connecting *place = sock->connecting;
    sock->connecting = NULL;
    atomic_fetch_and(&sock->slow, (uint8_t)~SLOW_CONNECTING);
    hidden_close(place->other);
    hidden_close(place->own);
    pool_give(&places, place);
    atomic_fetch_sub(&connecting_count, 1);
}

int connecting_begin(struct sock *sock, int fd, const struct verdict *verdict)
{
    int pair[2];
    int error = placeholder(pair);
    if (error)
        return error;
    struct connecting *place = pool_take(&places);
    if (!place) {
        real.close(pair[0]);
        real.close(pair[1]);
        return -ENOMEM;
    }
    place->own = hidden_dup(pair[0]);
    place->other = hidden_fd(pair[1]);
    place->fd = fd;
    place->verdict = *verdict;
    atomic_fetch_add(&connecting_count, 1);
    sock->connecting = place;
    if (place->own < 0 || place->other < 0) {
        forget(sock);
        real.close(pair[0]);
        return -EMFILE;
    }
    companion_put_under(sock, fd, pair[0], atomic_load(&sock->shadow), true);
    real.close(pair[0]);
    atomic_fetch_or(&sock->slow, SLOW_CONNECTING);
    sock_becomes(sock, SOCK_CONNECTING);
    return 0;
}

void connecting_provider(struct sock *sock, int index)
{
    sock->connecting->provider = index;
}

int connecting_own(const struct sock *sock)
{
    return sock->connecting->own;
}

void connecting_give_back(struct sock *sock, int fd)
{
    int tcp = atomic_exchange(&sock->shadow, -1);
    options_replay(sock, tcp);
    companion_put_under(sock, fd, tcp, sock->connecting->own, true);
    hidden_close(tcp);
}

void connecting_release(struct sock *sock)
{
    if (sock->connecting)
        forget(sock);
}

/* Takes the end of the connect into the program's hands. */
static bool claim(struct sock *sock)
{
    uint64_t now = atomic_load(&sock->completion);
    return (uint32_t)now == COMPLETION_ARMED && atomic_compare_exchange_strong(&sock->completion, &now, COMPLETION_RUNNING);
}

bool connecting_cancel(struct sock *sock, int fd)
{
    if (!claim(sock))
        return false;
    companion_abandon(sock);
    connecting_give_back(sock, fd);
    atomic_store(&sock->connect_error, ECONNRESET | CONNECT_CANCELLED);   /* as TCP says in SYN_SENT */
    atomic_store(&sock->phase, SOCK_FRESH);
    connecting_release(sock);
    return true;
}

void connecting_dispose(struct sock *sock)
{
    if (!sock->connecting)
        return;
    if (claim(sock))
        companion_abandon(sock);
    forget(sock);
}

void connecting_after_fork_child(struct sock *sock, int fd)
{
    int flags = sock_phase(sock) == SOCK_CONNECTING ? real.fcntl(fd, F_GETFD, 0) : -1;
    if (flags >= 0)
        real.dup3(atomic_load(&sock->shadow), fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0);
}

void connecting_unlock_in_child(void)
{
    exchange = NULL;
}

void connecting_end_in_child(struct sock *sock)
{
    if (!sock->connecting)
        return;
    companion_abandon(sock);
    hidden_close(atomic_exchange(&sock->shadow, -1));
    atomic_store(&sock->phase, SOCK_TCP);
    forget(sock);
}

bool connecting_goes_on(const struct sock *sock)
{
    int64_t until = 0;
    while (atomic_load(&sock->slow) & SLOW_CONNECTING && (uint32_t)atomic_load(&sock->completion) == COMPLETION_RUNNING &&
           clock_yield(&until, FINISH_MS))
        ;
    return atomic_load(&sock->slow) & SLOW_CONNECTING;
}

int connecting_wait(struct sock **held, int fd, int option)
{
    struct sock *sock = *held;
    uint32_t generation = atomic_load(&sock->item.generation);
    struct timeval limit = {0};
    socklen_t length = sizeof limit;
    if (options_find(sock, SOL_SOCKET, option) || sock->options_lost)
        real.getsockopt(atomic_load(&sock->shadow), SOL_SOCKET, option, &limit, &length);
    int64_t deadline = limit.tv_sec || limit.tv_usec
                           ? clock_ms() + limit.tv_sec * 1000 + (limit.tv_usec + 999) / 1000 : -1;
    while (connecting_goes_on(sock)) {
        /* The placeholder is never writable, and hangs up when it goes; what takes its place is, or fails. */
        int64_t left = deadline < 0 ? LOOK_AGAIN_MS : deadline - clock_ms();
        if (left <= 0)
            return -EINPROGRESS;
        left = left < LOOK_AGAIN_MS ? left : LOOK_AGAIN_MS;
        struct timespec moment = {left / 1000, left % 1000 * 1000000};
        struct pollfd look = polling_copy(&(struct pollfd){fd, POLLOUT, 0});
        sock_put(sock);
        int count = polling_sleep(&look, 1, &moment, NULL), error = errno;
        *held = fdtable_get(fd);
        if (*held && (*held != sock || atomic_load(&sock->item.generation) != generation)) {
            sock_put(*held);
            *held = NULL;
        }
        if (!*held)
            return -EBADF;
        if (count < 0 && (error != EINTR || deadline >= 0 || !switch_restarts()))
            return -error;
    }
    return 0;
}

static void finish(struct sock *sock, int error)
{
    int saved = errno;
    struct verdict verdict = sock->connecting->verdict;
    int fd = fdtable_alias_of(sock, sock->connecting->fd);
    int result = companion_resume(sock, fd, &verdict, sock->connecting->provider, error);
    if (result != COMPANION_IN_PROGRESS)
        switch_completed(sock, fd, &verdict, result);
    errno = saved;
}

int connecting_complete(struct sock *sock, uint32_t attempt, int error)
{
    uint64_t now = atomic_load(&sock->completion), number = (uint64_t)attempt << 32;
    if (error > 0 || error == -EINPROGRESS || error <= -COMPLETION_EARLY)
        return -EINVAL;
    for (;;) {
        bool early = now == (number | COMPLETION_OPEN);
        uint64_t next = early ? number | (COMPLETION_EARLY + (uint32_t)-error) : COMPLETION_RUNNING;
        if (!early && now != (number | COMPLETION_ARMED))
            return -EINVAL;
        if (atomic_compare_exchange_weak(&sock->completion, &now, next)) {
            if (!early)
                finish(sock, error);
            return 0;
        }
    }
}
