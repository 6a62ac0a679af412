/* The switch: what the hooks in shim.c call for sockets that it knows. Every function answers as the libc call of the
 * same name would, errno included. In switch.c, connect.c, accept.c and names.c. */
#ifndef INTERPOSER_SWITCH_H
#define INTERPOSER_SWITCH_H
#include "fdtable.h"
#include "real.h"
#include "sandbox.h"

/* Non-zero in a thread: every hook passes straight to libc (the embedded engine's own I/O, the switch's start). */
extern _Thread_local int switch_guard;

int switch_socket(int domain, int type, int protocol);
int switch_listen(int fd, int backlog);
int switch_connect(int fd, const struct sockaddr *address, socklen_t length);
/* Is this a signal handler that has interrupted a connect() of that socket? */
bool switch_connects(const struct sock *sock);
int switch_accept(int fd, struct sockaddr *address, socklen_t *length, int flags, bool plain);
/* bind() on a connection: in vain, for whatever reason TCP has. */
int switch_bind(const struct sock *sock, const struct sockaddr *address, socklen_t length);
int switch_getsockname(int fd, struct sockaddr *address, socklen_t *length);
int switch_getpeername(int fd, struct sockaddr *address, socklen_t *length);
/* Before this process waits on a listener, or accepts: one that others may serve too (SOCK_INHERITED) is decided now. */
void switch_serve(struct sock *sock, int fd);
/* Its companions were silenced by who handed it on, or shut it down elsewhere: it gets new ones, or is TCP's. */
void switch_renew(struct sock *sock, int fd);
/* The socket has companion listeners from here on. */
void switch_listens(struct sock *sock, int fd);
/* A connect in progress has ended, as companion_resume says; fd is one of the socket's descriptors, or -1. */
void switch_completed(struct sock *sock, int fd, const struct verdict *verdict, int result);
/* Was every handler that may have interrupted us installed with SA_RESTART? poll and epoll_wait never restart; accept and
 * connect do. */
bool switch_restarts(void);
/* Writes the row of a decided socket where sanctl looks. */
void switch_publish(int fd, const struct sock *sock);
int switch_shutdown(int fd, int how);
/* A connection is about to be registered with an epoll. */
void switch_watched(struct sock *sock, int fd);
int switch_close(int fd);
int switch_close_range(unsigned first, unsigned last, int flags);
/* dup(), or fcntl() with F_DUPFD and its kin. */
int switch_dup(int from, int command, long argument);
int switch_dup2(int from, int to, int flags, bool three);
/* F_GETFL and F_SETFL of a listener with companions, whose O_NONBLOCK is ours. */
int switch_fcntl(struct sock *sock, int fd, int command, long argument);
void switch_set_blocking(struct sock *sock, int fd, bool on);   /* FIONBIO, after the kernel took it */
/* The owner, the signal or O_ASYNC of a socket has been set. */
void switch_set_signals(struct sock *sock, int fd);
/* A seccomp filter comes, or the kernel's strict mode. Where it forbids what the switch does, listeners and new sockets
 * are TCP's from here on. */
void switch_before_filter(bool strict, const struct sock_fprog *filter);
/* The program has made an io_uring: what waits for no hooked call by now may be served by it alone. */
void switch_after_ring(void);
/* MSG_FASTOPEN on a socket that is not connected: decides and connects; false where libc should do it all. */
bool switch_fast_open(int fd, const struct sockaddr *address, socklen_t length, int *result);
#endif
