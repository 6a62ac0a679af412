/* Pure functions on addresses; no state. */
#include "endpoint.h"
#include <netinet/in.h>
#include <string.h>

static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

bool endpoint_from_sockaddr(struct endpoint *ep, const struct sockaddr *sa, socklen_t len)
{
    *ep = (struct endpoint){0};
    if (len >= sizeof(struct sockaddr_in) && sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)sa;
        memcpy(ep->ip, mapped, 12);
        memcpy(ep->ip + 12, &in->sin_addr, 4);
        ep->port = ntohs(in->sin_port);
        return true;
    }
    if (len >= 24 && sa->sa_family == AF_INET6) {   /* RFC 2133 callers leave sin6_scope_id out */
        const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)(const void *)sa;
        memcpy(ep->ip, &in->sin6_addr, 16);
        ep->port = ntohs(in->sin6_port);
        if (len >= sizeof *in && ep->ip[0] == 0xfe && (ep->ip[1] & 0xc0) == 0x80)
            ep->scope = in->sin6_scope_id;
        return true;
    }
    return false;
}

void endpoint_to_sockaddr(const struct endpoint *ep, int family, struct sockaddr *sa, socklen_t *len)
{
    union {
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } out;
    socklen_t full;
    memset(&out, 0, sizeof out);
    if (family == AF_INET) {
        out.v4.sin_family = AF_INET;
        out.v4.sin_port = htons(ep->port);
        memcpy(&out.v4.sin_addr, ep->ip + 12, 4);
        full = sizeof out.v4;
    } else {
        out.v6.sin6_family = AF_INET6;
        out.v6.sin6_port = htons(ep->port);
        memcpy(&out.v6.sin6_addr, ep->ip, 16);
        out.v6.sin6_scope_id = ep->scope;
        full = sizeof out.v6;
    }
    memcpy(sa, &out, *len < full ? *len : full);
    *len = full;
}

void endpoint_set_wildcard(struct endpoint *ep, bool v4)
{
    memset(ep->ip, 0, 16);
    if (v4)
        memcpy(ep->ip, mapped, 12);
    ep->scope = 0;
}

static char *put_number(char *at, uint32_t value)
{
    unsigned count = 1;
    for (uint64_t limit = 10; value >= limit; limit *= 10)
        count++;
    for (char *digit = at + count; digit-- > at; value /= 10)
        *digit = (char)('0' + value % 10);
    return at + count;
}

static char *put_v6(char *at, const uint8_t ip[16])
{
    int best = -1, best_length = 1;    /* a single zero group is written out (RFC 5952) */
    for (int from = 0; from < 8; from++) {
        int length = 0;
        while (from + length < 8 && !ip[2 * (from + length)] && !ip[2 * (from + length) + 1])
            length++;
        if (length > best_length) {
            best = from;
            best_length = length;
        }
    }
    for (int group = 0; group < 8; group++) {
        if (group == best) {
            *at++ = ':';
            if (group == 0)
                *at++ = ':';
            group += best_length - 1;
            continue;
        }
        unsigned value = (unsigned)ip[2 * group] << 8 | ip[2 * group + 1];
        bool started = false;
        for (int shift = 12; shift >= 0; shift -= 4) {
            unsigned digit = value >> shift & 15;
            if (digit || started || shift == 0) {
                *at++ = "0123456789abcdef"[digit];
                started = true;
            }
        }
        if (group < 7)
            *at++ = ':';
    }
    return at;
}

size_t endpoint_text(const struct endpoint *ep, char *out, size_t size)
{
    char own[ENDPOINT_TEXT], *text = size < sizeof own ? own : out, *at = text;
    if (endpoint_is_v4(ep)) {
        for (int i = 12; i < 16; i++) {
            at = put_number(at, ep->ip[i]);
            if (i < 15)
                *at++ = '.';
        }
    } else {
        *at++ = '[';
        at = put_v6(at, ep->ip);
        if (ep->scope) {
            *at++ = '%';
            at = put_number(at, ep->scope);
        }
        *at++ = ']';
    }
    *at++ = ':';
    at = put_number(at, ep->port);
    size_t length = (size_t)(at - text);
    if (length >= size)
        length = size ? size - 1 : 0;
    if (text != out)
        memcpy(out, text, length);
    if (size)
        out[length] = 0;
    return length;
}
