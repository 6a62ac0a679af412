/* A connect() whose provider said -EINPROGRESS. Until wpu_complete_overlapped_request a placeholder stands under the
 * program's descriptors: one end of a full AF_UNIX pair, neither readable nor writable, as a TCP socket in SYN_SENT is.
 * Whoever sleeps on it is woken by the hang-up when it goes. */
#ifndef INTERPOSER_CONNECTING_H
#define INTERPOSER_CONNECTING_H
#include "fdtable.h"

/* The lower half of sock->completion: armed, an up-call will end the connect; running, its end is being made. Above: it has
 * ended before wsp_connect returned, with minus the difference. The upper half is the attempt's number. */
enum { COMPLETION_NONE, COMPLETION_OPEN, COMPLETION_ARMED, COMPLETION_RUNNING, COMPLETION_EARLY = 0x10000 };

/* Connects in progress in this process, and exchanges. */
extern _Atomic uint32_t connecting_count;

/* Puts the placeholder under the descriptors of a socket whose TCP socket is parked. 0, or -errno and nothing changed. */
int connecting_begin(struct sock *sock, int fd, const struct verdict *verdict);
/* Which of the verdict's providers is at work. */
void connecting_provider(struct sock *sock, int index);
/* A hidden descriptor of the placeholder. */
int connecting_own(const struct sock *sock);
/* The TCP socket takes the placeholder's place. */
void connecting_give_back(struct sock *sock, int fd);
/* After the socket's new phase is set: wakes who waits. Nothing where no connect was in progress. */
void connecting_release(struct sock *sock);
/* Ends it for the program's sake: as before connect(). False: it has just ended by itself. */
bool connecting_cancel(struct sock *sock, int fd);
/* The socket is gone: no descriptor is left. */
void connecting_dispose(struct sock *sock);
/* The child has no thread that would complete it: each descriptor gets the TCP socket, then the socket is TCP's. */
void connecting_after_fork_child(struct sock *sock, int fd);
void connecting_end_in_child(struct sock *sock);
void connecting_unlock_in_child(void);
/* Waits as a blocking connect() does, without a reference: *held is NULL where another socket has taken the number. 0 when
 * it has ended one way or another, or -errno: -EINPROGRESS after the time of the option `limit`, SO_SNDTIMEO or
 * SO_RCVTIMEO. */
int connecting_wait(struct sock **held, int fd, int limit);
/* Is it still in progress? While its end is being made the descriptors may show it before the socket's phase does: waits
 * until they agree. */
bool connecting_goes_on(const struct sock *sock);
/* From wpu.c: 0, or -EINVAL where that attempt is not in progress. */
int connecting_complete(struct sock *sock, uint32_t attempt, int error);

/* Another thread may exchange the files under a socket's descriptors at any moment: calls that close, duplicate or
 * overwrite such a number are made between these two. Who closes looks once more after the number has left the table,
 * because the exchange may have begun since: it counts itself first, and then looks at the table. */
bool connecting_hold(void);
void connecting_let_go(bool held);
static inline bool connecting_hold_if_any(void)
{
    return atomic_load(&connecting_count) && connecting_hold();
}

static inline bool connecting_begin_exchange(void)
{
    atomic_fetch_add(&connecting_count, 1);
    return connecting_hold();
}

static inline void connecting_end_exchange(bool held)
{
    connecting_let_go(held);
    atomic_fetch_sub(&connecting_count, 1);
}
#endif
