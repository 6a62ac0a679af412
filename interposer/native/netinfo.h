/* What the kernel says about addresses, remembered for less than a second: is one this machine's, who listens there, and
 * the address table (S25): the machine's subnets and the providers that serve them. */
#ifndef INTERPOSER_NETINFO_H
#define INTERPOSER_NETINFO_H
#include "spi.h"
#include <sys/types.h>

/* 0, or minus a reason number. *source: the address that an unbound client would use towards ep. */
int netinfo_local(const struct endpoint *ep, struct endpoint *source);
/* The same for those who may not take a remembered no for an answer: an address may have come since. */
int netinfo_local_now(const struct endpoint *ep);
struct netinfo_listener {
    struct endpoint address;           /* its own: exact or a wildcard */
    uid_t owner;
    bool dual;                         /* an IPv6 wildcard that takes IPv4 clients too */
};
/* The TCP listener that a connection to ep would reach. 0, or minus a reason number. */
int netinfo_listener(const struct endpoint *ep, struct netinfo_listener *listener);
/* How many packets that listener has discarded; one from `peer` would be counted there. Never remembered. */
int netinfo_discarded(const struct endpoint *ep, const struct endpoint *peer, uint32_t *count);
/* Does the provider serve the subnet of this local address? That of an address that is local by a route alone (127.0.0.2) is
 * the narrowest in the table that it is in. The provider itself is asked about `local` alone (prefix 128, interface 0)
 * where there is none, where the kernel gives no table or where the table is too small; and about the wildcard
 * (prefix 96 for IPv4, else 0), which stands for addresses that are still to come, where no subnet is served. */
bool netinfo_serves(const struct san_provider *provider, const struct endpoint *local);
/* False: no connection within the machine would get through. */
bool netinfo_loopback_up(void);
void netinfo_after_fork_child(void);
#endif
