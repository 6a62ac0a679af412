/* One normal form of an IP address and port for the whole switch: IPv4 is held as ::ffff:a.b.c.d. Stateless; may be
 * used anywhere. */
#ifndef INTERPOSER_ENDPOINT_H
#define INTERPOSER_ENDPOINT_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

struct endpoint {
    uint8_t ip[16];
    uint32_t scope;    /* interface index of a link-local address, else 0 */
    uint16_t port;     /* host order */
    uint16_t reserved;
};

/* No program has memory there: NULL, or a small number taken for a pointer. libc is to answer. */
static inline bool is_no_pointer(const void *pointer)
{
    return (uintptr_t)pointer < 4096;
}

/* false: not AF_INET or AF_INET6, or too short. */
bool endpoint_from_sockaddr(struct endpoint *ep, const struct sockaddr *sa, socklen_t len);
/* Writes as accept() and getsockname() do: at most *len bytes, and the full size to *len. `family` is the socket's. */
void endpoint_to_sockaddr(const struct endpoint *ep, int family, struct sockaddr *sa, socklen_t *len);
bool endpoint_is_v4(const struct endpoint *ep);
bool endpoint_is_wildcard(const struct endpoint *ep);
bool endpoint_is_loopback4(const struct endpoint *ep);
bool endpoint_same_ip(const struct endpoint *a, const struct endpoint *b);
bool endpoint_equal(const struct endpoint *a, const struct endpoint *b);
void endpoint_set_wildcard(struct endpoint *ep, bool v4);
/* "127.0.0.1:80" or "[::1]:80"; returns the length written without the NUL; size 64 always suffices. */
size_t endpoint_text(const struct endpoint *ep, char *out, size_t size);
#endif
