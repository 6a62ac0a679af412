/* The names of a socket at its two ends, as the program is told them (S26). */
#ifndef INTERPOSER_NAMES_H
#define INTERPOSER_NAMES_H
#include "fdtable.h"

/* As the kernel hands an address out: 0 or -errno. */
int names_tell(const struct endpoint *ep, int family, struct sockaddr *address, socklen_t *length);
/* The peer has closed after the program's own SHUT_WR, or has reset: TCP would not know it any more. *ended: has the peer
 * ended its sending, as far as the kernel tells? */
bool names_is_over(struct sock *sock, int fd, bool *ended);
#endif
