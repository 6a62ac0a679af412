/* The life of companions: the sequence of S9 to S15, the swap of a connected one under the application's descriptor, and
 * the end. */
#ifndef INTERPOSER_COMPANION_H
#define INTERPOSER_COMPANION_H
#include "fdtable.h"

/* Connects fd to remote by the first provider of the verdict that can. 0: fd is the companion now. Minus a reason
 * number: TCP. A positive errno: final, TCP would fail too. */
int companion_connect(struct sock *sock, int fd, const struct endpoint *remote, const struct verdict *verdict);
/* Companion listeners for a TCP listener, whose address is in sock->local. 0: at least one serves; minus a reason number: TCP only. */
int companion_listen(struct sock *sock, int fd, const struct verdict *verdict, int backlog);
/* One connection from a companion listener. The new descriptor, *local and *peer; -EAGAIN, or another -errno. */
int companion_accept(struct sock *sock, int index, bool nonblocking, bool cloexec, struct endpoint *local,
                     struct endpoint *peer);
/* The companion listeners refuse from here on, in every process that shares them; they are closed with the socket, or
 * before the next listen(), because another thread may be in accept(). */
void companion_silence(struct sock *sock);
int companion_poll_fd(const struct sock *sock, int index);
void companion_backlog(struct sock *sock, int backlog);
/* The TCP listener stands alone in the program's epolls again, with its own O_NONBLOCK. */
void companion_leave(struct sock *sock, int fd);
/* Has this process, or one that shares the listener, waited or accepted on it? */
void companion_mark_served(struct sock *sock);
bool companion_is_served(const struct sock *sock);
/* Who waits at a silenced companion is reset, as at a TCP listener that is shut down. */
void companion_turn_away(struct sock *sock);
/* A listener is to lose its companions, for that reason, once they are drained: accept gives them up then. */
void companion_retire(struct sock *sock, int reason);
/* A listener loses its companions at once: TCP, with that reason unless it was retired for another. */
void companion_give_up(struct sock *sock, int fd, int reason);
/* The last reference is gone. */
void companion_dispose(struct sock *sock);
#endif
