/* A program with no will of its own: it makes the libc calls that a test asks for, one at a time, and tells what came
 * out. Any exported function can be called by name with integers and buffers, so the scenarios are written in Python
 * (tests/puppet.py, which has the other end of the protocol), and the calls are a C program's.
 *
 *   puppet SOCKET NAME
 *
 * connects to the test and says hello. Every thread and forked child has a channel of its own. The channel is served by
 * libc's own functions, so that no hook ever sees it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MESSAGE_MAX (160 << 10)
#define ARGUMENTS_MAX 16
#define UNTOUCHED 4242                 /* errno before each call */

extern char **environ;
static void *libc;
static const char *socket_path;
static _Thread_local int channel;
static _Thread_local sigjmp_buf again;

static struct {
    int (*socket)(int, int, int);
    int (*connect)(int, const struct sockaddr *, socklen_t);
    int (*dup2)(int, int);
    int (*close)(int);
    int (*fcntl)(int, int, ...);
    ssize_t (*send)(int, const void *, size_t, int);
    ssize_t (*recv)(int, void *, size_t, int);
    int (*ioctl)(int, unsigned long, ...);
    int (*poll)(struct pollfd *, nfds_t, int);
    int (*getsockopt)(int, int, int, void *, socklen_t *);
    int (*setsockopt)(int, int, int, const void *, socklen_t);
} own;

static void find_own(void)
{
    libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
    own.socket = (int (*)(int, int, int))dlsym(libc, "socket");
    own.connect = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(libc, "connect");
    own.dup2 = (int (*)(int, int))dlsym(libc, "dup2");
    own.close = (int (*)(int))dlsym(libc, "close");
    own.fcntl = (int (*)(int, int, ...))dlsym(libc, "fcntl");
    own.send = (ssize_t(*)(int, const void *, size_t, int))dlsym(libc, "send");
    own.recv = (ssize_t(*)(int, void *, size_t, int))dlsym(libc, "recv");
    own.ioctl = (int (*)(int, unsigned long, ...))dlsym(libc, "ioctl");
    own.poll = (int (*)(struct pollfd *, nfds_t, int))dlsym(libc, "poll");
    own.getsockopt = (int (*)(int, int, int, void *, socklen_t *))dlsym(libc, "getsockopt");
    own.setsockopt = (int (*)(int, int, int, const void *, socklen_t))dlsym(libc, "setsockopt");
}

/* A fresh channel on descriptor `wanted`, or on any from it upwards. */
static void say_hello(const char *name, int wanted, int exact)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char hello[128];
    strncpy(address.sun_path, socket_path, sizeof address.sun_path - 1);
    int fd = own.socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || own.connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        _exit(120);
    if (fd != wanted) {
        channel = exact ? own.dup2(fd, wanted) : own.fcntl(fd, F_DUPFD_CLOEXEC, wanted);
        own.close(fd);
    } else {
        channel = fd;
    }
    int length = snprintf(hello, sizeof hello, "%s %d", name, getpid());
    if (own.send(channel, hello, (size_t)length, MSG_NOSIGNAL) != length)
        _exit(121);
}

/* --- the protocol: see puppet.py --- */

struct argument {
    uint8_t kind;                      /* 0 integer, 1 buffer, 2 buffer that only other buffers point to */
    int64_t integer;
    uint32_t length;
    char *memory;
};

static _Thread_local const char *cursor;

static void take(void *out, size_t size)
{
    memcpy(out, cursor, size);
    cursor += size;
}

EXPORT volatile int signals_seen;
static volatile uint32_t pipes_seen;   /* each answer tells it */

static size_t perform(const char *request, char *reply)
{
    struct argument arguments[ARGUMENTS_MAX];
    long passed[6] = {0};
    int count = 0;
    const char *name = request, *at = request + strlen(request) + 1;
    uint8_t many;
    cursor = at;
    take(&many, 1);
    for (int i = 0; i < many; i++) {
        struct argument *argument = &arguments[i];
        take(&argument->kind, 1);
        if (argument->kind == 0) {
            take(&argument->integer, 8);
        } else {
            uint8_t pointers;
            take(&argument->length, 4);
            argument->memory = malloc(argument->length ? argument->length : 1);
            take(argument->memory, argument->length);
            take(&pointers, 1);
            while (pointers--) {       /* an earlier buffer's address, at an offset */
                uint32_t offset;
                uint8_t target;
                take(&offset, 4);
                take(&target, 1);
                memcpy(argument->memory + offset, &arguments[target].memory, sizeof(char *));
            }
        }
        if (argument->kind != 2)
            passed[count++] = argument->kind ? (long)argument->memory : (long)argument->integer;
    }
    int underneath = strncmp(name, "libc:", 5) == 0;
    void *symbol = underneath ? dlsym(libc, name + 5) : dlsym(RTLD_DEFAULT, name);
    int64_t result = 0;
    int32_t error = 0;
    if (strcmp(name, "address") == 0) {
        result = (int64_t)dlsym(RTLD_DEFAULT, arguments[0].memory);
    } else if (symbol) {
        long (*function)(long, long, long, long, long, long) = (long (*)(long, long, long, long, long, long))symbol;
        errno = UNTOUCHED;
        result = function(passed[0], passed[1], passed[2], passed[3], passed[4], passed[5]);
        error = errno;
    } else {
        error = -1;
    }
    char *to = reply;
    memcpy(to, &result, 8);
    memcpy(to + 8, &error, 4);
    memcpy(to + 12, (const void *)&pipes_seen, 4);
    to += 16;
    for (int i = 0; i < many; i++) {
        if (arguments[i].kind == 0)
            continue;
        memcpy(to, &arguments[i].length, 4);
        memcpy(to + 4, arguments[i].memory, arguments[i].length);
        to += 4 + arguments[i].length;
        free(arguments[i].memory);
    }
    return (size_t)(to - reply);
}

static void serve(void)
{
    char *request = malloc(MESSAGE_MAX), *reply = malloc(MESSAGE_MAX);
    sigsetjmp(again, 1);               /* a forked child goes on here */
    for (;;) {
        ssize_t got = own.recv(channel, request, MESSAGE_MAX, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return;
        size_t length = perform(request, reply);
        own.send(channel, reply, length, MSG_NOSIGNAL);
    }
}

/* --- what a test may call besides libc --- */

EXPORT void on_signal(int number)
{
    signals_seen++;
    pipes_seen += number == SIGPIPE;
}

EXPORT long puppet_signals(void)
{
    int seen = signals_seen;
    signals_seen = 0;
    return seen;
}

EXPORT long puppet_handle(long number, long flags)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)flags};
    return sigaction((int)number, &action, NULL);
}

EXPORT long puppet_fork(const char *name)
{
    pid_t pid = fork();
    if (pid == 0) {
        say_hello(name, 0, 1);
        siglongjmp(again, 1);
    }
    return pid;
}

static void *thread(void *name)
{
    say_hello(name, 900, 0);
    serve();
    return NULL;
}

EXPORT long puppet_thread(const char *name)
{
    pthread_t id;
    int error = pthread_create(&id, NULL, thread, strdup(name));
    return error ? -error : (long)id;
}

static char **plain_environment(int plain)
{
    static char *kept[512];
    int count = 0;
    for (char **each = environ; *each && count < 511; each++)
        if (!plain || (strncmp(*each, "LD_PRELOAD=", 11) != 0 && strncmp(*each, "INTERPOSER", 10) != 0))
            kept[count++] = *each;
    kept[count] = NULL;
    return kept;
}

EXPORT long puppet_exec(const char *name, long plain)
{
    char *argv[] = {"puppet", (char *)socket_path, (char *)name, NULL};
    return execve("/proc/self/exe", argv, plain_environment((int)plain));
}

EXPORT long puppet_vfork_exec(const char *name, long plain)
{
    char *argv[] = {"puppet", (char *)socket_path, (char *)name, NULL};
    char **environment = plain_environment((int)plain);
    pid_t pid = vfork();
    if (pid == 0) {
        execve("/proc/self/exe", argv, environment);
        _exit(127);
    }
    return pid;
}

/* fd `from` becomes `to` in the child, as shells arrange redirections; from < 0: nothing. */
EXPORT long puppet_spawn(const char *name, long plain, long from, long to)
{
    char *argv[] = {"puppet", (char *)socket_path, (char *)name, NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    posix_spawn_file_actions_init(&actions);
    if (from >= 0)
        posix_spawn_file_actions_adddup2(&actions, (int)from, (int)to);
    int error = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, plain_environment((int)plain));
    posix_spawn_file_actions_destroy(&actions);
    return error ? -error : pid;
}

/* close(2) by an instruction of its own, which no hook can see. */
EXPORT long puppet_unseen_close(long fd)
{
#if defined __x86_64__
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(3L), "D"(fd) : "rcx", "r11", "memory");
    return result;
#else
    return own.close((int)fd);
#endif
}

EXPORT long puppet_close_each(long first, long last)
{
    for (long fd = first; fd <= last; fd++)
        close((int)fd);
    return 0;
}

/* Waits, unseen by any hook, until `bytes` can be read and all of `events` have come. TCP is asked to acknowledge at once,
 * or the peer's small segments would wait for 40 ms. */
EXPORT long puppet_arrived(long fd, long bytes, long events, long milliseconds)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long end = now.tv_sec * 1000ll + now.tv_nsec / 1000000 + milliseconds;
    for (;;) {
        struct pollfd state = {(int)fd, (short)events, 0};
        int ready = 0, quick = 1;
        own.setsockopt((int)fd, IPPROTO_TCP, TCP_QUICKACK, &quick, sizeof quick);
        own.ioctl((int)fd, FIONREAD, &ready);
        own.poll(&state, 1, 0);
        if (ready >= bytes && (state.revents & events) == events)
            return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec * 1000ll + now.tv_nsec / 1000000 > end)
            return 0;
        usleep(100);
    }
}

/* How many TCP connections wait in a listener's queue. */
EXPORT long puppet_queued(long fd)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    return own.getsockopt((int)fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 ? (long)info.tcpi_unacked : -1;
}

EXPORT long puppet_domain(long fd)
{
    int domain = 0;
    socklen_t length = sizeof domain;
    return own.getsockopt((int)fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 ? domain : -1;
}

/* Writes all of it whatever it takes, in pieces of `piece` bytes. */
static long put_all(int fd, const char *data, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t sent = send(fd, data + done, size - done, MSG_NOSIGNAL);
        if (sent > 0) {
            done += (size_t)sent;
        } else if (errno == EAGAIN) {
            struct pollfd wait = {fd, POLLOUT, 0};
            poll(&wait, 1, 10000);
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return (long)done;
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

EXPORT long puppet_send_stream(long fd, long total, long seed, long piece)
{
    uint64_t state = (uint64_t)seed * 2654435761u + 1;
    char *block = malloc((size_t)piece);
    long done = 0;
    while (done < total) {
        size_t size = total - done < piece ? (size_t)(total - done) : (size_t)piece;
        for (size_t i = 0; i < size; i += 8) {
            uint64_t word = next(&state);
            memcpy(block + i, &word, size - i < 8 ? size - i : 8);
        }
        long sent = put_all((int)fd, block, size);
        if (sent < 0) {
            done = sent;
            break;
        }
        done += sent;
    }
    free(block);
    return done;
}

/* Reads to the end of file, or `total` bytes; *hash (64-bit FNV-1a) tells the bytes. */
EXPORT long puppet_receive_stream(long fd, long total, uint64_t *hash, long piece)
{
    char *block = malloc((size_t)piece);
    long done = 0;
    uint64_t value = 14695981039346656037u;
    while (done < total) {
        size_t want = total - done < piece ? (size_t)(total - done) : (size_t)piece;
        ssize_t got = recv((int)fd, block, want, 0);
        if (got < 0 && errno == EAGAIN) {
            struct pollfd wait = {(int)fd, POLLIN, 0};
            poll(&wait, 1, 10000);
            continue;
        }
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            done = -errno;
            break;
        }
        if (got == 0)
            break;
        for (ssize_t i = 0; i < got; i++)
            value = (value ^ (unsigned char)block[i]) * 1099511628211u;
        done += got;
    }
    *hash = value;
    free(block);
    return done;
}

/* Both directions at once, without threads. */
EXPORT long puppet_exchange(long fd, long total, uint64_t *hash)
{
    uint64_t state = 88172645463325252u, value = 14695981039346656037u;
    static char out[65536], in[65536];
    long sent = 0, received = 0;
    size_t ready = 0, at = 0;
    while (sent < total || received < total) {
        struct pollfd wait = {(int)fd, (short)((sent < total ? POLLOUT : 0) | (received < total ? POLLIN : 0)), 0};
        if (poll(&wait, 1, 10000) <= 0)
            return -ETIMEDOUT;
        if (wait.revents & POLLOUT) {
            if (at == ready) {
                for (ready = 0; ready < sizeof out; ready += 8) {
                    uint64_t word = next(&state);
                    memcpy(out + ready, &word, 8);
                }
                at = 0;
            }
            size_t size = ready - at;
            if ((long)size > total - sent)
                size = (size_t)(total - sent);
            ssize_t result = send((int)fd, out + at, size, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (result > 0) {
                sent += result;
                at += (size_t)result;
            } else if (errno != EAGAIN) {
                return -errno;
            }
        }
        if (wait.revents & (POLLIN | POLLERR | POLLHUP)) {
            ssize_t result = recv((int)fd, in, sizeof in, MSG_DONTWAIT);
            if (result == 0)
                return received;
            if (result < 0 && errno != EAGAIN)
                return -errno;
            for (ssize_t i = 0; i < result; i++)
                value = (value ^ (unsigned char)in[i]) * 1099511628211u;
            received += result > 0 ? result : 0;
        }
    }
    *hash = value;
    return received;
}

/* Accepts, answers one byte with its own, and closes, until accept fails; how many it served. */
EXPORT long puppet_serve_bytes(long listener, long byte, long most)
{
    long served = 0;
    char c;
    while (served < most) {
        int fd = accept((int)listener, NULL, NULL);
        if (fd < 0) {
            if (errno == EAGAIN) {
                struct pollfd wait = {(int)listener, POLLIN, 0};
                poll(&wait, 1, 10000);
                continue;
            }
            break;
        }
        if (recv(fd, &c, 1, 0) == 1) {
            c = (char)byte;
            send(fd, &c, 1, MSG_NOSIGNAL);
            served++;
        }
        close(fd);
    }
    return served;
}

/* `count` connections one after another, each asking for the byte of who served it; a count for each byte in `tally`. */
EXPORT long puppet_ask_bytes(const struct sockaddr *address, long length, long count, uint32_t tally[256])
{
    long done = 0;
    for (; done < count; done++) {
        char c = '?';
        int fd = socket(address->sa_family, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, address, (socklen_t)length) < 0 || send(fd, &c, 1, MSG_NOSIGNAL) != 1 ||
            recv(fd, &c, 1, 0) != 1) {
            int error = errno;
            close(fd);
            return -error;
        }
        tally[(unsigned char)c]++;
        close(fd);
    }
    return done;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 64;
    socket_path = argv[1];
    find_own();
    say_hello(argv[2], 0, 1);
    serve();
    return 0;
}
