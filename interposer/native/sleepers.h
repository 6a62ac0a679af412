/* Which threads of this process sleep in the kernel on a descriptor. */
#ifndef INTERPOSER_SLEEPERS_H
#define INTERPOSER_SLEEPERS_H
#include "fdtable.h"

/* Does another thread wait for data of the socket, or poll descriptors, which may be its own? Some ten microseconds for
 * each thread. */
bool sleepers_wait_for(const struct sock *sock);
#endif
