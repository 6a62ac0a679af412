/* What the awkward hosts share: connections to awkward_server, and the kernel's word on what carries one. All that they
 * ask the kernel themselves goes past every library. */
#ifndef AWKWARD_H
#define AWKWARD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static inline long past_libc(long number, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

/* U: the kernel has an AF_UNIX socket under this number; T: a TCP one. */
static inline char carrier(int fd)
{
    int domain = 0;
    socklen_t length = sizeof domain;
    if (past_libc(SYS_getsockopt, fd, SOL_SOCKET, SO_DOMAIN, (long)&domain, (long)&length) < 0)
        return '?';
    return domain == AF_UNIX ? 'U' : domain == AF_INET ? 'T' : '?';
}

static inline int connect_to(uint32_t ip, int port)
{
    struct sockaddr_in at = {AF_INET, htons((uint16_t)port), {htonl(ip)}, {0}};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof at) < 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* The server's letter, 0 at the end of the connection, - on an error. */
static inline char letter_from(int fd)
{
    char letter;
    ssize_t got;
    do
        got = read(fd, &letter, 1);
    while (got < 0 && errno == EINTR);
    return got == 1 ? letter : got == 0 ? '0' : '-';
}

/* One connection. What the server says carries it must be what the kernel says here: X otherwise. */
static inline char talk_to(uint32_t ip, int port)
{
    int fd = connect_to(ip, port);
    if (fd < 0)
        return 'E';
    char letter = letter_from(fd), here = carrier(fd);
    close(fd);
    return letter == here ? letter : 'X';
}

static inline char talk(int port)
{
    return talk_to(INADDR_LOOPBACK, port);
}

/* A listener at a port of the kernel's choice, which goes to *port. */
static inline int listener_at(int *port)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, length) < 0 || listen(fd, 16) < 0 ||
        getsockname(fd, (struct sockaddr *)&at, &length) < 0)
        return -1;
    *port = ntohs(at.sin_port);
    return fd;
}

/* Serves one client as awkward_server does; what carried it. */
static inline char serve_one(int listener)
{
    int fd = accept(listener, NULL, NULL);
    if (fd < 0)
        return 'E';
    char letter = carrier(fd);
    if (write(fd, &letter, 1) != 1)
        letter = '-';
    close(fd);
    return letter;
}

/* The child's exit status, minus a signal's number, or 1000 where it does not end: then it is killed. */
static inline int ended_within(pid_t pid, int seconds)
{
    int status, ready, pidfd = (int)past_libc(SYS_pidfd_open, pid, 0, 0, 0, 0);
    struct pollfd wait = {pidfd, POLLIN, 0};
    if (pidfd < 0)
        return 1001;
    do
        ready = (int)past_libc(SYS_poll, (long)&wait, 1, seconds * 1000L, 0, 0);
    while (ready == -EINTR);
    past_libc(SYS_close, pidfd, 0, 0, 0, 0);
    if (ready != 1)
        kill(pid, SIGKILL);
    if (waitpid(pid, &status, 0) != pid)
        return 1002;
    return ready != 1 ? 1000 : WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

/* Says a line on standard output without stdio, whose buffers a fork would copy. */
static inline void say(const char *line)
{
    if (past_libc(SYS_write, 1, (long)line, (long)strlen(line), 0, 0) < 0)
        _exit(99);
}

#define SAY(...)                                                                                                       \
    do {                                                                                                               \
        char said[256];                                                                                                \
        snprintf(said, sizeof said, __VA_ARGS__);                                                                      \
        say(said);                                                                                                     \
    } while (0)
#endif
