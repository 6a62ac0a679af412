/* poll, select and epoll over sockets with companions. A listener with companions has a private epoll of this process
 * that holds all of its listeners: it waits in the listener's place in poll, select and blocking accept, and stands in
 * the program's epolls with the program's data, so that one readiness is one event. */
#ifndef INTERPOSER_READINESS_H
#define INTERPOSER_READINESS_H
#include "fdtable.h"
#include "real.h"

int readiness_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask);
int readiness_poll(struct pollfd *fds, nfds_t count, int timeout);
int readiness_select(int count, fd_set *in, fd_set *out, fd_set *except, struct timespec *timeout, const sigset_t *mask);
/* Does any of these sets hold a listener with companions? */
bool readiness_selects(int count, const fd_set *in, const fd_set *out, const fd_set *except);
/* As far as the kernel would look at such sets without hidden descriptors: it reads as many bits as its table of descriptors
 * has places, however large an fd_set is. For counts above FD_SETSIZE. */
int readiness_select_bound(int count);
void readiness_high_number(void);      /* the program has chosen a number above FD_SETSIZE */
/* epoll_ctl() has failed for a descriptor that is no socket of ours: a listener's private epoll costs one level of nesting,
 * so the listeners may have to be without. `saved` is the errno that success leaves. */
int readiness_nest(int epfd, int operation, int fd, struct epoll_event *event, int saved);
void readiness_epoll_made(void);       /* the program has an epoll */
void readiness_before_fork(void);
int readiness_epoll_ctl(struct sock *sock, int epfd, int operation, int fd, struct epoll_event *event);

/* Around the exchange of the file under a socket's descriptors: takes all registrations out, and puts them in again;
 * `keep`: they stay recorded. */
void readiness_before_swap(struct sock *sock);
void readiness_after_swap(struct sock *sock, bool keep);
/* Before a companion makes way for a TCP socket: what epolls hold under its numbers is recorded again. */
void readiness_recall(struct sock *sock, int fd);
/* After listen(): registrations made before it now stand for the companions too. 0, or minus a reason number. */
/* The socket listens or is connected anew: its private epoll holds what it was before. */
void readiness_renew_epoll(struct sock *sock);
int readiness_adopt_listener(struct sock *sock, int fd);
/* Is the socket registered with any epoll? */
bool readiness_is_awaited(const struct sock *sock);
/* New companions have taken the place of silenced ones: where the epolls of this process held those, they hold these. */
int readiness_renew_listener(struct sock *sock);
/* Before the companions are closed: registrations stand for the TCP listener alone. */
void readiness_abandon_listener(struct sock *sock);
/* fd is no alias any more, and about to be closed: what stands in epolls under its number is another's to change. */
void readiness_forget_alias(struct sock *sock, int fd);
/* The socket is gone. */
/* Closes a private epoll that nothing holds and, in a process with one thread, nobody waits on; false: there was none. */
bool readiness_yield(struct sock *sock);
void readiness_dispose(struct sock *sock);
/* An epoll for one thread to wait at in accept(), until it is given back, or -errno. */
int readiness_take_epoll(struct sock *sock, int fd, int *place);
void readiness_give_epoll(struct sock *sock, int place);
void readiness_without_waiters(struct sock *sock);   /* in a child: the threads that waited are the parent's */
/* The listener's private epoll in this process, made at need; -errno. */
int readiness_private_epoll(struct sock *sock, int fd);
#endif
