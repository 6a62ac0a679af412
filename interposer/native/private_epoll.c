/* Owns the private epolls. No lock is held while waiting. Each process waits at one of its own, so that a client wakes one
 * of many; in the program's epolls, which forked processes share, stands one that they share too. */
#include "private_epoll.h"
#include "companion.h"
#include "lifecycle.h"
#include "real.h"
#include "sandbox.h"
#include <errno.h>

int private_epoll_add(int epfd, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    return real.epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int make_epoll(const struct sock *sock, int fd)
{
    int fresh = hidden_fd(real.epoll_create1(EPOLL_CLOEXEC));
    if (fresh < 0)
        return -EMFILE;
    int error = sock_phase(sock) == SOCK_CONNECTED ? private_epoll_add(fresh, fd, EPOLLPRI | EPOLLET, 0)
                                                   : private_epoll_add(fresh, fd, EPOLLIN | EPOLLEXCLUSIVE, 0);
    for (int i = 0; !error && i < sock->ncompanions; i++)
        error = private_epoll_add(fresh, companion_poll_fd(sock, i), EPOLLIN | EPOLLEXCLUSIVE, (uint64_t)i + 1);
    if (error)
        hidden_close(fresh);
    return error ? error : fresh;
}

int private_epoll(struct sock *sock, int fd)
{
    if (sock->epoll >= 0 && sock->epoll_pid == lifecycle_pid && hidden_is(sock->epoll))
        return sock->epoll;
    int fresh = make_epoll(sock, fd);
    if (fresh < 0)
        return fresh;
    if (!sock_lock(sock)) {
        hidden_close(fresh);
        return -EAGAIN;
    }
    int other = -1;
    if (sock->epoll >= 0 && sock->epoll_pid == lifecycle_pid && hidden_is(sock->epoll)) {
        other = fresh;                 /* another thread was quicker */
        fresh = sock->epoll;
    } else {
        other = sock->epoll == sock->epoll_shared ? -1 : sock->epoll;
        sock->epoll = fresh;
        sock->epoll_pid = lifecycle_pid;
    }
    sock_unlock(sock);
    hidden_close(other);
    return fresh;
}

int private_epoll_shared(struct sock *sock, int fd)
{
    int shared = sock->epoll_shared;
    if (shared >= 0 && hidden_is(shared))
        return shared;
    shared = private_epoll(sock, fd);
    sock->epoll_shared = shared < 0 ? -1 : shared;
    sock->epoll_forks = lifecycle_forks();
    return shared;
}

bool private_epoll_is_shared(const struct sock *sock)
{
    return sock->epoll_shared >= 0 && sock->epoll_forks != lifecycle_forks();
}

static _Atomic bool epolls_exist;

void private_epoll_needed(void)
{
    atomic_store_explicit(&epolls_exist, true, memory_order_relaxed);
}

static bool share(int fd, struct sock *sock, void *context)
{
    (void)context;
    if (sock_phase(sock) == SOCK_LISTENING)
        private_epoll_shared(sock, fd);
    return true;
}

/* What one process registers with an epoll that it shares has to be there for the others. */
void private_epoll_before_fork(void)
{
    int saved = errno;
    if (epolls_exist && lifecycle_active && !sandbox_closed && !lifecycle_borrowed())
        fdtable_each_held(share, NULL);
    errno = saved;
}

/* --- threads in accept() --- */

#define ACCEPT_EPOLLS 15

/* An epoll that wakes one thread wakes the next as well, which finds nothing. So the first that waits does so at the private
 * epoll, and each other at one of its own, while there are places. */
struct accept_epolls {
    struct pool_item item;
    _Atomic uint32_t busy;             /* a bit for each place */
    _Atomic uint32_t age;              /* counts the times that the companions changed */
    struct {
        int fd;
        int32_t pid;
        uint32_t age;
    } places[ACCEPT_EPOLLS];
};

POOL(accept_lists, struct accept_epolls);

static struct accept_epolls *accept_epolls(struct sock *sock)
{
    struct accept_epolls *list = atomic_load(&sock->accept_epolls), *none = NULL;
    if (list || !(list = pool_take(&accept_lists)))
        return list;
    atomic_store(&list->busy, 0);
    for (int i = 0; i < ACCEPT_EPOLLS; i++)
        list->places[i].fd = -1;
    if (atomic_compare_exchange_strong(&sock->accept_epolls, &none, list))
        return list;
    pool_give(&accept_lists, list);
    return none;
}

int private_epoll_take(struct sock *sock, int fd, int *place)
{
    bool first = atomic_fetch_add(&sock->waiters, 1) == 0;
    struct accept_epolls *list = first ? NULL : accept_epolls(sock);
    uint32_t busy = list ? atomic_load(&list->busy) : 0;
    *place = -1;
    while (list && *place < 0 && busy + 1 < 1u << ACCEPT_EPOLLS) {
        int free = __builtin_ctz(~busy);
        if (atomic_compare_exchange_weak(&list->busy, &busy, busy | 1u << free))
            *place = free;
    }
    if (*place < 0)
        return private_epoll(sock, fd);
    int had = list->places[*place].fd;
    if (had >= 0 && list->places[*place].pid == lifecycle_pid && list->places[*place].age == list->age && hidden_is(had))
        return had;
    hidden_close(had);
    int fresh = make_epoll(sock, fd);
    list->places[*place].fd = fresh < 0 ? -1 : fresh;
    list->places[*place].pid = lifecycle_pid;
    list->places[*place].age = list->age;
    return fresh < 0 ? private_epoll(sock, fd) : fresh;
}

void private_epoll_give(struct sock *sock, int place)
{
    if (place >= 0)
        atomic_fetch_and(&atomic_load(&sock->accept_epolls)->busy, ~(1u << place));
    atomic_fetch_sub(&sock->waiters, 1);
}

void private_epoll_without_waiters(struct sock *sock)
{
    struct accept_epolls *list = atomic_load(&sock->accept_epolls);
    if (list)
        atomic_store(&list->busy, 0);
}

void private_epoll_companions_changed(struct sock *sock)
{
    struct accept_epolls *list = atomic_load(&sock->accept_epolls);
    if (list)
        atomic_fetch_add(&list->age, 1);
}

static void dispose_accept_epolls(struct sock *sock)
{
    struct accept_epolls *list = atomic_exchange(&sock->accept_epolls, NULL);
    for (int i = 0; list && i < ACCEPT_EPOLLS; i++)
        hidden_close(list->places[i].fd);
    if (list)
        pool_give(&accept_lists, list);
}

void private_epoll_renew(struct sock *sock)
{
    int shared = atomic_exchange(&sock->epoll_shared, -1), own = atomic_exchange(&sock->epoll, -1);
    hidden_close(own);
    if (shared != own)
        hidden_close(shared);
}

void private_epoll_dispose(struct sock *sock)
{
    private_epoll_renew(sock);
    dispose_accept_epolls(sock);
}
