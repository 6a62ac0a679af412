/* Owns two small caches of what the kernel said about addresses, each entry good for a second. One lock, tried and
 * never waited for: who does not get it asks the kernel. Runs after fork; in a signal handler it asks the kernel. */
#include "netinfo.h"
#include "fdtable.h"
#include "real.h"
#include "reasons.h"
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <string.h>

#define ENTRIES 64
#define LIFETIME_MS 1000
#define TCP_LISTEN_STATE 10

struct entry {
    struct endpoint key;
    int64_t until;
    int32_t result;
    struct netinfo_listener answer;    /* of a local address: .address is the source */
};

static struct entry locals[ENTRIES], listeners[ENTRIES];
static _Atomic int lock;

int64_t netinfo_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void netinfo_after_fork_child(void)
{
    lock = 0;
}

static struct entry *place(struct entry *cache, const struct endpoint *ep)
{
    uint32_t hash = 2166136261u;
    for (unsigned i = 0; i < 16; i++)
        hash = (hash ^ ep->ip[i]) * 16777619u;
    hash = (hash ^ ep->port) * 16777619u;
    return &cache[(hash ^ hash >> 16) % ENTRIES];
}

static bool recall(struct entry *cache, const struct endpoint *ep, struct entry *out)
{
    bool found = false;
    if (atomic_exchange_explicit(&lock, 1, memory_order_acquire))
        return false;
    struct entry *entry = place(cache, ep);
    if (entry->until > netinfo_now() && endpoint_equal(&entry->key, ep)) {
        *out = *entry;
        found = true;
    }
    atomic_store_explicit(&lock, 0, memory_order_release);
    return found;
}

static void remember(struct entry *cache, const struct entry *entry)
{
    if (atomic_exchange_explicit(&lock, 1, memory_order_acquire))
        return;
    *place(cache, &entry->key) = *entry;
    atomic_store_explicit(&lock, 0, memory_order_release);
}

/* One request, one answer of at most `size` bytes; its length, or -errno. */
static ssize_t netlink_ask(int protocol, void *request, size_t length, void *answer, size_t size)
{
    int fd = real.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0)
        return -errno;
    ssize_t got = real.send(fd, request, length, MSG_NOSIGNAL);
    if (got >= 0)
        do
            got = real.recv(fd, answer, size, 0);
        while (got < 0 && errno == EINTR);
    if (got < 0)
        got = -errno;
    real.close(fd);
    if (got >= 0) {
        struct nlmsghdr *header = answer;
        if ((size_t)got < sizeof *header || header->nlmsg_len > (size_t)got)
            return -EPROTO;
        if (header->nlmsg_type == NLMSG_ERROR) {
            struct nlmsgerr *error = NLMSG_DATA(header);
            return error->error ? error->error : -EPROTO;
        }
    }
    return got;
}

static int ask_local(const struct endpoint *ep, struct endpoint *source)
{
    bool v4 = endpoint_is_v4(ep);
    size_t size = v4 ? 4 : 16;
    struct {
        struct nlmsghdr header;
        struct rtmsg route;
        struct rtattr destination;
        uint8_t address[16];
        struct rtattr interface;
        uint32_t index;
    } request = {
        .header = {.nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST},
        .route = {.rtm_family = v4 ? AF_INET : AF_INET6, .rtm_dst_len = (unsigned char)(size * 8)},
        .destination = {.rta_len = (unsigned short)RTA_LENGTH(size), .rta_type = RTA_DST},
        .interface = {.rta_len = RTA_LENGTH(4), .rta_type = RTA_OIF},
        .index = ep->scope,
    };
    memcpy(request.address, v4 ? ep->ip + 12 : ep->ip, size);
    request.header.nlmsg_len = ep->scope ? (uint32_t)sizeof request
                                         : (uint32_t)(offsetof(typeof(request), address) + size);
    char answer[2048] __attribute__((aligned(8)));
    ssize_t got = netlink_ask(NETLINK_ROUTE, &request, request.header.nlmsg_len, answer, sizeof answer);
    if (got == -ENETUNREACH || got == -EHOSTUNREACH || got == -EINVAL)
        return -REASON_OTHER_MACHINE;
    struct nlmsghdr *header = (struct nlmsghdr *)(void *)answer;
    if (got < 0 || header->nlmsg_type != RTM_NEWROUTE || header->nlmsg_len < NLMSG_LENGTH(sizeof(struct rtmsg)))
        return -REASON_NO_ROUTE_INFO;
    struct rtmsg *route = NLMSG_DATA(header);
    if (route->rtm_type != RTN_LOCAL)
        return -REASON_OTHER_MACHINE;
    *source = *ep;
    source->port = 0;
    int left = (int)RTM_PAYLOAD(header);
    for (struct rtattr *attribute = RTM_RTA(route); RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
        if (attribute->rta_type == RTA_PREFSRC && RTA_PAYLOAD(attribute) == size)
            memcpy(v4 ? source->ip + 12 : source->ip, RTA_DATA(attribute), size);
    return 0;
}

int netinfo_local(const struct endpoint *ep, struct endpoint *source)
{
    struct entry entry = {.key = *ep};
    entry.key.port = 0;
    if (!recall(locals, &entry.key, &entry)) {
        entry.result = ask_local(ep, &entry.answer.address);
        entry.until = netinfo_now() + LIFETIME_MS;
        remember(locals, &entry);
    }
    *source = entry.answer.address;
    return entry.result;
}

static int ask_listener(const struct endpoint *ep, struct netinfo_listener *out)
{
    bool v4 = endpoint_is_v4(ep);
    struct {
        struct nlmsghdr header;
        struct inet_diag_req_v2 body;
    } request = {
        .header = {sizeof request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0},
        .body = {.sdiag_family = v4 ? AF_INET : AF_INET6, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0u,
                 .id = {.idiag_sport = htons(ep->port), .idiag_if = ep->scope,
                        .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
    };
    memcpy(request.body.id.idiag_src, v4 ? ep->ip + 12 : ep->ip, v4 ? 4 : 16);
    char answer[2048] __attribute__((aligned(8)));
    ssize_t got = netlink_ask(NETLINK_SOCK_DIAG, &request, sizeof request, answer, sizeof answer);
    if (got == -ENOENT)
        return -REASON_NO_LISTENER;
    struct nlmsghdr *header = (struct nlmsghdr *)(void *)answer;
    if (got < 0 || header->nlmsg_type != SOCK_DIAG_BY_FAMILY ||
        header->nlmsg_len < NLMSG_LENGTH(sizeof(struct inet_diag_msg)))
        return -REASON_LISTENER_UNKNOWN;
    struct inet_diag_msg *message = NLMSG_DATA(header);
    if (message->idiag_state != TCP_LISTEN_STATE)
        return -REASON_NO_LISTENER;
    struct endpoint *address = &out->address;
    *address = (struct endpoint){.port = ep->port};
    endpoint_set_wildcard(address, message->idiag_family == AF_INET);
    if (message->idiag_family == AF_INET)
        memcpy(address->ip + 12, message->id.idiag_src, 4);
    else
        memcpy(address->ip, message->id.idiag_src, 16);
    if (address->ip[0] == 0xfe && (address->ip[1] & 0xc0) == 0x80)
        address->scope = ep->scope;
    out->owner = message->idiag_uid;
    out->dual = false;
    if (message->idiag_family != AF_INET && endpoint_is_wildcard(address) && !endpoint_is_v4(address)) {
        int left = (int)(header->nlmsg_len - NLMSG_LENGTH(sizeof *message));
        struct rtattr *attribute = (struct rtattr *)(void *)(answer + NLMSG_LENGTH(sizeof *message));
        for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
            if (attribute->rta_type == INET_DIAG_SKV6ONLY && RTA_PAYLOAD(attribute) >= 1)
                out->dual = !*(uint8_t *)RTA_DATA(attribute);
    }
    return 0;
}

int netinfo_listener(const struct endpoint *ep, struct netinfo_listener *listener)
{
    struct entry entry = {.key = *ep};
    if (!recall(listeners, ep, &entry)) {
        entry.result = ask_listener(ep, &entry.answer);
        entry.until = netinfo_now() + LIFETIME_MS;
        if (entry.result == 0)         /* a listener may appear at any moment, and must not be missed */
            remember(listeners, &entry);
    }
    *listener = entry.answer;
    return entry.result;
}
