/* The life of companions: the sequence of S9 to S15, the swap of a connected one under the application's descriptor, and
 * the end. */
#ifndef INTERPOSER_COMPANION_H
#define INTERPOSER_COMPANION_H
#include "fdtable.h"

#define COMPANION_IN_PROGRESS INT32_MAX

/* Connects fd to remote by the first provider of the verdict that can. 0: fd is the companion now. Minus a reason
 * number: TCP. A positive errno: final, TCP would fail too. COMPANION_IN_PROGRESS: the socket is SOCK_CONNECTING, or was
 * for a moment. */
int companion_connect(struct sock *sock, int fd, const struct endpoint *remote, const struct verdict *verdict);
/* The connect in progress by that provider of the verdict has ended with `error`: takes the companion over or tries the
 * next providers. As companion_connect, but where nobody could, the placeholder stays; fd is one of the socket's
 * descriptors, or -1. */
int companion_resume(struct sock *sock, int fd, const struct verdict *verdict, int provider, int error);
/* No companion came of a connect: the port that only it needed is given up. */
void companion_unbind(struct sock *sock, int fd);
/* Closes the companion of a connect in progress. */
void companion_abandon(struct sock *sock);
/* Puts the file of `with` under every descriptor of the socket that still holds that of `now`, with their status flags.
 * `keep`: its registrations in epolls stay recorded, because another exchange may follow. */
extern _Atomic uint32_t companion_swaps;   /* changes while and after such an exchange: who made an alias looks again */
int companion_put_under(struct sock *sock, int fd, int with, int now, bool keep);
/* Gives `to` the status flags of `from`, and where the program has set them, the owner and the signal; `to` may be fresh, so
 * non-blocking. Returns the flags. */
int companion_copy_flags(const struct sock *sock, int from, int to, bool fresh);
/* The listener's owner, signal or O_ASYNC, which is in `flags`, has changed. */
void companion_signals(struct sock *sock, int fd, int flags);
/* Companion listeners for a TCP listener, whose address is in sock->local. 0: at least one serves; minus a reason number: TCP only.
 * `quiet`: no client finds them before the program waits for one. `renew`: in the place of silenced ones. */
int companion_listen(struct sock *sock, int fd, const struct verdict *verdict, int backlog, bool quiet, bool renew);
/* Those companions of a TCP listener that another program left among `fds`, of which it takes them; false: none. */
bool companion_take(struct sock *sock, int fd, int *fds, int count);
/* The next program is to have the companion listeners, or not: they become inheritable. False: it cannot. */
bool companion_pass(const struct sock *sock, bool on);
/* One connection from a companion listener. The new descriptor, who moves its data, *local and *peer; -EAGAIN, or another
 * -errno. */
int companion_accept(struct sock *sock, int index, bool nonblocking, bool cloexec, struct moving *moving,
                     struct endpoint *local, struct endpoint *peer);
/* Nobody uses that connection any more. */
void companion_stop_moving(const struct moving *moving);
/* The companion listeners refuse from here on, in every process that shares them; they are closed with the socket, or
 * before the next listen(), because another thread may be in accept(). */
void companion_silence(struct sock *sock);
/* Another program gets the listener, and companions of its own. */
void companion_send(struct sock *sock);
int companion_poll_fd(const struct sock *sock, int index);
void companion_backlog(struct sock *sock, int backlog);
/* This process has them no longer, or never had. */
void companion_close(struct sock *sock);
/* An option that was set after listen(). */
void companion_option(struct sock *sock, int level, int name, const void *value, socklen_t length);
/* The TCP listener stands alone in the program's epolls again, with its own O_NONBLOCK. */
void companion_leave(struct sock *sock, int fd);
/* A listener that another process has shut down is left to TCP. */
void companion_notice(struct sock *sock, int fd);
/* Has no other process these companion listeners, as far as this one knows? */
bool companion_is_alone(const struct sock *sock);
/* Has a program that shares no memory with this one shut the listener down? Then all that share it here know. */
void companion_ask(struct sock *sock, int fd);
/* The program waits or accepts on the listener by a hooked call. Clients find its companions from here on; but a process
 * that has an io_uring by now gives them up, and so does one that shares it with who has shut it down. */
void companion_serve(struct sock *sock, int fd);
/* Who waits at a silenced companion is reset, as at a TCP listener that is shut down. */
void companion_turn_away(struct sock *sock);
/* A listener is to lose its companions, for that reason, once they are drained: accept gives them up then. */
void companion_retire(struct sock *sock, int reason);
/* A listener loses its companions at once: TCP, with that reason unless it was retired for another. */
void companion_give_up(struct sock *sock, int fd, int reason);
/* Leaves a listener to TCP, and closes its companions, for want of descriptors; false: it has to keep them. */
bool companion_yield(struct sock *sock, int fd);
/* The last reference is gone. */
void companion_dispose(struct sock *sock);
#endif
