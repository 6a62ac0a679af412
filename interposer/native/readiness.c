/* Owns the private epolls of listeners and the records of registrations (in struct sock, under its short lock). No lock
 * is held while waiting. Each process waits at a private epoll of its own, so that a client wakes one of many; in the program's
 * epolls, which forked processes share, stands one that they share too. */
#include "readiness.h"
#include "clock.h"
#include "companion.h"
#include "lifecycle.h"
#include "listing.h"
#include "reasons.h"
#include "sandbox.h"
#include "stats.h"
#include "switch.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- the private epoll --- */

static int add(int epfd, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    return real.epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int make_epoll(const struct sock *sock, int fd)
{
    int fresh = hidden_fd(real.epoll_create1(EPOLL_CLOEXEC));
    if (fresh < 0)
        return -EMFILE;
    int error = sock_phase(sock) == SOCK_CONNECTED ? add(fresh, fd, EPOLLPRI | EPOLLET, 0)
                                                   : add(fresh, fd, EPOLLIN | EPOLLEXCLUSIVE, 0);
    for (int i = 0; !error && i < sock->ncompanions; i++)
        error = add(fresh, companion_poll_fd(sock, i), EPOLLIN | EPOLLEXCLUSIVE, (uint64_t)i + 1);
    if (error)
        hidden_close(fresh);
    return error ? error : fresh;
}

int readiness_private_epoll(struct sock *sock, int fd)
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

/* The private epoll for the program's epolls. */
static int shared_epoll(struct sock *sock, int fd)
{
    int shared = sock->epoll_shared;
    if (shared >= 0 && hidden_is(shared))
        return shared;
    shared = readiness_private_epoll(sock, fd);
    sock->epoll_shared = shared < 0 ? -1 : shared;
    sock->epoll_forks = lifecycle_forks();
    return shared;
}

static bool is_shared(const struct sock *sock)
{
    return sock->epoll_shared >= 0 && sock->epoll_forks != lifecycle_forks();
}

static _Atomic bool epolls_exist;

void readiness_epoll_made(void)
{
    atomic_store_explicit(&epolls_exist, true, memory_order_relaxed);
}

static bool share(int fd, struct sock *sock, void *context)
{
    (void)context;
    if (sock_phase(sock) == SOCK_LISTENING)
        shared_epoll(sock, fd);
    return true;
}

/* What one process registers with an epoll that it shares has to be there for the others. */
void readiness_before_fork(void)
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

int readiness_take_epoll(struct sock *sock, int fd, int *place)
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
        return readiness_private_epoll(sock, fd);
    int had = list->places[*place].fd;
    if (had >= 0 && list->places[*place].pid == lifecycle_pid && list->places[*place].age == list->age && hidden_is(had))
        return had;
    hidden_close(had);
    int fresh = make_epoll(sock, fd);
    list->places[*place].fd = fresh < 0 ? -1 : fresh;
    list->places[*place].pid = lifecycle_pid;
    list->places[*place].age = list->age;
    return fresh < 0 ? readiness_private_epoll(sock, fd) : fresh;
}

void readiness_give_epoll(struct sock *sock, int place)
{
    if (place >= 0)
        atomic_fetch_and(&atomic_load(&sock->accept_epolls)->busy, ~(1u << place));
    atomic_fetch_sub(&sock->waiters, 1);
}

void readiness_without_waiters(struct sock *sock)
{
    struct accept_epolls *list = atomic_load(&sock->accept_epolls);
    if (list)
        atomic_store(&list->busy, 0);
}

static void companions_changed(struct sock *sock)
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

/* --- registrations --- */

#define REGISTRATIONS 6
#define SWAP_TRIES 100

struct registrations {
    struct pool_item item;
    struct sock_registration list[REGISTRATIONS];
};

POOL(lists, struct registrations);

static struct sock_registration *find(struct sock *sock, int epfd, int fd)
{
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].epfd == epfd && (fd < 0 || sock->registrations[i].fd == fd))
            return &sock->registrations[i];
    return NULL;
}

/* One line of an epoll's fdinfo. */
struct item {
    int fd;
    uint32_t events;
    uint64_t data, inode;
};

/* What stands in an epoll, until visit says false. */
static void each_item(int epfd, bool (*visit)(const struct item *item, void *context), void *context)
{
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", epfd);
    int info = real.open(path, O_RDONLY | O_CLOEXEC, 0);
    size_t filled = 0;
    bool more = info >= 0;
    while (more) {
        ssize_t got = real.read(info, text + filled, sizeof text - 1 - filled);
        if (got <= 0)
            break;
        filled += (size_t)got;
        text[filled] = 0;
        char *line = text, *end;
        while (more && (end = strchr(line, '\n'))) {
            struct item item;
            *end = 0;
            if (sscanf(line, "tfd: %d events: %x data: %lx pos:%*d ino:%lx", &item.fd, &item.events, &item.data, &item.inode) == 4)
                more = visit(&item, context);
            line = end + 1;
        }
        filled = (size_t)(text + filled - line);
        memmove(text, line, filled);
        if (filled == sizeof text - 1)
            filled = 0;
    }
    if (info >= 0)
        real.close(info);
}

struct wanted {
    int fd;
    bool found;
    uint32_t events;
    uint64_t data;
};

static bool is_wanted(const struct item *item, void *context)
{
    struct wanted *wanted = context;
    if (item->fd != wanted->fd)
        return true;
    wanted->found = true;
    wanted->events = item->events;
    wanted->data = item->data;
    return false;
}

/* That descriptor stood for a registration which is no more, or has another. */
static void release(struct sock *sock, int via)
{
    for (int i = 0; i < sock->nregistrations; i++) {
        const struct sock_registration *other = &sock->registrations[i];
        if (other->epfd >= 0 && other->owned && other->via == via)
            return;
    }
    hidden_close(via);
}

/* Places of registrations that ended with their epolls. */
static void prune(struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *place = &sock->registrations[i];
        struct wanted wanted = {.fd = place->via};
        each_item(place->epfd, is_wanted, &wanted);
        if (wanted.found)
            continue;
        place->epfd = -1;
        if (place->owned)
            release(sock, place->via);
    }
}

/* The registrations of now, for threads that do not own the socket: how many there are. */
static int snapshot(struct sock *sock, struct sock_registration copy[REGISTRATIONS])
{
    if (!sock->nregistrations || !sock_lock(sock))
        return 0;
    int count = sock->nregistrations;
    memcpy(copy, sock->registrations, (size_t)count * sizeof *copy);
    sock_unlock(sock);
    return count;
}

static bool record(struct sock *sock, const struct sock_registration *registration)
{
    if (sock->nregistrations == REGISTRATIONS && !find(sock, registration->epfd, registration->fd) && !find(sock, -1, -1))
        prune(sock);
    int before = -1;
    if (!sock_lock(sock))
        return false;
    struct sock_registration *place = find(sock, registration->epfd, registration->fd);
    if (place && place->owned && place->via != registration->via)
        before = place->via;
    if (!place)
        place = find(sock, -1, -1);
    if (!place && !sock->registrations) {
        struct registrations *fresh = pool_take(&lists);
        sock->registrations = fresh ? fresh->list : NULL;
    }
    if (!place && sock->registrations && sock->nregistrations < REGISTRATIONS)
        place = &sock->registrations[sock->nregistrations++];
    if (place)
        *place = *registration;
    sock_unlock(sock);
    release(sock, before);
    return place;
}

static void forget(struct sock *sock, int epfd, int fd)
{
    int via = -1;
    if (sock_lock(sock)) {
        struct sock_registration *place = find(sock, epfd, fd);
        if (place) {
            if (place->owned)
                via = place->via;
            place->epfd = -1;
        }
        sock_unlock(sock);
    }
    release(sock, via);
}

static bool is_alias(const struct sock *sock, int fd)
{
    return fdtable_peek(fd) == sock;
}

/* Puts the socket's file into the epoll, under the number that it was registered with, or a hidden one if that was closed. One
 * that is spent would fire once more: what never shows anything stands there until the program arms it again. */
static int put_in(struct sock *sock, struct sock_registration *registration)
{
    bool alias = is_alias(sock, registration->fd);
    int silent = registration->spent ? hidden_fd(real.epoll_create1(EPOLL_CLOEXEC)) : -1;
    int via = silent >= 0 ? silent : alias ? registration->fd : hidden_dup(fdtable_alias_of(sock, -1));
    int error = via < 0 ? -EMFILE : -ENOMEM;
    /* There was room a moment ago, but another process of the user may have taken it for a moment. */
    for (int tries = 0; tries < SWAP_TRIES && (error == -ENOMEM || error == -ENOSPC); tries++) {
        if (tries)
            sched_yield();
        error = add(registration->epfd, via, registration->events, registration->data);
    }
    if (error && via != registration->fd)
        hidden_close(via);
    if (!error && silent >= 0)
        atomic_store_explicit(&sock->spent, true, memory_order_relaxed);
    registration->via = error ? registration->fd : via;
    registration->owned = !error && via != registration->fd;
    return error;
}

/* Takes a registration out of its epoll; false when it is not there any more. */
static bool take_out(struct sock *sock, struct sock_registration *registration)
{
    if (!registration->spent && (registration->stale || registration->events & EPOLLONESHOT)) {
        struct wanted now = {registration->via, false, registration->events | EPOLLERR | EPOLLHUP, registration->data};
        each_item(registration->epfd, is_wanted, &now);
        registration->events = now.events;
        registration->data = now.data;
        registration->spent = now.events & EPOLLONESHOT && !(now.events & (EPOLLERR | EPOLLHUP));   /* the kernel's mark */
    }
    int via = registration->via;
    bool was_there = real.epoll_ctl(registration->epfd, EPOLL_CTL_DEL, via, NULL) == 0, owned = registration->owned;
    registration->owned = registration->stale = false;
    registration->via = registration->fd;
    if (owned)
        release(sock, via);
    return was_there;
}

/* An epoll goes on to tell of a number that was closed while others of the socket are open. Until the socket's file is
 * exchanged, what stands there must have a number by which it can be taken out. One that another process may share is never
 * exchanged. */
void readiness_forget_alias(struct sock *sock, int fd)
{
    enum sock_phase phase = sock_phase(sock);
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *registration = &sock->registrations[i];
        if (registration->epfd < 0 || registration->fd != fd || registration->via != fd ||
            (phase == SOCK_LISTENING && registration->events & EPOLLEXCLUSIVE))
            continue;
        int other = sock->fork_count == lifecycle_forks() ? fdtable_alias_of(sock, -1) : -1;
        bool kept = (phase == SOCK_FRESH || phase == SOCK_CONNECTING) && other >= 0 && fdtable_same_file(fd, other) &&
                    take_out(sock, registration) && put_in(sock, registration) == 0;
        if (!kept)
            registration->epfd = -1;
    }
}

bool readiness_yield(struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].epfd >= 0 && sock->registrations[i].via == sock->epoll)
            return false;              /* it stands in an epoll of the program's */
    if (sock->epoll < 0 || sock->epoll_pid != lifecycle_pid)
        return false;
    if (sock->epoll == sock->epoll_shared) {
        if (is_shared(sock))
            return false;
        sock->epoll_shared = -1;
    }
    return hidden_give(&sock->epoll);
}

void readiness_dispose(struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++) {
        bool owned = sock->registrations[i].epfd >= 0 && sock->registrations[i].owned;
        sock->registrations[i].epfd = -1;
        if (owned)
            release(sock, sock->registrations[i].via);
    }
    if (sock->registrations)
        pool_give(&lists, (char *)sock->registrations - offsetof(struct registrations, list));
    readiness_renew_epoll(sock);
    dispose_accept_epolls(sock);
}

void readiness_before_swap(struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].epfd >= 0 && !take_out(sock, &sock->registrations[i]))
            sock->registrations[i].epfd = -1;
}

void readiness_after_swap(struct sock *sock, bool keep)
{
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *registration = &sock->registrations[i];
        if (registration->epfd >= 0) {
            put_in(sock, registration);
            atomic_store_explicit(&sock->in_epoll, true, memory_order_relaxed);
        }
        if (!keep && !registration->owned)
            registration->epfd = -1;   /* from here on the kernel knows it all */
    }
}

struct recall {
    struct sock *sock;
    int epfd;
    uint64_t inode;
};

static bool recall_item(const struct item *item, void *context)
{
    struct recall *recall = context;
    struct sock_registration found = {.epfd = recall->epfd, .fd = item->fd, .via = item->fd, .events = item->events,
                                      .data = item->data};
    if (item->inode == recall->inode && is_alias(recall->sock, item->fd) && !record(recall->sock, &found))
        recall->sock->registrations_lost = true;
    return true;
}

static bool recall_epoll(const char *name, void *context)
{
    static const char epoll[] = "anon_inode:[eventpoll]";
    char path[64], target[sizeof epoll];
    struct recall *recall = context;
    snprintf(path, sizeof path, "/proc/self/fd/%.20s", name);
    if (readlink(path, target, sizeof target) == sizeof epoll - 1 && memcmp(target, epoll, sizeof epoll - 1) == 0 &&
        sscanf(name, "%d", &recall->epfd) == 1)
        each_item(recall->epfd, recall_item, recall);
    return true;
}

void readiness_recall(struct sock *sock, int fd)
{
    struct stat file;
    struct recall recall = {.sock = sock};
    if (!atomic_load_explicit(&sock->in_epoll, memory_order_relaxed) || fstat(fd, &file) < 0)
        return;
    recall.inode = file.st_ino;
    listing_each("/proc/self/fd", recall_epoll, &recall);
}

/* Does that descriptor stand in the epoll? */
static bool stands_in(int epfd, int via)
{
    struct epoll_event nothing = {0};
    if (real.epoll_ctl(epfd, EPOLL_CTL_ADD, via, &nothing) < 0)
        return errno == EEXIST;
    real.epoll_ctl(epfd, EPOLL_CTL_DEL, via, NULL);
    return false;
}

/* What stands for one of a listener's numbers in the program's epolls, whichever these are: an epoll holds one descriptor
 * once, so each of several aliases has its own. -errno. */
static int stand_for(struct sock *sock, int fd, int alias, bool *owned)
{
    struct sock_registration all[REGISTRATIONS];
    int shared = shared_epoll(sock, alias), count = snapshot(sock, all);
    *owned = false;
    for (int i = 0; i < count; i++)
        if (all[i].epfd >= 0 && all[i].fd == fd && all[i].via != fd && hidden_is(all[i].via)) {
            *owned = all[i].owned;
            return all[i].via;
        }
    for (int i = 0; i < count && shared >= 0; i++)
        if (all[i].epfd >= 0 && all[i].fd != fd && all[i].via == shared) {
            *owned = true;
            shared = hidden_dup(shared);
            return shared < 0 ? -EMFILE : shared;
        }
    return shared;
}

/* Is the number registered with this epoll in the other way, EPOLLEXCLUSIVE or not? Perhaps by another process. */
static bool is_there_otherwise(struct sock *sock, const struct sock_registration *registration)
{
    struct sock_registration all[REGISTRATIONS];
    int count = snapshot(sock, all);
    for (int i = 0; i < count; i++)
        if (all[i].epfd >= 0 && all[i].fd == registration->fd && (all[i].events ^ registration->events) & EPOLLEXCLUSIVE &&
            stands_in(registration->epfd, all[i].via))
            return true;
    int other = registration->events & EPOLLEXCLUSIVE ? sock->epoll_shared : registration->fd;
    return is_shared(sock) && stands_in(registration->epfd, other);
}

/* Registers a listener, which has the number `alias` among others, with one of the program's epolls; -errno leaves nothing
 * behind. */
static int join(struct sock *sock, struct sock_registration *registration, int alias)
{
    int epfd = registration->epfd;
    if (registration->events & EPOLLEXCLUSIVE) {   /* must stay with the sockets themselves, to wake one process of many */
        int error = put_in(sock, registration), count = 0;
        if (error)
            return error;
        while (!error && count < sock->ncompanions) {
            error = add(epfd, companion_poll_fd(sock, count), registration->events, registration->data);
            count += !error;
        }
        if (!error)
            return 0;
        while (--count >= 0)
            real.epoll_ctl(epfd, EPOLL_CTL_DEL, companion_poll_fd(sock, count), NULL);
        take_out(sock, registration);
        if (error != -EEXIST)
            return -EAGAIN;
        registration->events &= ~(uint32_t)EPOLLEXCLUSIVE;   /* one alias of two wakes everybody */
    }
    bool owned;
    int via = stand_for(sock, registration->fd, alias, &owned);
    if (via < 0)                       /* not the program's shortage: its listener alone could be registered */
        return -EAGAIN;
    int error = add(epfd, via, registration->events, registration->data);
    if (error && owned)
        release(sock, via);
    if (!error) {
        registration->via = via;
        registration->owned = owned;
    }
    return error;
}

static void leave(struct sock *sock, struct sock_registration *registration)
{
    if (registration->events & EPOLLEXCLUSIVE) {
        for (int i = 0; i < sock->ncompanions; i++)
            real.epoll_ctl(registration->epfd, EPOLL_CTL_DEL, companion_poll_fd(sock, i), NULL);
        return;
    }
    registration->stale = true;        /* another process may have changed it */
    if (take_out(sock, registration))
        put_in(sock, registration);
}

void readiness_renew_epoll(struct sock *sock)
{
    int shared = atomic_exchange(&sock->epoll_shared, -1), own = atomic_exchange(&sock->epoll, -1);
    hidden_close(own);
    if (shared != own)
        hidden_close(shared);
}

int readiness_adopt_listener(struct sock *sock, int fd)
{
    int error = 0;
    readiness_renew_epoll(sock);
    companions_changed(sock);
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *registration = &sock->registrations[i];
        if (registration->epfd >= 0 && !take_out(sock, registration))
            registration->epfd = -1;
    }
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *registration = &sock->registrations[i];
        if (registration->epfd < 0)
            continue;
        error = error ? error : join(sock, registration, fd);
        if (error)
            put_in(sock, registration);
    }
    return error ? -REASON_EPOLL_LIMIT : 0;
}

bool readiness_is_awaited(const struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].epfd >= 0)
            return true;
    return false;
}

int readiness_renew_listener(struct sock *sock)
{
    int error = 0;
    companions_changed(sock);
    bool own = sock->epoll >= 0 && sock->epoll_pid == lifecycle_pid && hidden_is(sock->epoll);
    if (is_shared(sock)) {             /* the others do not have the new companions */
        for (int i = 0; i < sock->nregistrations; i++)
            if (sock->registrations[i].epfd >= 0 && !(sock->registrations[i].events & EPOLLEXCLUSIVE))
                return -REASON_EPOLL_LIMIT;
        if (own && sock->epoll == sock->epoll_shared) {
            sock->epoll = -1;          /* the next wait makes another */
            own = false;
        }
    }
    for (int side = 0; !error && side < sock->ncompanions; side++) {
        int fd = companion_poll_fd(sock, side);
        if (own)
            error = add(sock->epoll, fd, EPOLLIN | EPOLLEXCLUSIVE, (uint64_t)side + 1);
        for (int i = 0; !error && i < sock->nregistrations; i++) {
            const struct sock_registration *registration = &sock->registrations[i];
            if (registration->epfd >= 0 && registration->events & EPOLLEXCLUSIVE)
                error = add(registration->epfd, fd, registration->events, registration->data);
        }
    }
    return error ? -REASON_EPOLL_LIMIT : 0;
}

/* The private epolls stay until the socket is gone: another thread may wait on them. They wake it, because a companion
 * that was silenced shows a hang-up. */
void readiness_abandon_listener(struct sock *sock)
{
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].epfd >= 0)
            leave(sock, &sock->registrations[i]);
}

/* What was registered under another number of the same epoll, perhaps, has been changed. */
static void mark_stale(struct sock *sock, int epfd, int fd)
{
    if (!sock->nregistrations || !sock_lock(sock))
        return;
    for (int i = 0; i < sock->nregistrations; i++)
        if (sock->registrations[i].fd == fd && sock->registrations[i].epfd != epfd)
            sock->registrations[i].stale = true;
    sock_unlock(sock);
}

/* Where something else stands in the epoll for a number that is spent: it makes way, or says EEXIST. False: nothing does. */
static bool make_way(struct sock *sock, int epfd, int operation, int fd)
{
    struct sock_registration all[REGISTRATIONS];
    int saved = errno, count = snapshot(sock, all);
    bool stood = false;
    for (int i = 0; i < count && !stood; i++)
        if (all[i].epfd >= 0 && all[i].fd == fd && all[i].via != fd)
            stood = operation == EPOLL_CTL_ADD ? stands_in(epfd, all[i].via)
                                               : real.epoll_ctl(epfd, EPOLL_CTL_DEL, all[i].via, NULL) == 0;
    errno = saved;
    return stood;
}

/* A socket that is not the switch's yet, or a connection of which a registration was spent before. */
static int ctl_plain(struct sock *sock, int epfd, int operation, int fd, struct epoll_event *event)
{
    bool stood = atomic_load_explicit(&sock->spent, memory_order_relaxed) && make_way(sock, epfd, operation, fd);
    int result = 0;
    if (stood && operation == EPOLL_CTL_ADD) {
        errno = EEXIST;
        return -1;
    }
    if (!stood)
        result = real.epoll_ctl(epfd, operation, fd, event);
    else if (operation == EPOLL_CTL_MOD)
        result = real.epoll_ctl(epfd, EPOLL_CTL_ADD, fd, event);
    if (result < 0)
        return result;
    if (operation == EPOLL_CTL_DEL) {
        forget(sock, epfd, fd);
        return result;
    }
    if (operation == EPOLL_CTL_MOD)
        mark_stale(sock, epfd, fd);
    if (!record(sock, &(struct sock_registration){.epfd = epfd, .fd = fd, .via = fd, .events = event->events,
                                                  .data = event->data.u64}))
        sock->registrations_lost = true;
    return result;
}

static int add_listener(struct sock *sock, struct sock_registration *registration, struct epoll_event *event)
{
    int saved = errno, epfd = registration->epfd, fd = registration->fd;
    int error = is_there_otherwise(sock, registration) ? -EEXIST : join(sock, registration, fd);
    if (error == -EINVAL || error == -ELOOP || error == -EMFILE || error == -EAGAIN) {
        int result = real.epoll_ctl(epfd, EPOLL_CTL_ADD, fd, event);
        if (result == 0) {             /* it was the companions that stood in the way */
            companion_give_up(sock, fd, REASON_EPOLL_LIMIT);
            errno = saved;
        }
        return result;
    }
    if (error) {
        errno = -error;
        return -1;
    }
    if (!record(sock, registration)) {
        leave(sock, registration);
        companion_give_up(sock, fd, REASON_EPOLL_LOST);
    }
    errno = saved;
    return 0;
}

/* What may stand in an epoll for a listener's number, likeliest first; how many there are. An epoll that was duplicated, or that
 * another process registered the listener with, is not in the records. */
static int candidates(struct sock *sock, int epfd, int fd, int out[REGISTRATIONS + 2])
{
    struct sock_registration all[REGISTRATIONS];
    int count = snapshot(sock, all), found = 0;
    bool taken = false;
    for (int turn = 0; turn < 2; turn++)
        for (int i = 0; i < count; i++) {
            bool live = all[i].epfd >= 0, here = all[i].epfd == epfd;
            if (live && all[i].fd == fd && here == (turn == 0))
                out[found++] = all[i].via;
            taken |= live && all[i].fd != fd && all[i].via == sock->epoll_shared;
        }
    if (!taken && sock->epoll_shared >= 0)
        out[found++] = sock->epoll_shared;
    out[found++] = fd;
    return found;
}

static int ctl_listener(struct sock *sock, int epfd, int operation, int fd, struct epoll_event *event)
{
    int saved = errno;
    if (operation != EPOLL_CTL_DEL)
        companion_serve(sock, fd);
    if (sock_phase(sock) != SOCK_LISTENING) {
        errno = saved;
        return real.epoll_ctl(epfd, operation, fd, event);
    }
    struct sock_registration now = {.epfd = epfd, .fd = fd, .via = fd};
    if (event) {
        now.events = event->events;
        now.data = event->data.u64;
    }
    if (operation == EPOLL_CTL_ADD)
        return add_listener(sock, &now, event);
    int places[REGISTRATIONS + 2], count = candidates(sock, epfd, fd, places), result = -1;
    errno = ENOENT;
    for (int i = 0; i < count && result < 0 && errno == ENOENT; i++) {
        now.via = places[i];
        result = real.epoll_ctl(epfd, operation, now.via, event);
    }
    if (result < 0)
        return result;
    if (operation == EPOLL_CTL_DEL && now.via == fd)   /* EPOLLEXCLUSIVE */
        for (int i = 0; i < sock->ncompanions; i++)
            real.epoll_ctl(epfd, EPOLL_CTL_DEL, companion_poll_fd(sock, i), NULL);
    if (operation == EPOLL_CTL_DEL) {
        forget(sock, epfd, fd);
    } else {
        now.owned = now.via != fd && now.via != sock->epoll_shared;
        mark_stale(sock, epfd, fd);
        record(sock, &now);
    }
    errno = saved;
    return result;
}

static bool give_up_nested(int fd, struct sock *sock, void *context)
{
    bool *any = context;
    struct sock_registration all[REGISTRATIONS];
    int count = sock_phase(sock) == SOCK_LISTENING ? snapshot(sock, all) : 0;
    for (int i = 0; sock_phase(sock) == SOCK_LISTENING && i < count; i++)
        if (all[i].epfd >= 0 && !(all[i].events & EPOLLEXCLUSIVE)) {
            companion_give_up(sock, fd, REASON_EPOLL_LIMIT);
            *any = true;
        }
    return true;
}

int readiness_nest(int epfd, int operation, int fd, struct epoll_event *event, int saved)
{
    bool any = false;
    int error = errno;
    if (operation == EPOLL_CTL_ADD && (error == ELOOP || error == EINVAL) && fd != epfd && !lifecycle_borrowed())
        fdtable_each_held(give_up_nested, &any);
    int result = any ? real.epoll_ctl(epfd, operation, fd, event) : -1;
    errno = !any ? error : result < 0 ? errno : saved;
    return result;
}

int readiness_epoll_ctl(struct sock *sock, int epfd, int operation, int fd, struct epoll_event *event)
{
    if (operation != EPOLL_CTL_DEL && !event)
        return real.epoll_ctl(epfd, operation, fd, event);
    readiness_epoll_made();
    if (operation == EPOLL_CTL_ADD)
        switch_serve(sock, fd);
    switch (sock_phase(sock)) {
    case SOCK_FRESH:
    case SOCK_CONNECTED:
    case SOCK_CONNECTING: return ctl_plain(sock, epfd, operation, fd, event);
    case SOCK_LISTENING: return ctl_listener(sock, epfd, operation, fd, event);
    default: return real.epoll_ctl(epfd, operation, fd, event);
    }
}

/* --- poll --- */

#define LONG_WAIT_S 1000000000l
#define MANY 1024                      /* descriptors in one call */
/* What the hang-up of an AF_UNIX socket never comes without. */
#define WITH_HANG_UP (POLLIN | POLLRDNORM | POLLRDHUP | POLLOUT | POLLWRNORM | POLLWRBAND)

/* Nothing that TCP would show: the peer has closed, and the program has asked for neither direction. */
static bool only_hangs_up(const struct sock *sock, const struct pollfd *entry)
{
    struct pollfd look = {entry->fd, entry->events, 0};
    return !sock->shut_write && real.poll(&look, 1, 0) == 1 && look.revents == POLLHUP;
}

/* A hang-up that is not to be shown would end every wait. An epoll that has told of it waits for what comes after; where no
 * descriptor is free for it, nobody does: nothing comes from the peer any more. */
static int past_hang_up(struct sock *sock, const struct pollfd *entry)
{
    struct epoll_event told;
    if (!only_hangs_up(sock, entry))
        return entry->fd;
    int private = readiness_private_epoll(sock, entry->fd);
    if (private < 0)
        return -1;
    epoll_wait(private, &told, 1, 0);
    return only_hangs_up(sock, entry) ? private : entry->fd;
}

/* Who waits in the place of a descriptor: a private epoll of a listener, or of a connection that hung up, or nobody; else
 * itself. */
static int stand_in(const struct pollfd *entry)
{
    struct sock *sock = fdtable_peek(entry->fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_FREE;
    if (phase != SOCK_LISTENING && phase != SOCK_INHERITED && (phase != SOCK_CONNECTED || entry->events & WITH_HANG_UP))
        return entry->fd;
    sock = fdtable_get(entry->fd);
    if (!sock)
        return entry->fd;
    int via = entry->fd;
    switch_serve(sock, entry->fd);
    if (sock_phase(sock) == SOCK_LISTENING)
        companion_serve(sock, entry->fd);
    if (sock_phase(sock) == SOCK_LISTENING) {
        int private = readiness_private_epoll(sock, entry->fd);
        via = private < 0 ? entry->fd : private;
    } else if (sock_phase(sock) == SOCK_CONNECTED) {
        via = past_hang_up(sock, entry);
    }
    sock_put(sock);
    return via;
}

static bool is_listener(int fd)
{
    struct sock *sock = fdtable_peek(fd);
    return sock && sock_phase(sock) == SOCK_LISTENING && !companion_is_shut(sock);
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
        sock->shut_write = true;       /* reset: both directions have ended */
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
    if (events && (via != entry->fd ? !is_listener(entry->fd) : sock && events & POLLHUP)) {
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
            int via = stand_in(&fds[i]);
            copy[i] = fds[i];
            copy[i].fd = via;
            if (via != fds[i].fd)
                copy[i].events = is_listener(fds[i].fd) ? fds[i].events & (POLLIN | POLLRDNORM) : POLLIN;
            else if (asked + PROVIDERS_MAX <= room)
                asked += ask_companions(fds[i].fd, &copy[asked]);
            some |= shown(&fds[i], fds[i].fd, 0) != 0;
        }
        errno = before;
        result = real.ppoll(copy, asked, some ? &at_once : timeout ? &left : NULL, mask);
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

int readiness_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    unsigned need = most_needed(fds, count);
    if (need == KERNEL_HELPED)
        return poll_with_help(fds, count, timeout, mask);
    int result = real.ppoll(fds, count, timeout, mask);
    return need == KERNEL_ALONE ? result : mask_hang_ups(fds, count, result, !timeout || timeout->tv_sec || timeout->tv_nsec);
}

int readiness_poll(struct pollfd *fds, nfds_t count, int timeout)
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
void readiness_high_number(void)
{
    looked_up = false;
}

int readiness_select_bound(int count)
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

bool readiness_selects(int count, const fd_set *in, const fd_set *out, const fd_set *except)
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
int readiness_select(int count, fd_set *in, fd_set *out, fd_set *except, struct timespec *timeout, const sigset_t *mask)
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
    int result = readiness_ppoll(fds, used, timeout, mask), saved = errno;
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
