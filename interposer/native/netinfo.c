/* Owns what the kernel said about addresses: two small caches and the address table. The caches have one lock, tried and
 * never waited for: who does not get it asks the kernel. The table has two places: readers count themselves in at the
 * current one, one thread at a time writes the other. Once the program has changed its name space nothing is remembered,
 * because threads may be in several. Runs after fork and in signal handlers. */
#include "netinfo.h"
#include "clock.h"
#include "fdtable.h"
#include "lifecycle.h"
#include "netlink.h"
#include "real.h"
#include "reasons.h"
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#define ENTRIES 64
#define LIFETIME_MS 900                /* from before the question: with a tick of the coarse clock, under a second */
#define REFRESH_MS 750                 /* one thread asks for a new table, the others use the old one meanwhile */
#define TCP_LISTEN_STATE 10
#define SUBNETS 256
#define LOOPBACK_INDEX 1               /* in every name space */

struct entry {
    struct endpoint key;
    int64_t until;
    int32_t result;
    struct netinfo_listener answer;    /* of a local address: .address is the source */
};

static struct entry locals[ENTRIES], listeners[ENTRIES];
static _Atomic int lock;

static void subnets_after_fork_child(void);

void netinfo_after_fork_child(void)
{
    lock = 0;
    subnets_after_fork_child();
}

static struct entry *place(struct entry *cache, const struct endpoint *ep)
{
    return &cache[endpoint_hash(ep) % ENTRIES];
}

static bool recall(struct entry *cache, const struct endpoint *ep, struct entry *out)
{
    bool found = false;
    if (lifecycle_moved || atomic_exchange_explicit(&lock, 1, memory_order_acquire))
        return false;
    struct entry *entry = place(cache, ep);
    if (entry->until > clock_coarse_ms() && endpoint_equal(&entry->key, ep)) {
        *out = *entry;
        found = true;
    }
    atomic_store_explicit(&lock, 0, memory_order_release);
    return found;
}

static void remember(struct entry *cache, const struct entry *entry)
{
    if (lifecycle_moved || atomic_exchange_explicit(&lock, 1, memory_order_acquire))
        return;
    *place(cache, &entry->key) = *entry;
    atomic_store_explicit(&lock, 0, memory_order_release);
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
        entry.until = clock_coarse_ms() + LIFETIME_MS;
        entry.result = ask_local(ep, &entry.answer.address);
        remember(locals, &entry);
    }
    *source = entry.answer.address;
    return entry.result;
}

int netinfo_local_now(const struct endpoint *ep)
{
    struct endpoint source;
    int result = netinfo_local(ep, &source);
    return result == -REASON_OTHER_MACHINE ? ask_local(ep, &source) : result;
}

struct diag_answer {
    char bytes[2048] __attribute__((aligned(8)));
    struct inet_diag_msg *message;
};

/* The TCP listener that a connection from `peer` (NULL: from anywhere) to ep would reach, with one of its attributes. 0,
 * or minus a reason number. */
static int ask_diag(const struct endpoint *ep, const struct endpoint *peer, int attribute, struct diag_answer *answer)
{
    bool v4 = endpoint_is_v4(ep);
    size_t from = v4 ? 12 : 0, size = v4 ? 4 : 16;
    struct {
        struct nlmsghdr header;
        struct inet_diag_req_v2 body;
    } request = {
        .header = {sizeof request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0},
        .body = {.sdiag_family = v4 ? AF_INET : AF_INET6, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0u,
                 .idiag_ext = (uint8_t)(attribute <= 8 ? 1u << (attribute - 1) : 0),
                 .id = {.idiag_sport = htons(ep->port), .idiag_if = ep->scope,
                        .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
    };
    memcpy(request.body.id.idiag_src, ep->ip + from, size);
    if (peer) {
        request.body.id.idiag_dport = htons(peer->port);
        memcpy(request.body.id.idiag_dst, peer->ip + from, size);
    }
    ssize_t got = netlink_ask(NETLINK_SOCK_DIAG, &request, sizeof request, answer->bytes, sizeof answer->bytes);
    if (got == -ENOENT)
        return -REASON_NO_LISTENER;
    struct nlmsghdr *header = (struct nlmsghdr *)(void *)answer->bytes;
    if (got < 0 || header->nlmsg_type != SOCK_DIAG_BY_FAMILY ||
        header->nlmsg_len < NLMSG_LENGTH(sizeof(struct inet_diag_msg)))
        return -REASON_LISTENER_UNKNOWN;
    answer->message = NLMSG_DATA(header);
    return answer->message->idiag_state == TCP_LISTEN_STATE ? 0 : -REASON_NO_LISTENER;
}

static const void *diag_attribute(const struct diag_answer *answer, int type, size_t size)
{
    const struct nlmsghdr *header = (const struct nlmsghdr *)(const void *)answer->bytes;
    int left = (int)(header->nlmsg_len - NLMSG_LENGTH(sizeof(struct inet_diag_msg)));
    const struct rtattr *attribute =
        (const struct rtattr *)(const void *)(answer->bytes + NLMSG_LENGTH(sizeof(struct inet_diag_msg)));
    for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
        if (attribute->rta_type == type && RTA_PAYLOAD(attribute) >= size)
            return RTA_DATA(attribute);
    return NULL;
}

static int ask_listener(const struct endpoint *ep, struct netinfo_listener *out)
{
    struct diag_answer answer;
    int error = ask_diag(ep, NULL, INET_DIAG_SKV6ONLY, &answer);
    if (error)
        return error;
    struct inet_diag_msg *message = answer.message;
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
        const uint8_t *only = diag_attribute(&answer, INET_DIAG_SKV6ONLY, 1);
        out->dual = only && !*only;
    }
    return 0;
}

int netinfo_discarded(const struct endpoint *ep, const struct endpoint *peer, uint32_t *count)
{
    struct diag_answer answer;
    int error = ask_diag(ep, peer, INET_DIAG_SKMEMINFO, &answer);
    const uint32_t *memory = error ? NULL : diag_attribute(&answer, INET_DIAG_SKMEMINFO, (SK_MEMINFO_DROPS + 1) * sizeof *memory);
    if (memory)
        *count = memory[SK_MEMINFO_DROPS];
    return error ? error : memory ? 0 : -REASON_LISTENER_UNKNOWN;
}

int netinfo_listener(const struct endpoint *ep, struct netinfo_listener *listener)
{
    struct entry entry = {.key = *ep};
    if (!recall(listeners, ep, &entry)) {
        entry.until = clock_coarse_ms() + LIFETIME_MS;
        entry.result = ask_listener(ep, &entry.answer);
        if (entry.result == 0)         /* a listener may appear at any moment, and must not be missed */
            remember(listeners, &entry);
    }
    *listener = entry.answer;
    return entry.result;
}

/* --- the address table --- */

struct entry_of_table {
    struct subnet subnet;
    uint32_t providers;                /* a bit for each id */
};

struct table {
    int64_t made;
    unsigned count;
    bool whole;                        /* all addresses of the machine are in it */
    bool loopback;
    struct entry_of_table entries[SUBNETS];
};

struct answer {
    char bytes[4096] __attribute__((aligned(8)));    /* the kernel makes portions for the buffer that it is offered */
};

struct own_table {
    struct table table;
    struct answer answer;
};

static struct table tables[2] = {{.made = -LIFETIME_MS}, {.made = -LIFETIME_MS}};
static _Atomic int readers[2], current, writing;

static void subnets_after_fork_child(void)
{
    readers[0] = readers[1] = writing = 0;
}

static void take_address(struct table *table, const struct nlmsghdr *header)
{
    const struct ifaddrmsg *message = NLMSG_DATA(header);
    bool v4 = message->ifa_family == AF_INET;
    size_t size = v4 ? 4 : 16;
    const uint8_t *own = NULL, *other = NULL;
    int left = (int)IFA_PAYLOAD(header);
    for (const struct rtattr *attribute = IFA_RTA(message); RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
        if (attribute->rta_type == IFA_LOCAL && RTA_PAYLOAD(attribute) == size)
            own = RTA_DATA(attribute);
        if (attribute->rta_type == IFA_ADDRESS && RTA_PAYLOAD(attribute) == size)
            other = RTA_DATA(attribute);
    }
    own = own ? own : other;
    if ((!v4 && message->ifa_family != AF_INET6) || !own || message->ifa_prefixlen > size * 8)
        return;
    if (table->count == SUBNETS) {
        table->whole = false;
        return;
    }
    struct entry_of_table *entry = &table->entries[table->count++];
    *entry = (struct entry_of_table){.subnet.interface = message->ifa_index};
    struct endpoint *address = &entry->subnet.address;
    endpoint_set_wildcard(address, v4);
    memcpy(v4 ? address->ip + 12 : address->ip, own, size);
    if (address->ip[0] == 0xfe && (address->ip[1] & 0xc0) == 0x80)
        address->scope = message->ifa_index;
    /* Of a point-to-point link the prefix is the other end's. */
    bool alone = other && memcmp(own, other, size) != 0;
    entry->subnet.prefix = (uint8_t)(alone ? 128 : 128 - size * 8 + message->ifa_prefixlen);
}

enum { ASKED_LINK = 1, ASKED_ADDRESSES = 2 };

/* False: nothing more will come. */
static bool take_answer(struct table *table, const struct answer *answer, size_t got, bool *interrupted)
{
    const struct nlmsghdr *header = (const struct nlmsghdr *)(const void *)answer;
    for (int left = (int)got; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
        if (header->nlmsg_flags & NLM_F_DUMP_INTR)
            *interrupted = true;
        if (header->nlmsg_type == RTM_NEWLINK && header->nlmsg_len >= NLMSG_LENGTH(sizeof(struct ifinfomsg)))
            table->loopback = ((const struct ifinfomsg *)NLMSG_DATA(header))->ifi_flags & IFF_UP;
        if (header->nlmsg_type == RTM_NEWADDR && header->nlmsg_len >= NLMSG_LENGTH(sizeof(struct ifaddrmsg)))
            take_address(table, header);
        if (header->nlmsg_seq == ASKED_ADDRESSES && header->nlmsg_type == NLMSG_ERROR)
            table->whole = false;
        if (!table->whole || header->nlmsg_type == NLMSG_DONE)
            return false;
    }
    return true;
}

static void ask_addresses(struct table *table, struct answer *answer, bool *interrupted)
{
    struct {
        struct nlmsghdr link_header;
        struct ifinfomsg link;
        struct nlmsghdr addresses_header;
        struct ifaddrmsg addresses;
    } request = {
        .link_header = {offsetof(typeof(request), addresses_header), RTM_GETLINK, NLM_F_REQUEST, ASKED_LINK, 0},
        .link = {.ifi_index = LOOPBACK_INDEX},
        .addresses_header = {NLMSG_LENGTH(sizeof request.addresses), RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP,
                             ASKED_ADDRESSES, 0},
    };
    int cancel, fd = netlink_open(NETLINK_ROUTE, &cancel);
    bool more = fd >= 0 && real.send(fd, &request, sizeof request, MSG_NOSIGNAL) == sizeof request;
    table->whole = more;
    while (more) {
        ssize_t got = real.recv(fd, answer, sizeof *answer, MSG_DONTWAIT | MSG_TRUNC);
        if (got <= 0 || (size_t)got > sizeof *answer)
            table->whole = false;
        more = table->whole && take_answer(table, answer, (size_t)got, interrupted);
    }
    if (fd >= 0)
        netlink_close(fd, cancel);
}

static void build(struct table *table, struct answer *answer)
{
    bool interrupted = false;
    table->made = clock_coarse_ms();
    table->count = 0;
    table->loopback = true;
    ask_addresses(table, answer, &interrupted);
    const struct san_provider *provider;
    for (int n = 0; (provider = provider_nth(n)); n++)
        for (unsigned i = 0; i < table->count; i++)
            if (provider->wsp_serves(&table->entries[i].subnet))
                table->entries[i].providers |= 1u << provider->id;
    if (interrupted)                   /* addresses changed meanwhile: not for later decisions */
        table->made -= LIFETIME_MS;
}

static struct table *read_current(void)
{
    for (int turn = 0; turn < 3; turn++) {
        int place = current;
        readers[place]++;
        if (current == place)
            return &tables[place];
        readers[place]--;
    }
    return NULL;
}

static void give_table(struct table *table)
{
    if (table == &tables[0] || table == &tables[1])
        readers[table - tables]--;
    else if (table)
        munmap(table, sizeof(struct own_table));
}

/* Makes the other place current, unless somebody is at it. */
static void renew(void)
{
    static struct answer answer;
    if (atomic_exchange(&writing, 1))
        return;
    int other = !current;
    if (readers[other] <= 0) {         /* less: forked by a signal handler while it was read */
        build(&tables[other], &answer);
        current = other;
    }
    writing = 0;
}

/* The table, not older than LIFETIME_MS: the common one, or the caller's own. NULL when memory is short. */
static struct table *take_table(void)
{
    for (int turn = 0; turn < 2 && !lifecycle_moved; turn++) {
        struct table *table = read_current();
        int64_t age = table ? clock_coarse_ms() - table->made : 0;
        if (table && age < (turn ? LIFETIME_MS : REFRESH_MS))
            return table;
        give_table(table);
        if (!turn)
            renew();
    }
    struct own_table *own = mmap(NULL, sizeof *own, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED)
        return NULL;
    build(&own->table, &own->answer);
    return &own->table;
}

static bool contains(const struct subnet *subnet, const struct endpoint *address)
{
    unsigned bytes = subnet->prefix / 8, bits = subnet->prefix % 8;
    return subnet->address.scope == address->scope && endpoint_is_v4(&subnet->address) == endpoint_is_v4(address) &&
           memcmp(subnet->address.ip, address->ip, bytes) == 0 &&
           (!bits || ((subnet->address.ip[bytes] ^ address->ip[bytes]) >> (8 - bits)) == 0);
}

/* The providers of an address: of its own entry, else of the narrowest subnet that it is in. False: it is in none. */
static bool find_providers(const struct table *table, const struct endpoint *local, uint32_t *providers)
{
    enum { OWN = 129 };
    bool any = endpoint_is_wildcard(local), both = any && !endpoint_is_v4(local);
    int best = -1;
    *providers = 0;
    for (unsigned i = 0; i < table->count; i++) {
        const struct subnet *subnet = &table->entries[i].subnet;
        int fit = any                                           ? (both || endpoint_is_v4(&subnet->address) ? 0 : -1)
                  : endpoint_same_ip(&subnet->address, local)   ? OWN
                  : table->whole && contains(subnet, local)     ? subnet->prefix
                                                                : -1;
        if (fit > best) {
            best = fit;
            *providers = 0;
        }
        if (fit >= 0 && fit == best)
            *providers |= table->entries[i].providers;
    }
    return best >= 0;
}

bool netinfo_serves(const struct san_provider *provider, const struct endpoint *local)
{
    bool any = endpoint_is_wildcard(local), found = false;
    uint32_t providers = 0;
    struct table *table = provider->id < PROVIDER_IDS ? take_table() : NULL;
    if (table)
        found = find_providers(table, local, &providers);
    give_table(table);
    bool served = found && providers >> provider->id & 1;
    if (served || (found && !any))
        return served;
    struct subnet known = {.address = *local, .prefix = 128, .interface = local->scope};
    known.address.port = 0;
    if (any)
        known.prefix = endpoint_is_v4(local) ? 96 : 0;
    return provider->wsp_serves(&known);
}

bool netinfo_loopback_up(void)
{
    struct table *table = take_table();
    bool up = !table || table->loopback;
    give_table(table);
    return up;
}
