/* epoll over sockets with companions: a listener's private epoll stands in the program's epolls with the program's data, so that
 * one readiness is one event, and what was registered follows a socket whose file is exchanged. */
#ifndef INTERPOSER_READINESS_H
#define INTERPOSER_READINESS_H
#include "fdtable.h"
#include "real.h"

/* epoll_ctl() has failed for a descriptor that is no socket of ours: a listener's private epoll costs one level of nesting,
 * so the listeners may have to be without. `saved` is the errno that success leaves. */
int readiness_nest(int epfd, int operation, int fd, struct epoll_event *event, int saved);
int readiness_epoll_ctl(struct sock *sock, int epfd, int operation, int fd, struct epoll_event *event);

/* Around the exchange of the file under a socket's descriptors: takes all registrations out, and puts them in again;
 * `keep`: they stay recorded. */
void readiness_before_swap(struct sock *sock);
void readiness_after_swap(struct sock *sock, bool keep);
/* Before a companion makes way for a TCP socket: what epolls hold under its numbers is recorded again. */
void readiness_recall(struct sock *sock, int fd);
/* After listen(): registrations made before it now stand for the companions too. 0, or minus a reason number. */
int readiness_adopt_listener(struct sock *sock, int fd);
/* Undoes readiness_abandon_listener(). */
int readiness_rejoin(struct sock *sock, int fd);
/* Is the socket registered with any epoll? */
bool readiness_is_awaited(const struct sock *sock);
/* New companions have taken the place of silenced ones: where the epolls of this process held those, they hold these. */
int readiness_renew_listener(struct sock *sock);
/* Before the companions are closed: registrations stand for the TCP listener alone. */
void readiness_abandon_listener(struct sock *sock);
/* fd is no alias any more, and about to be closed: what stands in epolls under its number is another's to change. */
void readiness_forget_alias(struct sock *sock, int fd);
/* Closes a private epoll that nothing holds and, in a process with one thread, nobody waits on; false: there was none. */
bool readiness_yield(struct sock *sock);
void readiness_dispose(struct sock *sock);   /* the socket is gone */
#endif
