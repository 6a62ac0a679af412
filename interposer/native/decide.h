/* What listen(), connect() and accept() share: a socket goes into one thread's hands, gets its verdict, and is served. */
#ifndef INTERPOSER_DECIDE_H
#define INTERPOSER_DECIDE_H
#include "fdtable.h"
#include "lifecycle.h"
#include "switch.h"
#include <errno.h>

static inline int fail(int error)
{
    errno = error;
    return -1;
}

/* The state with a reference, in the right process: a fork that no handler saw resets all references. */
static inline struct sock *decide_hold(int fd)
{
    lifecycle_check();
    return fdtable_get(fd);
}

/* Takes a fresh socket into our hands (SOCK_DECIDING); false where libc should answer. */
static inline bool decide_begin(struct sock *sock)
{
    uint8_t expected = SOCK_FRESH;
    if (switch_guard || lifecycle_borrowed() || !atomic_compare_exchange_strong(&sock->phase, &expected, SOCK_DECIDING))
        return false;
    sock->left = false;
    return true;
}

/* The verdict for a socket in our hands, which its state remembers. */
void decide_request(struct sock *sock, uint8_t role, const struct endpoint *local, const struct endpoint *remote,
                    struct verdict *verdict);
/* The socket is TCP's from here on. */
void decide_tcp(int fd, struct sock *sock, uint32_t role, int reason);
#endif
