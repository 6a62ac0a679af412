/* What the processes that share a socket know of it together. */
#ifndef INTERPOSER_COMMON_H
#define INTERPOSER_COMMON_H
#include "fdtable.h"

/* A listener begins, and ends; a word of its own says what follows, if there is one left. */
void common_take(struct sock *sock);
void common_give(struct sock *sock);
/* What the kernel keeps of a companion for every process that has it. Marks are only ever added; unmarked, as far as known, is 0.
 * No system call in a closed sandbox. */
enum { MARK_SHUT_WRITE = 1, MARK_SHUT_READ = 2, MARK_V6 = 4 };
void common_mark(int fd, unsigned marks);
unsigned common_marks(int fd);
/* A connection learns which directions its other holders have shut. */
void common_recall(struct sock *sock, int fd);
/* A listener's companions go to another program, or have come from one. */
void common_hand_on(struct sock *sock);
void common_adopt(struct sock *sock);
bool common_is_handed_on(const struct sock *sock);
/* The program's view of a listener's O_NONBLOCK, which it shares with forked processes and with the programs that have its
 * companions. */
bool common_is_nonblocking(const struct sock *sock);
void common_set_nonblocking(struct sock *sock, bool on);
/* The listener was shut down. */
void common_tell_shut(const struct sock *sock);
bool common_is_shut(const struct sock *sock);
/* Its companions are silenced for good: who has drained them leaves it to TCP. */
void common_tell_left(const struct sock *sock);
bool common_is_left(const struct sock *sock);
/* The program waits on the listener. */
void common_mark_waiting(const struct sock *sock);
/* It calls accept(). Who has only waited may leave that to another program. */
void common_mark_accepting(const struct sock *sock);
/* This process is about to become another program, for which the listener stands in epolls alone; or has failed to. */
void common_tell_exec(const struct sock *sock, bool goes);
bool common_came_by_exec(const struct sock *sock);
/* Has this process, or one that shares the listener, waited, or accepted? */
bool common_is_accepting(const struct sock *sock);
bool common_is_served(const struct sock *sock);
#endif
