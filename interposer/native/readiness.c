/* Owns the records of registrations (in struct sock, under its short lock). */
#include "readiness.h"
#include "companion.h"
#include "lifecycle.h"
#include "listing.h"
#include "private_epoll.h"
#include "reasons.h"
#include "switch.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REGISTRATIONS 16
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
    bool needed = false;
    if (via < 0 || !sock_lock(sock))
        return;
    for (int i = 0; i < sock->nregistrations; i++) {
        const struct sock_registration *other = &sock->registrations[i];
        needed |= other->epfd >= 0 && other->owned && other->via == via;
    }
    sock_unlock(sock);
    if (!needed)
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
    struct registrations *fresh = sock->registrations ? NULL : pool_take(&lists);   /* here, as it may take the kernel long */
    int before = -1;
    struct sock_registration *place = NULL;
    if (sock_lock(sock)) {
        if (!sock->registrations && fresh) {
            sock->registrations = fresh->list;
            fresh = NULL;
        }
        place = find(sock, registration->epfd, registration->fd);
        if (place && place->owned && place->via != registration->via)
            before = place->via;
        if (!place)
            place = find(sock, -1, -1);
        if (!place && sock->registrations && sock->nregistrations < REGISTRATIONS)
            place = &sock->registrations[sock->nregistrations++];
        if (place)
            *place = *registration;
        sock_unlock(sock);
    }
    if (fresh)
        pool_give(&lists, fresh);
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
        error = private_epoll_add(registration->epfd, via, registration->events, registration->data);
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
    bool last = (phase == SOCK_FRESH || phase == SOCK_CONNECTING) && atomic_load(&sock->aliases) == 1;
    for (int i = 0; i < sock->nregistrations; i++) {
        struct sock_registration *registration = &sock->registrations[i];
        if (last && registration->owned)
            take_out(sock, registration);
        if (last)                      /* a connect in progress may still end; the epoll's number is soon another's */
            registration->epfd = -1;
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
        if (private_epoll_is_shared(sock))
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
    private_epoll_dispose(sock);
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
    int shared = private_epoll_shared(sock, alias), count = snapshot(sock, all);
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
    return private_epoll_is_shared(sock) && stands_in(registration->epfd, other);
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
            error = private_epoll_add(epfd, companion_poll_fd(sock, count), registration->events, registration->data);
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
    int error = private_epoll_add(epfd, via, registration->events, registration->data);
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

int readiness_rejoin(struct sock *sock, int fd)
{
    int error = 0;
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

int readiness_adopt_listener(struct sock *sock, int fd)
{
    private_epoll_renew(sock);
    private_epoll_companions_changed(sock);
    return readiness_rejoin(sock, fd);
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
    private_epoll_companions_changed(sock);
    bool own = sock->epoll >= 0 && sock->epoll_pid == lifecycle_pid && hidden_is(sock->epoll);
    if (private_epoll_is_shared(sock)) {             /* the others do not have the new companions */
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
            error = private_epoll_add(sock->epoll, fd, EPOLLIN | EPOLLEXCLUSIVE, (uint64_t)side + 1);
        for (int i = 0; !error && i < sock->nregistrations; i++) {
            const struct sock_registration *registration = &sock->registrations[i];
            if (registration->epfd >= 0 && registration->events & EPOLLEXCLUSIVE)
                error = private_epoll_add(registration->epfd, fd, registration->events, registration->data);
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
    private_epoll_needed();
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
