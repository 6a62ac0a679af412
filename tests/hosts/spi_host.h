/* The switch and the test providers linked into a program: spi_host CASE. A case is a small program whose socket calls are
 * the hooks. What it observes goes to the standard output, with names for ports and descriptors, so that a run can be
 * compared with one where the policy says TCP (spi_host CASE tcp). What the providers were told is compared here. */
#ifndef SPI_HOST_H
#define SPI_HOST_H
#include "interposer/native/real.h"

#include "interposer/native/companion.h"
#include "interposer/native/fdtable.h"
#include "interposer/native/lifecycle.h"
#include "interposer/native/reasons.h"
#include "provider_test.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/wait.h>
#include <unistd.h>

/* CASE(name, policy, promises) { ... }. The policy is one that tests/unit/test_spi.py knows. A TWIN runs under TCP too, and
 * must observe the same there. tests/unit/test_spi.py finds both by these words at the beginning of a line. */
struct test_case {
    const char *name, *policy;
    void (*run)(void);
    struct test_case *next;
};
void add_case(struct test_case *test_case);
#define CASE(identifier, rules, promises)                                                                              \
    static void case_##identifier(void);                                                                               \
    __attribute__((constructor)) static void add_##identifier(void)                                                    \
    {                                                                                                                  \
        static struct test_case entry = {#identifier, rules, case_##identifier, NULL};                                 \
        add_case(&entry);                                                                                              \
    }                                                                                                                  \
    static void case_##identifier(void)
#define TWIN CASE

extern bool oracle;                    /* this run is the one by TCP */

void fail_at(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4), noreturn));
#define fail_case(...) fail_at(__FILE__, __LINE__, __VA_ARGS__)
#define check(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            fail_case("%s", #condition);                                                                               \
    } while (0)

/* --- what the program does. Each says what came out, and checks that errno is left alone on success. --- */

#define LOOPBACK "127.0.0.1"
#define EVERYWHERE "0.0.0.0"
#define NONBLOCK SOCK_NONBLOCK

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void name_port(const char *name, int port);
/* The port that the last companion was bound to, which a socket that went on by TCP does not keep. */
void name_tried(const char *name);
/* Sets errno to something odd, and checks it after success. */
#define CALLED(call, format, ...)                                                                                      \
    ({                                                                                                                 \
        errno = 4242;                                                                                                  \
        __typeof__(call) came = (call);                                                                                \
        say_result((long)came, format, ##__VA_ARGS__);                                                                 \
        came;                                                                                                          \
    })
void say_result(long result, const char *format, ...) __attribute__((format(printf, 2, 3)));

int app_socket(int family, int type);
int app_bind(int fd, const char *ip, int port);
int bind_somewhere(int fd, const char *ip);   /* to a port of its own choice, which it gives */
int app_listen(int fd, int backlog);
int app_connect(int fd, const char *ip, int port);
int app_accept(int fd);                /* says the peer's address */
int app_accept4(int fd, int flags);
int app_close(int fd);
int app_shutdown(int fd, int how);
ssize_t app_send(int fd, const char *text);
ssize_t app_send_flags(int fd, const char *text, int flags);
ssize_t app_recv(int fd);              /* says the text */
int app_local(int fd);                 /* getsockname: says the address, gives the port */
int app_peer(int fd);
int app_set(int fd, int level, int name, int value);
int app_set_time(int fd, int name, int milliseconds);
int app_get(int fd, int level, int name);
int app_error(int fd);                 /* SO_ERROR */
int app_poll(int fd, short events, int timeout);   /* says and gives the events that came */
int app_select(int fd, int timeout);   /* bits: 1 readable, 2 writable, 4 exceptional */
int app_epoll(void);
int app_add(int epfd, int fd, uint32_t events);
int app_wait(int epfd, int timeout);   /* says and gives the events of the one descriptor that it reports; 0: none */
void app_block(int fd, bool blocking); /* O_NONBLOCK by fcntl */

socklen_t address_of(struct sockaddr_storage *address, const char *ip, int port);
/* A listener at a port of its own, named "server". */
int serve(const char *ip);
int port_of(int fd);                   /* by the original call */
/* A connected pair and its listener, made by the calls above. */
struct pair {
    int listener, client, server;
};
struct pair make_pair(const char *ip);
void close_pair(struct pair *pair);

/* --- clients and servers that are not interposed --- */

int tcp_server(const char *ip, int *port);
int tcp_client(const char *ip, int port);

/* A server whose clients have to wait until they are let in: their provider answers when told, or (under TCP) the backlog
 * is full, and they get in within a second. */
struct slow {
    int listener, port, filler;
};
struct slow slow_server(void);
void let_in(struct slow *slow);
int slow_accept(struct slow *slow);
void close_slow(struct slow *slow);
#define SOON 4000                      /* milliseconds that any wait after let_in() is good for */

/* --- what came of it --- */

#define QUESTIONS (1u << CALL_SERVES | 1u << CALL_SUPPORTS | 1u << CALL_POLL_FD | 1u << CALL_TRANSFER)
#define HANDLES (1u << CALL_HANDLE | 1u << CALL_UNHANDLE)
/* All calls since the last look, without those that only ask, are these lines. Ports have their names. Under TCP: none. */
#define called(...) called_at(__FILE__, __LINE__, ~QUESTIONS, __VA_ARGS__)
/* The same of a choice of calls. */
#define called_of(kinds, ...) called_at(__FILE__, __LINE__, kinds, __VA_ARGS__)
/* Forgets the calls so far, and numbers companions from here on: a1, a2... The last one before is a-0. */
void here(void);
void called_at(const char *file, int line, unsigned kinds, const char *lines);
/* Who carries the data of a connection, or has a companion listener: 'a', 'b', or 't' for TCP; under TCP always 't'. */
#define served_by(fd, letter) served_by_at(__FILE__, __LINE__, fd, letter)
void served_by_at(const char *file, int line, int fd, char letter);
#define stayed_because(fd, number) stayed_because_at(__FILE__, __LINE__, fd, number)
void stayed_because_at(const char *file, int line, int fd, int reason);
/* Nothing is left: no companion, no mover, no hidden descriptor, once the program has closed its own. */
#define nothing_left() nothing_left_at(__FILE__, __LINE__)
void nothing_left_at(const char *file, int line);

void fail_call(enum provider provider, enum call call, int error);
void fail_nth_call(enum provider provider, enum call call, int error, unsigned n);

/* --- another thread --- */

struct thread {
    pthread_t thread;
    int (*run)(struct thread *thread);
    int fd, port, result;
    _Atomic pid_t id;
    _Atomic bool done;
};
void start(struct thread *thread, int (*run)(struct thread *), int fd);
bool blocks(struct thread *thread);    /* it sleeps, and has not come back */
int finish(struct thread *thread);     /* within a bound */
bool eventually(bool (*holds)(void));
void pause_ms(int milliseconds);
#endif
