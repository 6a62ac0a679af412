/* Owns nothing but the count of calls that start processes, while companions are inheritable. Runs after fork; what serves
 * exec runs in vfork children too. */
#include "handover.h"
#include "common.h"
#include "companion.h"
#include "decide.h"
#include "flows.h"
#include "lifecycle.h"
#include "listing.h"
#include "options.h"
#include "ports.h"
#include "readiness.h"
#include "reasons.h"
#include "real.h"
#include "sandbox.h"
#include "stats.h"
#include "switch.h"
#include "uring.h"
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define LIBRARY "/libinterposer.so"
#define PASSED_MAX 256
#define SAME_MAX 16
#define SCRIPTS_MAX 4                  /* interpreters of interpreters, as in the kernel */

extern char **environ;
static _Atomic int spawning;

/* --- what comes --- */

static int int_option(int fd, int level, int name)
{
    int value = -1;
    socklen_t length = sizeof value;
    return real.getsockopt(fd, level, name, &value, &length) < 0 ? -1 : value;
}

static int tcp_state(int fd, struct tcp_info *info)
{
    socklen_t length = sizeof *info;
    memset(info, 0, sizeof *info);
    return real.getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &length) < 0 ? -1 : info->tcpi_state;
}

int handover_backlog(int fd)
{
    struct tcp_info info;
    return tcp_state(fd, &info) == TCP_LISTEN ? (int)info.tcpi_sacked : -1;
}

static bool may_adopt(int fd)
{
    return lifecycle_active && !switch_guard && !sandbox_closed && !lifecycle_borrowed() && !fdtable_peek(fd);
}

/* Its state is in its kernel names. */
static struct sock *adopt_companion(int fd)
{
    struct endpoint local, peer;
    bool v6;
    const struct san_provider *provider;
    for (int n = 0; (provider = provider_nth(n)); n++) {
        int end = provider->wsp_recognise(fd, &local, &peer, &v6);
        if (end < 0)
            continue;
        struct sock *sock = fdtable_new(fd, v6 || common_marks(fd) & MARK_V6 ? AF_INET6 : AF_INET, SOCK_DECIDING);
        if (!sock)
            return NULL;
        sock->fork_count = ~0u;        /* shared, as far as anybody knows */
        sock->local = local;
        sock->remote = peer;
        sock->role = end ? ROW_ACCEPT : ROW_CONNECT;
        sock->generation = flows_generation();
        sock->companions[0].provider = provider;
        common_recall(sock, fd);
        sock_becomes(sock, SOCK_CONNECTED);
        stats_connection(provider->id);
        switch_publish(fd, sock);
        return sock;
    }
    return NULL;
}

struct sock *handover_adopt(int fd)
{
    int saved = errno;
    struct sock *sock = may_adopt(fd) ? adopt_companion(fd) : NULL;
    errno = saved;
    return sock;
}

static struct sock *adopt_tcp(int fd, int domain)
{
    struct tcp_info info;
    if ((domain != AF_INET && domain != AF_INET6) || int_option(fd, SOL_SOCKET, SO_PROTOCOL) != IPPROTO_TCP)
        return NULL;
    int state = tcp_state(fd, &info);
    if (state != TCP_LISTEN && state != TCP_CLOSE)
        return NULL;
    struct sock *sock = fdtable_new(fd, domain, state == TCP_LISTEN ? SOCK_INHERITED : SOCK_FRESH);
    if (!sock)
        return NULL;
    struct endpoint local;
    sock->foreign = true;
    sock->fork_count = lifecycle_forks();
    sock->bound = ports_local(fd, &local) && local.port;
    options_import(sock, fd);
    return sock;
}

struct sock *handover_tcp(int fd)
{
    int saved = errno;
    struct sock *sock = may_adopt(fd) ? adopt_tcp(fd, int_option(fd, SOL_SOCKET, SO_DOMAIN)) : NULL;
    errno = saved;
    return sock;
}

/* Either of them. */
static struct sock *look(int fd)
{
    int domain = may_adopt(fd) ? int_option(fd, SOL_SOCKET, SO_DOMAIN) : -1;
    return domain == AF_UNIX ? adopt_companion(fd) : adopt_tcp(fd, domain);
}

void handover_received(struct msghdr *message)
{
    int saved = errno;
    if (!lifecycle_active || lifecycle_borrowed())
        return;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS || part->cmsg_len < CMSG_LEN(0))
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            fdtable_drop(fd);          /* of a number that was closed where no hook saw it */
            struct sock *sock = look(fd);
            if (sock)
                sock_put(sock);
        }
    }
    errno = saved;
}

/* --- at the start --- */

struct found {
    int passed[PASSED_MAX], npassed;
    struct {
        struct sock *sock;
        ino_t inode;
    } same[SAME_MAX];
    int nsame;
};

static bool is_passed(int fd)
{
    const struct san_provider *provider;
    for (int n = 0; (provider = provider_nth(n)); n++)
        if (provider->wsp_passed && provider->wsp_passed(fd))
            return true;
    return false;
}

/* Numbers that name one socket share its state. */
static bool look_at(int fd, void *context)
{
    struct found *found = context;
    struct stat file;
    if (fstat(fd, &file) < 0 || !S_ISSOCK(file.st_mode))
        return true;
    for (int i = 0; i < found->nsame; i++)
        if (found->same[i].inode == file.st_ino) {
            fdtable_alias(fd, found->same[i].sock);
            stats_row_copy(fdtable_alias_of(found->same[i].sock, -1), fd);
            return true;
        }
    struct sock *sock = look(fd);
    if (sock && found->nsame < SAME_MAX) {
        found->same[found->nsame].sock = sock;
        found->same[found->nsame++].inode = file.st_ino;
    } else if (sock) {
        sock_put(sock);
    } else if (found->npassed < PASSED_MAX && int_option(fd, SOL_SOCKET, SO_DOMAIN) == AF_UNIX && is_passed(fd)) {
        found->passed[found->npassed++] = fd;
    }
    return true;
}

/* The listener goes where its companions do not. */
static void part(int fd, struct sock *sock)
{
    if (!common_is_nonblocking(sock) && !sock->foreign)
        real.fcntl(fd, F_SETFL, real.fcntl(fd, F_GETFL, 0) & ~O_NONBLOCK);
    if (!common_is_accepting(sock)) {
        companion_silence(sock);
        companion_turn_away(sock);
    }
}

static bool take(int fd, struct sock *sock, void *context)
{
    struct found *found = context;
    struct endpoint nobody = {0};
    struct verdict verdict;
    if (sock_phase(sock) != SOCK_INHERITED || !ports_local(fd, &sock->local) ||
        !companion_take(sock, fd, found->passed, found->npassed))
        return true;
    sock->foreign = false;             /* its O_NONBLOCK is the switch's, as in the program before */
    decide_request(sock, ROLE_LISTEN, &sock->local, &nobody, &verdict);
    sock->strict = verdict.otherwise == OTHERWISE_ERROR;
    if (verdict.action != ACTION_SAN) {
        part(fd, sock);
        companion_close(sock);
        decide_tcp(fd, sock, ROW_LISTEN, verdict.reason);
        return true;
    }
    bool in_epolls = common_came_by_exec(sock);
    sock->in_epoll = in_epolls;
    readiness_recall(sock, fd);
    switch_listens(sock, fd);
    if (in_epolls && readiness_adopt_listener(sock, fd) < 0)
        companion_give_up(sock, fd, REASON_EPOLL_LIMIT);
    if (uring_exists(true) || uring_possible)   /* who waits there already might wait for ever */
        companion_give_up(sock, fd, REASON_IO_URING);
    return true;
}

void handover_start(void)
{
    struct found found;
    found.npassed = found.nsame = 0;
    listing_descriptors(look_at, &found);
    if (found.npassed)
        fdtable_each(0, ~0u, take, &found);
    for (int i = 0; i < found.npassed; i++)   /* of listeners that were not passed */
        if (found.passed[i] >= 0)
            real.close(found.passed[i]);
    for (int i = 0; i < found.nsame; i++)
        sock_put(found.same[i].sock);
}

/* --- what goes: will the switch be in the next program? --- */

static const char *value_of(char *const environment[], const char *name)
{
    size_t length = strlen(name);
    for (; environment && *environment; environment++)
        if (strncmp(*environment, name, length) == 0 && (*environment)[length] == '=')
            return *environment + length + 1;
    return NULL;
}

static bool preloads(char *const environment[])
{
    const char *word = value_of(environment, "INTERPOSER"), *table = value_of(environment, "INTERPOSER_TABLE");
    const char *list = value_of(environment, "LD_PRELOAD");
    if ((word && strcmp(word, "off") == 0) || !table || *table != '/')
        return false;
    /* The kernel makes such a start a secure one, where the loader preloads nothing. Without /proc nothing would be found. */
    if (getuid() != geteuid() || getgid() != getegid() || access("/proc/self/fd", X_OK) < 0)
        return false;
    while (list && *list) {
        size_t length = strcspn(list, " :"), tail = sizeof LIBRARY - 1;
        char path[4096];
        if (length > tail && length < sizeof path && memcmp(list + length - tail, LIBRARY, tail) == 0) {
            memcpy(path, list, length);
            path[length] = 0;
            return faccessat(AT_FDCWD, path, R_OK, AT_EACCESS) == 0;
        }
        list += length + (list[length] != 0);
    }
    return false;
}

static bool is_privileged(int fd)
{
    struct stat file;
    return fstat(fd, &file) < 0 || file.st_mode & S_ISUID || (file.st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP) ||
           fgetxattr(fd, "security.capability", NULL, 0) > 0;
}

/* Go's linker leaves a note: such a program makes its system calls without libc, whatever starts it. */
static bool is_go(int fd, const Elf64_Phdr *note)
{
    static const char mark[] = "\4\0\0\0Go\0";   /* and the string's own end */
    char text[512];
    ssize_t got = pread(fd, text, note->p_filesz < sizeof text ? note->p_filesz : sizeof text, (off_t)note->p_offset);
    return got > 0 && memmem(text, (size_t)got, mark, sizeof mark);
}

/* A program of this architecture that glibc's loader starts. */
static bool loads(int fd, const char *head, size_t size)
{
    Elf64_Ehdr header, own;
    memcpy(&header, head, sizeof header);
    extern const char __ehdr_start[] __attribute__((visibility("hidden")));
    memcpy(&own, __ehdr_start, sizeof own);
    if (memcmp(header.e_ident, own.e_ident, EI_DATA + 1) != 0 || header.e_machine != own.e_machine ||
        header.e_phentsize != sizeof(Elf64_Phdr))
        return false;
    bool found = false;
    for (int i = 0; i < header.e_phnum; i++) {
        Elf64_Phdr part;
        size_t at = header.e_phoff + (size_t)i * sizeof part;
        if (at + sizeof part > size)
            return false;
        memcpy(&part, head + at, sizeof part);
        char loader[256] = "";
        if (part.p_type == PT_INTERP)
            found = part.p_filesz < sizeof loader && pread(fd, loader, part.p_filesz, (off_t)part.p_offset) > 0 &&
                    strstr(loader, "/ld-linux");
        else if (part.p_type == PT_NOTE && is_go(fd, &part))
            return false;
    }
    return found;
}

static bool is_program(const char *path, int depth)
{
    char head[1024], *interpreter = NULL;
    int fd = real.open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return false;
    ssize_t got = pread(fd, head, sizeof head - 1, 0);
    bool good = false;
    if (got > 2 && head[0] == '#' && head[1] == '!') {
        head[got] = 0;
        interpreter = head + 2 + strspn(head + 2, " \t");
        interpreter[strcspn(interpreter, " \t\n")] = 0;
    } else if (got > (ssize_t)sizeof(Elf64_Ehdr)) {
        good = !is_privileged(fd) && loads(fd, head, (size_t)got);
    }
    real.close(fd);
    return interpreter ? depth < SCRIPTS_MAX && is_program(interpreter, depth + 1) : good;
}

/* The file that would be started, in `path` or `file` itself; NULL: there is none, so that the call fails. */
static const char *find_program(const char *file, bool search, char path[4096])
{
    if (!search || strchr(file, '/'))   /* without /proc a descriptor's name says nothing */
        return strncmp(file, "/proc/", 6) == 0 || faccessat(AT_FDCWD, file, X_OK, AT_EACCESS) == 0 ? file : NULL;
    const char *list = getenv("PATH");
    size_t size = strlen(file);
    for (list = list ? list : "/bin:/usr/bin"; ; list++) {
        size_t length = strcspn(list, ":");
        if (length + size + 2 < 4096) {
            memcpy(path, list, length);
            path[length] = '/';
            memcpy(path + length + (length > 0), file, size + 1);
            if (faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) == 0)
                return path;
        }
        list += length;
        if (!*list)
            return NULL;
    }
}

enum what_starts { NOT_KNOWN, NOTHING, PLAIN, ITSELF, INTERPOSED };

/* By its name, as another file may have come there. */
static bool is_itself(const char *program)
{
    struct stat file, own;
    return strcmp(program, process_facts()->exe) == 0 ||
           (stat(program, &file) == 0 && stat("/proc/self/exe", &own) == 0 && file.st_ino == own.st_ino &&
            file.st_dev == own.st_dev);
}

static enum what_starts what_starts(const char *file, bool search, char *const environment[])
{
    char path[4096];
    if (is_no_pointer(file))
        return PLAIN;
    const char *program = find_program(file, search, path);
    if (program && preloads(environment) && is_program(program, 0))
        return INTERPOSED;
    return !program ? NOTHING : is_itself(program) ? ITSELF : PLAIN;
}

/* --- what goes: listeners --- */

struct next {
    const char *file;
    char *const *environment;
    bool search, actions, goes;        /* goes: this process becomes that program */
    enum what_starts starts;
};

/* No other process has what it is registered with. */
static bool epolls_are_ours(struct sock *sock)
{
    return sock->fork_count == lifecycle_forks() && !lifecycle_borrowed() && readiness_is_awaited(sock);
}

static bool hand_on(int fd, struct sock *sock, void *context)
{
    struct next *next = context;
    if (sock_phase(sock) != SOCK_LISTENING)
        return true;
    int flags = real.fcntl(fd, F_GETFD, 0);
    if (flags < 0 || (flags & FD_CLOEXEC && !next->actions))
        return true;
    if (next->starts == NOT_KNOWN) {   /* an action may change the directory */
        bool known = !next->actions || next->search || is_no_pointer(next->file) || *next->file == '/';
        next->starts = known ? what_starts(next->file, next->search, next->environment) : PLAIN;
    }
    if (next->starts == INTERPOSED && companion_pass(sock, true)) {
        common_hand_on(sock);
    } else if (next->starts != NOTHING) {
        companion_pass(sock, false);
        part(fd, sock);
        if (next->starts == ITSELF) {  /* started anew without the switch: those of before will go */
            common_tell_left(sock);
            companion_retire(sock, REASON_HANDED_ON);
        }
    }
    if (next->starts != NOTHING && next->goes && epolls_are_ours(sock)) {
        readiness_abandon_listener(sock);   /* what stands there for it is closed at exec */
        common_tell_exec(sock, true);
    }
    return true;
}

static bool keep(int fd, struct sock *sock, void *context)
{
    const bool *stays = context;
    if (sock_phase(sock) != SOCK_LISTENING)
        return true;
    companion_pass(sock, false);
    if (*stays && epolls_are_ours(sock)) {
        common_tell_exec(sock, false);
        if (readiness_rejoin(sock, fd) < 0)
            companion_give_up(sock, fd, REASON_EPOLL_LIMIT);
    }
    return true;
}

static void before(struct next next)
{
    int saved = errno;
    if (lifecycle_active && !switch_guard)
        fdtable_each_held(hand_on, &next);
    errno = saved;
}

static void take_back(bool stays)
{
    int saved = errno;
    if (lifecycle_active && !switch_guard)
        fdtable_each_held(keep, &stays);
    errno = saved;
}

void handover_before_exec(const char *file, bool search, char *const environment[])
{
    if (!lifecycle_borrowed())         /* in a vfork child the count is the parent's, and stands */
        hidden_before_start();
    before((struct next){file, environment, search, .goes = true});
}

void handover_after_exec(void)
{
    take_back(true);
    if (!lifecycle_borrowed())
        hidden_after_start();
}

void handover_before_spawn(const char *file, bool search, char *const environment[], bool actions)
{
    hidden_before_start();
    atomic_fetch_add(&spawning, 1);
    before((struct next){file, environment, search, actions, .goes = false});
}

void handover_after_spawn(void)
{
    if (atomic_fetch_sub(&spawning, 1) == 1)
        take_back(false);
    hidden_after_start();
}

/* The thread that was starting a program does not exist here. */
void handover_after_fork_child(void)
{
    if (atomic_exchange(&spawning, 0))
        take_back(false);
}

void handover_before_send(const struct msghdr *message)
{
    int saved = errno;
    if (!lifecycle_active || lifecycle_borrowed() || is_no_pointer(message->msg_control))
        return;
    struct msghdr copy = *message;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(&copy); each; each = CMSG_NXTHDR(&copy, each)) {
        if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS || each->cmsg_len < CMSG_LEN(0))
            continue;
        size_t count = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(each) + i * sizeof fd, sizeof fd);
            struct sock *sock = fdtable_get(fd);
            if (sock && sock_phase(sock) == SOCK_LISTENING) {
                bool accepting = common_is_accepting(sock);
                part(fd, sock);
                if (accepting)         /* who got it makes its own; when this one closes it, nobody is to wait at these */
                    companion_retire(sock, REASON_HANDED_ON);
                companion_send(sock);
            }
            if (sock)
                sock_put(sock);
        }
    }
    errno = saved;
}
