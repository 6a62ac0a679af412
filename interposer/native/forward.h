/* Clients that wait at a companion listener which this process is about to lose go to another one at the same address, as
 * TCP's one queue would serve them. A waiting connection is accepted and travels by SCM_RIGHTS in a carrier, an AF_UNIX
 * connection whose native name says what it is. */
#ifndef INTERPOSER_FORWARD_H
#define INTERPOSER_FORWARD_H
#include "fdtable.h"
#include <sys/un.h>

/* The process ends by itself: what waits at listeners that nobody shares with it, but that other programs have too. */
void forward_at_exit(void);
/* The last reference to such a listener goes. */
void forward_waiting(struct sock *sock);

bool forward_is_carrier(const struct sockaddr_un *name, socklen_t length);
/* A fresh carrier, not connected yet; -1: none. */
int forward_carrier(void);
/* 0 or -errno; -EPIPE: whoever accepted the carrier was too fast for it, and may not be the next time. */
int forward_send(int carrier, int connection);
/* What came in the accepted carrier takes its number; false: nothing proper, and the carrier is closed. Who sent it is for
 * the caller to check first. */
bool forward_receive(int carrier, bool nonblocking, bool cloexec);
#endif
