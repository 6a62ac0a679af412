/* The local address and port of a socket. */
#ifndef INTERPOSER_PORTS_H
#define INTERPOSER_PORTS_H
#include "fdtable.h"

/* As the kernel says; false and *local as it was where it has none. */
bool ports_local(int fd, struct endpoint *local);
/* S12: gives the TCP socket a concrete address and port where it has none: `source` and a free port. 0 and *local, or minus a
 * reason number. */
int ports_bind(struct sock *sock, int fd, const struct endpoint *source, struct endpoint *local);
/* Binds to local's address and a port that nobody has, into *local. False: with the errno of the last attempt. */
bool ports_own(const struct sock *sock, int fd, struct endpoint *local);
/* Binds to local's address and a port that bind() is not to have named: it goes with the connection. */
bool ports_by_kernel(const struct sock *sock, int fd, struct endpoint *local);
void ports_after_fork_child(void);
#endif
