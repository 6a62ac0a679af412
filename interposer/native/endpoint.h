/* One normal form of an IP address and port for the whole switch: IPv4 is held as ::ffff:a.b.c.d. Stateless; may be
 * used anywhere. */
#ifndef INTERPOSER_ENDPOINT_H
#define INTERPOSER_ENDPOINT_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#define ENDPOINT_TEXT 64

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
static inline bool endpoint_is_v4(const struct endpoint *ep)
{
    return memcmp(ep->ip, "\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0;
}

static inline bool endpoint_is_wildcard(const struct endpoint *ep)
{
    static const uint8_t zero[16];
    return memcmp(ep->ip, zero, 16) == 0 || (endpoint_is_v4(ep) && memcmp(ep->ip + 12, zero, 4) == 0);
}

static inline bool endpoint_is_loopback4(const struct endpoint *ep)
{
    return endpoint_is_v4(ep) && ep->ip[12] == 127;
}

static inline bool endpoint_same_ip(const struct endpoint *a, const struct endpoint *b)
{
    return memcmp(a->ip, b->ip, 16) == 0 && a->scope == b->scope;
}

static inline bool endpoint_equal(const struct endpoint *a, const struct endpoint *b)
{
    return a->port == b->port && endpoint_same_ip(a, b);
}

static inline uint32_t endpoint_hash(const struct endpoint *ep)
{
    uint64_t words[2];
    memcpy(words, ep->ip, sizeof words);
    uint64_t hash = (words[0] * 0x9e3779b97f4a7c15ull ^ words[1] ^ (uint64_t)ep->port << 17) * 0xff51afd7ed558ccdull;
    return (uint32_t)(hash >> 32);
}
void endpoint_set_wildcard(struct endpoint *ep, bool v4);
/* "127.0.0.1:80" or "[::1]:80"; returns the length written without the NUL; ENDPOINT_TEXT always suffices. */
size_t endpoint_text(const struct endpoint *ep, char *out, size_t size);
#endif
