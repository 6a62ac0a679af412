/* Two questions to the kernel, remembered for a second: is an address this machine's, and who listens there. */
#ifndef INTERPOSER_NETINFO_H
#define INTERPOSER_NETINFO_H
#include "endpoint.h"
#include <sys/types.h>

/* 0, or minus a reason number. *source: the address that an unbound client would use towards ep. */
int netinfo_local(const struct endpoint *ep, struct endpoint *source);
struct netinfo_listener {
    struct endpoint address;           /* its own: exact or a wildcard */
    uid_t owner;
    bool dual;                         /* an IPv6 wildcard that takes IPv4 clients too */
};
/* The TCP listener that a connection to ep would reach. 0, or minus a reason number. */
int netinfo_listener(const struct endpoint *ep, struct netinfo_listener *listener);
int64_t netinfo_now(void);             /* coarse monotonic milliseconds */
void netinfo_after_fork_child(void);
#endif
