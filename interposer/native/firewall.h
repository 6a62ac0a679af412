/* X9: what the administrator forbids TCP is not made possible by a SAN. */
#ifndef INTERPOSER_FIREWALL_H
#define INTERPOSER_FIREWALL_H
#include "endpoint.h"

/* May a connection from `source`, whose port does not count, to `remote` be carried by a SAN? 0, or minus a reason
 * number. */
int firewall_connect(const struct endpoint *source, const struct endpoint *remote);
/* The same for the TCP listener at `local`; one for both families is v6 without `v6only`. */
int firewall_listen(const struct endpoint *local, bool v6only);
void firewall_after_fork_child(void);
#endif
