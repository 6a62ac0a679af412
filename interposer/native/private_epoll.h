/* A listener with companions has a private epoll of this process that holds all of its listeners: it waits in the listener's
 * place in poll, select and blocking accept. A connection that hung up may have one, too. */
#ifndef INTERPOSER_PRIVATE_EPOLL_H
#define INTERPOSER_PRIVATE_EPOLL_H
#include "fdtable.h"
#include <stdint.h>

int private_epoll_add(int epfd, int fd, uint32_t events, uint64_t data);   /* EPOLL_CTL_ADD; -errno */
/* The one of this process, made at need; -errno. */
int private_epoll(struct sock *sock, int fd);
/* The one that stands in the program's epolls, made at need; -errno. */
int private_epoll_shared(struct sock *sock, int fd);
/* Have other processes that one, too? */
bool private_epoll_is_shared(const struct sock *sock);
/* The program has an epoll. Its listeners have their shared ones from the next fork on: what one process registers with an
 * epoll that it shares has to be there for the others. */
void private_epoll_needed(void);
void private_epoll_before_fork(void);
/* An epoll for one thread to wait at in accept(), until it is given back, or -errno. */
int private_epoll_take(struct sock *sock, int fd, int *place);
void private_epoll_give(struct sock *sock, int place);
void private_epoll_without_waiters(struct sock *sock);   /* in a child: the threads that waited are the parent's */
void private_epoll_companions_changed(struct sock *sock);
/* The socket listens or is connected anew: its private epolls hold what it was before. */
void private_epoll_renew(struct sock *sock);
void private_epoll_dispose(struct sock *sock);
#endif
