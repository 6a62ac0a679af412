/* The switch linked into a program in which the n-th call of each kind that it makes to the kernel fails: fault_host
 * SCENARIO. A scenario arms the faults around one call of the program's; what comes of it must be what TCP gives:
 * success, or, where the call that failed was the program's own, its errno. Then everything must work, and no descriptor
 * may be left. Each fault has a process of its own, fresh or used. */
#include "interposer/native/companion.h"
#include "interposer/native/fdtable.h"
#include "interposer/native/real.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define KINDS(X)                                                                                                       \
    X(socket) X(bind) X(listen) X(connect) X(accept) X(accept4) X(setsockopt) X(getsockopt) X(getsockname)             \
    X(getpeername) X(shutdown) X(dup) X(dup3) X(fcntl) X(ioctl) X(read) X(recv) X(send) X(sendmsg) X(poll) X(ppoll)    \
    X(epoll_ctl) X(open) X(mmap) X(memfd_create) X(ftruncate) X(epoll_create1) X(epoll_wait) X(socketpair) X(prlimit)  \
    X(madvise) X(getrandom)

enum kind {
#define X(name) KIND_##name,
    KINDS(X)
#undef X
    NKINDS
};
static const char *const kind_names[] = {
#define X(name) #name,
    KINDS(X)
#undef X
};

/* The errors that a kernel may give, the likeliest first. */
static const int plausible[NKINDS][6] = {
    [KIND_socket] = {EMFILE, ENOBUFS, ENFILE, ENOMEM, EACCES, EPERM},
    [KIND_bind] = {EADDRINUSE, EADDRNOTAVAIL, EACCES, ENOMEM, EPERM},
    [KIND_listen] = {EADDRINUSE, EOPNOTSUPP},
    [KIND_connect] = {EAGAIN, ECONNREFUSED, ENOBUFS, EACCES, EPERM, EADDRNOTAVAIL},
    [KIND_accept] = {EMFILE, ENFILE, ENOBUFS, ENOMEM, EINTR, EPERM},
    [KIND_accept4] = {EMFILE, ENFILE, ENOBUFS, ENOMEM, EINTR, EPERM},
    [KIND_setsockopt] = {ENOMEM, EPERM, ENOBUFS},
    [KIND_getsockopt] = {ENOMEM, EPERM},
    [KIND_getsockname] = {ENOBUFS},
    [KIND_getpeername] = {ENOTCONN},
    [KIND_shutdown] = {ENOTCONN},
    [KIND_dup] = {EMFILE},
    [KIND_dup3] = {EMFILE, EBUSY, EINTR},
    [KIND_fcntl] = {EMFILE, EACCES},
    [KIND_ioctl] = {EPERM},
    [KIND_read] = {EINTR, EIO, EACCES},
    [KIND_recv] = {EINTR, ENOBUFS, ENOMEM, EAGAIN},
    [KIND_send] = {ENOBUFS, EAGAIN, EPERM, EINTR},
    [KIND_sendmsg] = {ENOBUFS, EAGAIN, EINTR},
    [KIND_poll] = {EINTR, ENOMEM},
    [KIND_ppoll] = {EINTR, ENOMEM},
    [KIND_epoll_ctl] = {ENOMEM, ENOSPC},
    [KIND_open] = {EMFILE, ENFILE, ENOMEM, EACCES},
    [KIND_mmap] = {ENOMEM, EPERM},
    [KIND_memfd_create] = {EMFILE, ENFILE, ENOMEM, EPERM},
    [KIND_ftruncate] = {EPERM, EINTR},
    [KIND_epoll_create1] = {EMFILE, ENFILE, ENOMEM},
    [KIND_epoll_wait] = {EINTR},
    [KIND_socketpair] = {EMFILE, ENFILE, ENOMEM},
    [KIND_prlimit] = {EPERM},
    [KIND_madvise] = {ENOMEM, EINVAL, EFAULT},
    [KIND_getrandom] = {EAGAIN},
};

static struct {
    enum kind kind;
    int nth, error;                    /* nth 0: none */
    bool goes_on;                      /* all later ones fail too */
} fault;
static volatile bool armed;             /* volatile: libc's declarations say that no call comes back here */
static volatile struct {
    enum kind kind;
    int fd;
} own;                                 /* the program's call */
static int *counts;                    /* of each kind, in shared memory */
static volatile bool own_failed;
static struct real kernel;

static bool fails(enum kind kind, int fd)
{
    if (!armed)
        return false;
    counts[kind]++;
    bool hit = kind == fault.kind && fault.nth && (fault.goes_on ? counts[kind] >= fault.nth : counts[kind] == fault.nth);
    if (!hit)
        return false;
    bool accepts = kind == KIND_accept || kind == KIND_accept4;
    bool duplicates = kind == KIND_fcntl || kind == KIND_dup3, options = kind == KIND_setsockopt || kind == KIND_getsockopt;
    bool waits = kind == KIND_poll || kind == KIND_ppoll || kind == KIND_epoll_wait;
    bool same = own.kind == kind || (own.kind == KIND_accept && (accepts || waits)) || (own.kind == KIND_poll && waits) ||
                (own.kind == KIND_dup && duplicates) ||
                (own.kind == KIND_getsockopt && options);
    if (same && (fd == own.fd || accepts || waits || options || kind == KIND_socket))
        own_failed = true;
    errno = fault.error;
    return true;
}

#define FAULTY(type, name, parameters, arguments, fd)                                                                  \
    static type faulty_##name parameters                                                                               \
    {                                                                                                                  \
        return fails(KIND_##name, fd) ? -1 : kernel.name arguments;                                                    \
    }
FAULTY(int, socket, (int domain, int type, int protocol), (domain, type, protocol), -1)
FAULTY(int, bind, (int fd, const struct sockaddr *a, socklen_t l), (fd, a, l), fd)
FAULTY(int, listen, (int fd, int backlog), (fd, backlog), fd)
FAULTY(int, connect, (int fd, const struct sockaddr *a, socklen_t l), (fd, a, l), fd)
FAULTY(int, accept, (int fd, struct sockaddr *a, socklen_t *l), (fd, a, l), fd)
FAULTY(int, accept4, (int fd, struct sockaddr *a, socklen_t *l, int flags), (fd, a, l, flags), fd)
FAULTY(int, setsockopt, (int fd, int level, int name, const void *v, socklen_t l), (fd, level, name, v, l), fd)
FAULTY(int, getsockname, (int fd, struct sockaddr *a, socklen_t *l), (fd, a, l), fd)
FAULTY(int, getpeername, (int fd, struct sockaddr *a, socklen_t *l), (fd, a, l), fd)
FAULTY(int, shutdown, (int fd, int how), (fd, how), fd)
FAULTY(int, dup, (int fd), (fd), fd)
FAULTY(int, ioctl, (int fd, unsigned long request, void *argument), (fd, request, argument), fd)
FAULTY(ssize_t, read, (int fd, void *buffer, size_t size), (fd, buffer, size), fd)
FAULTY(ssize_t, recv, (int fd, void *buffer, size_t size, int flags), (fd, buffer, size, flags), fd)
FAULTY(ssize_t, send, (int fd, const void *buffer, size_t size, int flags), (fd, buffer, size, flags), fd)
FAULTY(ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags), fd)
FAULTY(int, open, (const char *path, int flags, unsigned mode), (path, flags, mode), -1)
FAULTY(int, memfd_create, (const char *name, unsigned flags), (name, flags), -1)
FAULTY(int, epoll_create1, (int flags), (flags), -1)
FAULTY(int, socketpair, (int domain, int type, int protocol, int pair[2]), (domain, type, protocol, pair), -1)
FAULTY(int, poll, (struct pollfd *fds, nfds_t count, int timeout), (fds, count, timeout), -1)
FAULTY(int, ppoll, (struct pollfd *fds, nfds_t count, const struct timespec *t, const sigset_t *m), (fds, count, t, m), -1)

/* What cannot fail, or only for reasons that are not looked at here. */
static int faulty_epoll_ctl(int epfd, int operation, int fd, struct epoll_event *event)
{
    static int room, where;            /* of what was taken out: it can fail for a moment only */
    bool may = operation == EPOLL_CTL_ADD && !(fault.goes_on && room > 0 && where == epfd);
    if (may && fails(KIND_epoll_ctl, epfd))
        return -1;
    int result = kernel.epoll_ctl(epfd, operation, fd, event);
    if (armed && result == 0 && (operation == EPOLL_CTL_DEL || where == epfd)) {
        room += operation == EPOLL_CTL_DEL ? 1 : -1;
        where = epfd;
    }
    return result;
}

static int faulty_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    bool may = name != SO_PEERCRED;
    return may && fails(KIND_getsockopt, fd) ? -1 : kernel.getsockopt(fd, level, name, value, length);
}

static int faulty_dup3(int from, int to, int flags)
{
    bool may = own.kind == KIND_dup;   /* onto an open descriptor below the limit */
    return may && fails(KIND_dup3, from) ? -1 : kernel.dup3(from, to, flags);
}

static int faulty_fcntl(int fd, int command, long argument)
{
    bool may = command == F_DUPFD || command == F_DUPFD_CLOEXEC;
    return may && fails(KIND_fcntl, fd) ? -1 : kernel.fcntl(fd, command, argument);
}

#define WRAPPED(type, name, parameters, arguments, failure)                                                            \
    type __real_##name parameters;                                                                                     \
    type __wrap_##name parameters;                                                                                     \
    type __wrap_##name parameters                                                                                      \
    {                                                                                                                  \
        return fails(KIND_##name, -1) ? failure : __real_##name arguments;                                             \
    }
WRAPPED(void *, mmap, (void *at, size_t size, int protection, int flags, int fd, off_t offset),
        (at, size, protection, flags, fd, offset), MAP_FAILED)
WRAPPED(int, ftruncate, (int fd, off_t size), (fd, size), -1)
WRAPPED(int, epoll_wait, (int epfd, struct epoll_event *events, int count, int timeout), (epfd, events, count, timeout), -1)
WRAPPED(int, prlimit, (pid_t pid, enum __rlimit_resource what, const struct rlimit *new, struct rlimit *old),
        (pid, what, new, old), -1)
WRAPPED(int, madvise, (void *at, size_t size, int advice), (at, size, advice), -1)
WRAPPED(ssize_t, getrandom, (void *buffer, size_t size, unsigned flags), (buffer, size, flags), -1)

static void put_faults_in(void)
{
    real_resolve();
    kernel = real;
#define X(name) real.name = faulty_##name;
    X(socket) X(bind) X(listen) X(connect) X(accept) X(accept4) X(setsockopt) X(getsockopt) X(getsockname)
    X(getpeername) X(shutdown) X(dup) X(dup3) X(fcntl) X(ioctl) X(read) X(recv) X(send) X(sendmsg) X(poll) X(ppoll)
    X(epoll_ctl) X(open) X(memfd_create) X(epoll_create1) X(socketpair)
#undef X
}

/* --- what a case says of itself, in shared memory --- */

static struct shared {
    int counts[NKINDS];
    int san, tcp, errors;
    char complaint[10000];
    char descriptors[4096];
} *shared;

#define check(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            snprintf(shared->complaint, sizeof shared->complaint, "line %d: %s (errno %s)", __LINE__, #condition,      \
                     strerrorname_np(errno));                                                                          \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* The program's call with faults: its result. A failure must be the kernel's own answer to it, or ENOBUFS for an option that
 * only another socket could answer; a success leaves errno. */
#define TRY(result, what, descriptor, call)                                                                            \
    do {                                                                                                               \
        own.kind = KIND_##what;                                                                                        \
        own.fd = descriptor;                                                                                           \
        own_failed = false;                                                                                            \
        errno = ERANGE;                                                                                                \
        armed = faults_wanted;                                                                                         \
        (result) = (call);                                                                                             \
        armed = false;                                                                                                 \
        if ((result) < 0 && !(errno == EINPROGRESS && own.kind == KIND_connect)) {                                     \
            bool starved = errno == ENOBUFS && (own.kind == KIND_setsockopt || own.kind == KIND_getsockopt);            \
            check((own_failed && errno == fault.error) || starved);                                                    \
            shared->errors++;                                                                                          \
        } else if ((result) >= 0) {                                                                                    \
            check(errno == ERANGE);                                                                                    \
        }                                                                                                              \
    } while (0)

static volatile bool faults_wanted;

/* --- scenarios --- */

static struct sockaddr_in at;

static int make_listener(int flags)
{
    socklen_t length = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0);
    check(fd >= 0);
    at = (struct sockaddr_in){AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    check(bind(fd, (struct sockaddr *)&at, length) == 0);
    check(getsockname(fd, (struct sockaddr *)&at, &length) == 0);
    return fd;
}

static int start_listener(int flags)
{
    int fd = make_listener(flags);
    check(listen(fd, 8) == 0);
    return fd;
}

static int make_client(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    check(fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof at) == 0);
    return fd;
}

/* A client that is not interposed. */
static int make_tcp_client(void)
{
    int fd = kernel.socket(AF_INET, SOCK_STREAM, 0);
    check(fd >= 0 && kernel.connect(fd, (struct sockaddr *)&at, sizeof at) == 0);
    return fd;
}

static bool is_ready(int fd, short events)
{
    struct pollfd look = {fd, events, 0};
    return poll(&look, 1, 5000) == 1 && look.revents & events;
}

static void exchange(int one, int other)
{
    char c = 'a';
    for (int i = 0; i < 2; i++) {
        check(send(one, &c, 1, MSG_NOSIGNAL) == 1);
        check(is_ready(other, POLLIN) && recv(other, &c, 1, 0) == 1);
        int swap = one;
        one = other;
        other = swap;
    }
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    check(getpeername(one, (struct sockaddr *)&peer, &length) == 0 && peer.sin_family == AF_INET && peer.sin_port == at.sin_port);
}

/* Both kinds of clients are served. */
static void serve_both(int listener)
{
    int clients[2] = {make_client(), make_tcp_client()}, accepted[2];
    for (int i = 0; i < 2; i++) {
        check(is_ready(listener, POLLIN));
        accepted[i] = accept(listener, NULL, NULL);
        check(accepted[i] >= 0);
    }
    for (int i = 0; i < 2; i++) {      /* in whichever order they came */
        struct sockaddr_in peer, mine;
        socklen_t length = sizeof peer;
        check(getsockname(clients[0], (struct sockaddr *)&mine, &length) == 0);
        check(getpeername(accepted[i], (struct sockaddr *)&peer, &length) == 0);
        exchange(clients[mine.sin_port != peer.sin_port], accepted[i]);
    }
    for (int i = 0; i < 2; i++) {
        close(clients[i]);
        close(accepted[i]);
    }
}

static void count_provider(int fd)
{
    *(fdtable_companion(fd) ? &shared->san : &shared->tcp) += 1;
}

static void in_socket(void)
{
    int fd, listener = start_listener(0);
    TRY(fd, socket, -1, socket(AF_INET, SOCK_STREAM, 0));
    if (fd < 0)
        fd = socket(AF_INET, SOCK_STREAM, 0);
    check(connect(fd, (struct sockaddr *)&at, sizeof at) == 0);
    count_provider(fd);
    close(fd);
    close(accept(listener, NULL, NULL));
    close(listener);
}

static void in_listen(void)
{
    int result, listener = make_listener(0);
    TRY(result, listen, listener, listen(listener, 8));
    if (result < 0)
        check(listen(listener, 8) == 0);
    serve_both(listener);
    close(listener);
}

static void in_connect(void)
{
    int result, listener = start_listener(0), fd = socket(AF_INET, SOCK_STREAM, 0);
    TRY(result, connect, fd, connect(fd, (struct sockaddr *)&at, sizeof at));
    if (result < 0)
        check(connect(fd, (struct sockaddr *)&at, sizeof at) == 0);
    count_provider(fd);
    check(is_ready(listener, POLLIN));
    int accepted = accept(listener, NULL, NULL);
    check(accepted >= 0);
    exchange(fd, accepted);
    close(accepted);
    close(fd);
    serve_both(listener);
    close(listener);
}

static void finish_connect(int fd, int listener)
{
    int error = -1;
    socklen_t length = sizeof error;
    check(is_ready(fd, POLLOUT));
    check(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0);
    int accepted = accept(listener, NULL, NULL);
    check(accepted >= 0);
    count_provider(fd);
    exchange(fd, accepted);
    close(accepted);
    close(fd);
}

static void in_connect_nonblocking(void)
{
    int result, listener = start_listener(0), fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    TRY(result, connect, fd, connect(fd, (struct sockaddr *)&at, sizeof at));
    check(result == -1);
    if (errno != EINPROGRESS)
        check(connect(fd, (struct sockaddr *)&at, sizeof at) == -1 && errno == EINPROGRESS);
    finish_connect(fd, listener);
    close(listener);
}

/* Registered with an epoll before, with a duplicate and an option. */
static void in_connect_registered(void)
{
    int result, listener = start_listener(0), fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), copy = dup(fd), on = 1;
    int epfd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLOUT, .data.fd = fd};
    check(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    check(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) == 0);
    TRY(result, connect, fd, connect(fd, (struct sockaddr *)&at, sizeof at));
    check(result == -1);
    if (errno != EINPROGRESS)
        check(connect(fd, (struct sockaddr *)&at, sizeof at) == -1 && errno == EINPROGRESS);
    check(epoll_wait(epfd, &event, 1, 5000) == 1 && event.data.fd == fd);
    finish_connect(fd, listener);
    close(copy);
    close(epfd);
    close(listener);
}

static void in_accept_by(int flags, bool four)
{
    int listener = start_listener(flags), clients[2] = {make_client(), make_tcp_client()}, accepted;
    for (int i = 0; i < 2; i++) {
        check(is_ready(listener, POLLIN));
        if (i == 0) {
            TRY(accepted, accept, listener, four ? accept4(listener, NULL, NULL, SOCK_CLOEXEC) : accept(listener, NULL, NULL));
            if (accepted < 0)
                i--;
            if (accepted < 0)
                faults_wanted = false;
        } else {
            accepted = accept(listener, NULL, NULL);
            check(accepted >= 0);
        }
        if (accepted >= 0) {
            struct sockaddr_in peer, mine;
            socklen_t length = sizeof peer;
            check(getsockname(clients[0], (struct sockaddr *)&mine, &length) == 0);
            check(getpeername(accepted, (struct sockaddr *)&peer, &length) == 0);
            int other = clients[mine.sin_port != peer.sin_port];
            count_provider(accepted);
            exchange(other, accepted);
            close(accepted);
        }
    }
    close(clients[0]);
    close(clients[1]);
    serve_both(listener);
    close(listener);
}

static void in_accept(void)
{
    in_accept_by(0, false);
}

static void in_accept_nonblocking(void)
{
    in_accept_by(SOCK_NONBLOCK, true);
}

static void in_epoll_by(bool before)
{
    int result, listener = make_listener(0), epfd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    if (before) {
        check(epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event) == 0);
        TRY(result, listen, listener, listen(listener, 8));
        if (result < 0)
            check(listen(listener, 8) == 0);
    } else {
        check(listen(listener, 8) == 0);
        TRY(result, epoll_ctl, epfd, epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event));
        if (result < 0)
            check(epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event) == 0);
    }
    int clients[2] = {make_client(), make_tcp_client()};
    for (int i = 0; i < 2; i++) {
        check(epoll_wait(epfd, &event, 1, 5000) == 1 && event.data.fd == listener);
        int accepted = accept(listener, NULL, NULL);
        check(accepted >= 0);
        count_provider(accepted);
        close(accepted);
    }
    check(epoll_wait(epfd, &event, 1, 0) == 0);
    check(epoll_ctl(epfd, EPOLL_CTL_DEL, listener, NULL) == 0);
    close(clients[0]);
    close(clients[1]);
    close(epfd);
    close(listener);
}

static void in_epoll_ctl(void)
{
    in_epoll_by(false);
}

static void in_listen_registered(void)
{
    in_epoll_by(true);
}

static void in_poll(void)
{
    int ready, listener = start_listener(0), client = make_client();
    struct pollfd look = {listener, POLLIN, 0};
    TRY(ready, poll, -1, poll(&look, 1, 5000));
    if (ready < 0)
        ready = poll(&look, 1, 5000);
    check(ready == 1 && look.revents == POLLIN);
    int accepted = accept(listener, NULL, NULL);
    exchange(client, accepted);
    close(accepted);
    close(client);
    close(listener);
}

static void in_dup(void)
{
    int copy, listener = start_listener(0), client = make_client(), accepted = accept(listener, NULL, NULL);
    TRY(copy, dup, client, dup(client));
    if (copy < 0)
        copy = dup(client);
    close(client);
    exchange(copy, accepted);
    close(copy);
    TRY(copy, dup, listener, fcntl(listener, F_DUPFD, 0));
    if (copy < 0)
        copy = dup(listener);
    close(listener);
    serve_both(copy);
    close(copy);
    close(accepted);
}

/* Options that no companion answers itself. */
static void in_options(void)
{
    int result, listener = start_listener(0), client = make_client(), accepted = accept(listener, NULL, NULL), value = 1;
    socklen_t length = sizeof value;
    count_provider(accepted);
    TRY(result, setsockopt, accepted, setsockopt(accepted, IPPROTO_TCP, TCP_QUICKACK, &value, sizeof value));
    TRY(result, getsockopt, accepted, getsockopt(accepted, IPPROTO_IP, IP_TTL, &value, &length));
    check(result < 0 || value > 0);
    exchange(client, accepted);
    close(accepted);
    close(client);
    close(listener);
}

static void in_close(void)
{
    int result, listener = start_listener(0), client = make_client(), accepted = accept(listener, NULL, NULL);
    TRY(result, shutdown, client, shutdown(client, SHUT_WR));
    TRY(result, ioctl, -1, close(client));
    TRY(result, ioctl, -1, close(accepted));
    TRY(result, ioctl, -1, close(listener));
}

static const struct scenario {
    const char *name;
    void (*run)(void);
} scenarios[] = {
#define SCENARIO(name) {#name, in_##name},
    SCENARIO(socket) SCENARIO(listen) SCENARIO(connect) SCENARIO(connect_nonblocking) SCENARIO(connect_registered)
    SCENARIO(accept) SCENARIO(accept_nonblocking) SCENARIO(epoll_ctl) SCENARIO(listen_registered) SCENARIO(poll)
    SCENARIO(dup) SCENARIO(options) SCENARIO(close)
};

/* --- all faults --- */

static int by_text(const void *one, const void *other)
{
    return strcmp(*(char *const *)one, *(char *const *)other);
}

/* What is open, sorted, without numbers. */
static void list_descriptors(char *out, size_t size)
{
    static char texts[256][48];
    char *list[256];
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    for (struct dirent *entry; (entry = readdir(directory)) && count < 256;) {
        char path[300], target[48] = "";
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        if (entry->d_name[0] == '.' || readlink(path, target, sizeof target - 1) < 0 || atoi(entry->d_name) == dirfd(directory))
            continue;
        if (strchr(target, '['))
            *strchr(target, '[') = 0;
        strcpy(texts[count], target);
        list[count] = texts[count];
        count++;
    }
    closedir(directory);
    qsort(list, (size_t)count, sizeof *list, by_text);
    *out = 0;
    for (int i = 0; i < count; i++)
        snprintf(out + strlen(out), size - strlen(out), "%s ", list[i]);
}

static int how_many(const char *list, const char *word, size_t length)
{
    int count = 0;
    for (; *list; list += strcspn(list, " ") + 1)
        count += strcspn(list, " ") == length && memcmp(list, word, length) == 0;
    return count;
}

/* Of no kind more than in the process without a fault. */
static bool leaks(const char *now, const char *before)
{
    for (const char *at = now; *at; at += strcspn(at, " ") + 1)
        if (how_many(now, at, strcspn(at, " ")) > how_many(before, at, strcspn(at, " ")))
            return true;
    return false;
}

static char baseline[4096];

/* 0: passed */
static int run_case(const struct scenario *scenario, bool used)
{
    memset(shared->counts, 0, sizeof shared->counts);
    shared->complaint[0] = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        faults_wanted = false;
        if (used)
            scenario->run();
        faults_wanted = true;
        scenario->run();
        faults_wanted = false;
        scenario->run();
        list_descriptors(shared->descriptors, sizeof shared->descriptors);
        if (baseline[0] && leaks(shared->descriptors, baseline)) {
            snprintf(shared->complaint, sizeof shared->complaint, "left open: %s, not %s", shared->descriptors, baseline);
            _exit(1);
        }
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (status && !shared->complaint[0])
        snprintf(shared->complaint, sizeof shared->complaint, "ended with status %#x%s", status,
                 WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? ": hangs" : "");
    return status;
}

int main(int argc, char **argv)
{
    const struct scenario *scenario = NULL;
    for (size_t i = 0; argc > 1 && i < sizeof scenarios / sizeof *scenarios; i++)
        if (strcmp(scenarios[i].name, argv[1]) == 0)
            scenario = &scenarios[i];
    if (!scenario)
        return 64;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    counts = shared->counts;
    put_faults_in();
    int cases = 0, failures = 0;
    for (int used = 0; used <= 1; used++) {
        int known[NKINDS];
        fault.nth = 0;
        baseline[0] = 0;
        if (run_case(scenario, used)) {
            printf("without a fault: %s\n", shared->complaint);
            return 1;
        }
        memcpy(known, shared->counts, sizeof known);
        memcpy(baseline, shared->descriptors, sizeof baseline);
        for (int kind = 0; kind < NKINDS; kind++)
            for (int nth = 1; nth <= known[kind]; nth++)
                for (int i = 0; i < 6 && plausible[kind][i]; i++)
                    for (int goes_on = 0; goes_on <= 1; goes_on++) {
                        int error = plausible[kind][i];
                        if (goes_on && (error == EINTR || error == EAGAIN))
                            continue;
                        fault.kind = (enum kind)kind;
                        fault.nth = nth;
                        fault.error = error;
                        fault.goes_on = goes_on;
                        cases++;
                        if (run_case(scenario, used)) {
                            failures++;
                            printf("%s%s, %s %d of %d%s, %s: %s\n", scenario->name, used ? " in a used process" : "",
                                   kind_names[kind], nth, known[kind], goes_on ? " and later" : "", strerrorname_np(error),
                                   shared->complaint);
                        }
                    }
    }
    printf("%d faults, %d failures; san %d, tcp %d, errors %d\n", cases, failures, shared->san, shared->tcp, shared->errors);
    return failures ? 1 : 0;
}
