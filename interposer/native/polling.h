/* poll and select over sockets with companions. */
#ifndef INTERPOSER_POLLING_H
#define INTERPOSER_POLLING_H
#include "fdtable.h"
#include "real.h"

int polling_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask);
int polling_poll(struct pollfd *fds, nfds_t count, int timeout);
int polling_select(int count, fd_set *in, fd_set *out, fd_set *except, struct timespec *timeout, const sigset_t *mask);
/* Does any of these sets hold a listener with companions? */
bool polling_selects(int count, const fd_set *in, const fd_set *out, const fd_set *except);
/* As far as the kernel would look at such sets without hidden descriptors: it reads as many bits as its table of descriptors
 * has places, however large an fd_set is. For counts above FD_SETSIZE. */
int polling_select_bound(int count);
void polling_high_number(void);        /* the program has chosen a number above FD_SETSIZE */

/* The kernel sleeps on the files that it begins with: of a descriptor whose file may be exchanged a copy is to stand in the
 * call, if there is a number left, and what wakes it is to be looked up again. polling_sleep() closes copies, too where the
 * thread is cancelled. */
struct pollfd polling_copy(const struct pollfd *entry);
int polling_sleep(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask);
#endif
