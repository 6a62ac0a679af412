/* Packet filters, asked in two ways. Whoever may (CAP_NET_ADMIN) asks for the rules: any in a chain that sees the machine's
 * own packets means TCP, because nobody but the kernel can tell what they do. Where the kernel does not tell (rules to other
 * users) or there is something that often does no harm (address translation, programs of the control group, such as those of
 * IPAddressDeny=), it is found by effect: a SYN with a signature that no listener expects goes the whole way of a
 * connection, and the listener's kernel side discards and counts it. No program sees anything of it.
 *
 * Owns what was found a moment ago, under a lock that is tried and never waited for: who does not get it asks the kernel.
 * Once the program has changed its name space nothing is remembered. Runs after fork. */
#include "firewall.h"
#include "clock.h"
#include "flows.h"
#include "lifecycle.h"
#include "netinfo.h"
#include "netlink.h"
#include "real.h"
#include "reasons.h"
#include <netinet/in.h>               /* before the kernel's own headers, which then leave out what it has */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/fib_rules.h>
#include <linux/magic.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define LIFETIME_MS 900                /* from before the question: with a tick of the coarse clock, under a second */
#define ENTRIES 64
#define WAIT_MS 1                      /* for a SYN that the kernel left to another thread */
#define WAITS 5

enum { RULES_V4 = 1, RULES_V6 = 2, RULES_ALL = 3, UNSURE = 4 };

struct path {
    struct endpoint source, remote;
    int64_t until;
    int reason;
};

static struct path paths[ENTRIES];
static struct {
    int64_t until;
    int found;                         /* RULES_*, UNSURE */
    bool known;
    uint32_t generation;               /* of nftables, when `nftables` was found */
    int nftables;
} rules;
static _Atomic int lock;

void firewall_after_fork_child(void)
{
    lock = 0;
}

static bool take_lock(void)
{
    return !lifecycle_moved && !atomic_exchange_explicit(&lock, 1, memory_order_acquire);
}

static void give_lock(void)
{
    atomic_store_explicit(&lock, 0, memory_order_release);
}

/* --- rules --- */

static const struct nlattr *attribute(const void *start, int left, int type)
{
    const struct nlattr *at = start;
    while (left >= NLA_HDRLEN && at->nla_len >= NLA_HDRLEN && at->nla_len <= left) {
        if ((at->nla_type & NLA_TYPE_MASK) == type)
            return at;
        left -= NLA_ALIGN(at->nla_len);
        at = (const void *)((const char *)at + NLA_ALIGN(at->nla_len));
    }
    return NULL;
}

static const void *payload(const struct nlattr *of)
{
    return (const char *)of + NLA_HDRLEN;
}

static uint32_t number(const struct nlattr *of)
{
    uint32_t value = 0;
    if (of && of->nla_len >= NLA_HDRLEN + sizeof value)
        memcpy(&value, payload(of), sizeof value);
    return ntohl(value);
}

/* The families whose local packets this chain may stop. */
static int chain_rules(const struct nlmsghdr *header)
{
    const struct nfgenmsg *message = NLMSG_DATA(header);
    const void *start = (const char *)message + NLMSG_ALIGN(sizeof *message);
    int left = (int)header->nlmsg_len - (int)NLMSG_LENGTH(NLMSG_ALIGN(sizeof *message));
    const struct nlattr *hook = attribute(start, left, NFTA_CHAIN_HOOK), *type = attribute(start, left, NFTA_CHAIN_TYPE),
                        *policy = attribute(start, left, NFTA_CHAIN_POLICY);
    bool translates = type && type->nla_len >= NLA_HDRLEN + 4 && memcmp(payload(type), "nat", 4) == 0;
    bool empty = number(attribute(start, left, NFTA_CHAIN_USE)) == 0 && (!policy || number(policy) == NF_ACCEPT);
    if (!hook || empty)
        return 0;
    if (translates)
        return UNSURE;
    bool local = number(attribute(payload(hook), hook->nla_len - NLA_HDRLEN, NFTA_HOOK_HOOKNUM)) != NF_INET_FORWARD;
    switch (message->nfgen_family) {
    case NFPROTO_IPV4: return local ? RULES_V4 : 0;
    case NFPROTO_IPV6: return local ? RULES_V6 : 0;
    case NFPROTO_INET: return local ? RULES_ALL : 0;
    case NFPROTO_NETDEV: return RULES_ALL;   /* of a device: mostly not of lo, but who would read lists of names */
    default: return 0;
    }
}

__attribute__((noinline)) static int nftables_rules(void)
{
    struct {
        struct nlmsghdr header;
        struct nfgenmsg message;
    } request = {
        .header = {sizeof request, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN, NLM_F_REQUEST | NLM_F_DUMP, 0, 0},
        .message = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0},
    };
    char answer[4096] __attribute__((aligned(8)));
    int found = 0, cancel, fd = netlink_open(NETLINK_NETFILTER, &cancel);
    if (fd < 0)
        return RULES_ALL;
    bool more = real.send(fd, &request, sizeof request, MSG_NOSIGNAL) == sizeof request;
    if (!more)
        found = RULES_ALL;
    while (more) {
        ssize_t got = real.recv(fd, answer, sizeof answer, MSG_DONTWAIT | MSG_TRUNC);
        const struct nlmsghdr *header = (const struct nlmsghdr *)(const void *)answer;
        int left = got > 0 && (size_t)got <= sizeof answer ? (int)got : 0;
        if (!left)
            found = RULES_ALL;         /* cannot be excluded */
        more = left;
        for (; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
            if (header->nlmsg_flags & NLM_F_DUMP_INTR)
                found = RULES_ALL;
            if (header->nlmsg_type == NLMSG_ERROR)
                found = RULES_ALL;
            if (header->nlmsg_type == NLMSG_DONE || header->nlmsg_type == NLMSG_ERROR)
                more = false;
            if (header->nlmsg_type == (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN) &&
                header->nlmsg_len >= NLMSG_LENGTH(NLMSG_ALIGN(sizeof(struct nfgenmsg))))
                found |= chain_rules(header);
        }
    }
    netlink_close(fd, cancel);
    return found;
}

/* Would the question load the module? The kernel loads what it is asked about, and what is not loaded has no rules. */
static bool nftables_absent(void)
{
    if (access("/sys/module/nf_tables", F_OK) == 0 || access("/proc/modules", F_OK) != 0)
        return false;
    return access("/sys/module/nfnetlink", F_OK) == 0 || access("/proc/sys/net/netfilter", F_OK) != 0;
}

/* The generation of the rules of nftables, or -errno: -EPERM where this user is not told. */
static int64_t nftables_generation(void)
{
    struct {
        struct nlmsghdr header;
        struct nfgenmsg message;
    } request = {
        .header = {sizeof request, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, NLM_F_REQUEST, 0, 0},
        .message = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0},
    };
    char answer[512] __attribute__((aligned(8)));
    ssize_t got = netlink_ask(NETLINK_NETFILTER, &request, sizeof request, answer, sizeof answer);
    if (got < 0)
        return got;
    int head = (int)NLMSG_LENGTH(NLMSG_ALIGN(sizeof(struct nfgenmsg)));
    return number(attribute(answer + head, (int)got - head, NFTA_GEN_ID));
}

/* The older tables of one family; the list of their names is root's alone. What a chain does with packets that no rule
 * matched would take more to learn than a SYN. */
static int iptables_rules(const char *names, int family, int bit)
{
    char text[512], *end;
    int fd = real.open(names, O_RDONLY | O_CLOEXEC, 0);
    ssize_t got = fd < 0 ? 0 : real.read(fd, text, sizeof text);
    bool found = got == (ssize_t)sizeof text;
    if (fd < 0)
        return errno == ENOENT ? 0 : UNSURE;
    real.close(fd);
    if (got <= 0)
        return got ? UNSURE : 0;
    if (found)
        return bit;
    fd = real.socket(family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    for (char *name = text; !found && (end = memchr(name, '\n', (size_t)(text + got - name))); name = end + 1) {
        struct ipt_getinfo info = {0};   /* of IPv6 it is the same */
        socklen_t length = sizeof info;
        *end = 0;
        if (strcmp(name, "nat") == 0)
            continue;
        memcpy(info.name, name, (size_t)(end - name) % sizeof info.name);
        found = fd < 0 || real.getsockopt(fd, family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, IPT_SO_GET_INFO, &info, &length) < 0;
        for (int hook = 0; !found && hook < NF_INET_NUMHOOKS; hook++)
            found = hook != NF_INET_FORWARD && info.valid_hooks >> hook & 1 && info.hook_entry[hook] != info.underflow[hook];
    }
    if (fd >= 0)
        real.close(fd);
    return found ? bit : UNSURE;
}

/* As a string that begins with a line's end. */
static bool read_text(const char *path, char *text, size_t size)
{
    int fd = real.open(path, O_RDONLY | O_CLOEXEC, 0);
    ssize_t got = fd < 0 ? -1 : real.read(fd, text + 1, size - 2);
    if (fd >= 0)
        real.close(fd);
    text[0] = '\n';
    text[got < 0 ? 1 : got + 1] = 0;
    return got > 0;
}

static uint64_t field(const char *text, const char *name, int base)
{
    const char *line = strstr(text, name);
    return line ? strtoull(line + strlen(name), NULL, base) : 0;
}

/* Does none of the programs that a control group can have act on connections of this process? */
__attribute__((noinline)) static bool group_is_silent(void)
{
    static const uint32_t types[] = {BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET4_CONNECT,
                                     BPF_CGROUP_INET6_CONNECT};
    static const char *const mounts[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
    char text[4096];
    int fd = -1;
    char *own = read_text("/proc/thread-self/cgroup", text, sizeof text) ? strstr(text, "\n0::/") : NULL;
    if (!own)
        return false;
    own += sizeof "\n0::" - 1;
    own[strcspn(own, "\n")] = 0;
    for (size_t i = 0; fd < 0 && i < sizeof mounts / sizeof *mounts; i++) {
        struct statfs system;
        int mount = real.open(mounts[i], O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
        if (mount < 0)
            continue;
        if (fstatfs(mount, &system) == 0 && system.f_type == CGROUP2_SUPER_MAGIC)
            fd = openat(mount, own[1] ? own + 1 : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        real.close(mount);
    }
    bool silent = fd >= 0;
    for (size_t i = 0; silent && i < sizeof types / sizeof *types; i++) {
        union bpf_attr query = {0};
        query.query.target_fd = (uint32_t)fd;
        query.query.attach_type = types[i];
        query.query.query_flags = BPF_F_QUERY_EFFECTIVE;
        silent = syscall(SYS_bpf, BPF_PROG_QUERY, &query, sizeof query) == 0 && query.query.prog_cnt == 0;
    }
    if (fd >= 0)
        real.close(fd);
    return silent;
}

/* May this thread ask for rules? Under a system call filter nothing is asked that might be forbidden, or end the program.
 * Whoever gave up privileges for good may be in a sandbox that forbids connections too. Not inlined: the text is to be off
 * the stack, which may be small, before anything is asked. */
__attribute__((noinline)) static bool may_ask(bool *confined)
{
    char status[2048];
    bool read = read_text("/proc/thread-self/status", status, sizeof status);
    *confined = field(status, "\nNoNewPrivs:", 10);
    return read && field(status, "\nCapEff:", 16) >> CAP_NET_ADMIN & 1 && !field(status, "\nSeccomp:", 10);
}

/* Landlock forbids ports, also to root, and tells nobody. TCP connects to no multicast address, and nobody allows port 0. */
static bool landlocked(void)
{
    const struct sockaddr_in nowhere = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ALLHOSTS_GROUP)};
    int cancel, fd = real.socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return true;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
    bool refused = real.connect(fd, (const struct sockaddr *)&nowhere, sizeof nowhere) < 0 && errno == EACCES;
    real.close(fd);
    pthread_setcancelstate(cancel, NULL);
    return refused;
}

/* Does nothing come before the table of the machine's own addresses? Else the way may depend on ports and users. */
static bool routes_plainly(int family)
{
    const uint32_t harmless = 1u << FRA_PRIORITY | 1u << FRA_SUPPRESS_PREFIXLEN | 1u << FRA_TABLE | 1u << FRA_PROTOCOL;
    struct {
        struct nlmsghdr header;
        struct fib_rule_hdr rule;
    } request = {
        .header = {sizeof request, RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP, 0, 0},
        .rule = {.family = (uint8_t)family},
    };
    char answer[4096] __attribute__((aligned(8)));
    const struct nlmsghdr *header = (const struct nlmsghdr *)(const void *)answer;
    ssize_t got = netlink_ask(NETLINK_ROUTE, &request, sizeof request, answer, sizeof answer);
    if (got == -EOPNOTSUPP || got == -EAFNOSUPPORT)
        return true;                   /* a kernel without such rules, or without the family */
    if (got < 0 || header->nlmsg_type != RTM_NEWRULE || header->nlmsg_len < NLMSG_LENGTH(sizeof(struct fib_rule_hdr)))
        return false;
    const struct fib_rule_hdr *first = NLMSG_DATA(header);
    bool plain = first->action == FR_ACT_TO_TBL && first->table == RT_TABLE_LOCAL && !first->dst_len && !first->src_len &&
                 !first->tos && !(first->flags & FIB_RULE_INVERT);
    const char *list = (const char *)first + NLMSG_ALIGN(sizeof *first);
    int left = (int)(header->nlmsg_len - NLMSG_LENGTH(NLMSG_ALIGN(sizeof *first)));
    for (int type = 1; plain && type <= FRA_MAX; type++)
        plain = (type < 32 && harmless >> type & 1) || !attribute(list, left, type);
    return plain;
}

/* RULES_* and UNSURE. */
static int find_rules(void)
{
    bool confined;
    if (!may_ask(&confined))
        return UNSURE;
    int64_t generation = nftables_absent() ? -ENOENT : nftables_generation();
    if (generation == -EPERM || generation == -EACCES)
        return UNSURE;
    bool none = generation == -ENOENT || generation == -EINVAL || generation == -EPROTONOSUPPORT;
    bool locked = take_lock();
    bool known = locked && rules.known && generation == rules.generation;
    int found = none ? 0 : known ? rules.nftables : nftables_rules();
    if (locked) {
        rules.known = !none;
        rules.generation = (uint32_t)generation;
        rules.nftables = found;
        give_lock();
    }
    found |= iptables_rules("/proc/thread-self/net/ip_tables_names", AF_INET, RULES_V4);
    found |= iptables_rules("/proc/thread-self/net/ip6_tables_names", AF_INET6, RULES_V6);
    if (!(found & UNSURE) && (confined || landlocked() || !group_is_silent() || !routes_plainly(AF_INET) ||
                              !routes_plainly(AF_INET6)))
        found |= UNSURE;
    return found;
}

static int rules_now(void)
{
    int64_t now = clock_coarse_ms();
    int found = -1;
    if (take_lock()) {
        if (rules.until > now)
            found = rules.found;
        give_lock();
    }
    if (found >= 0)
        return found;
    found = find_rules();
    if (take_lock()) {
        rules.found = found;
        rules.until = now + LIFETIME_MS;
        give_lock();
    }
    return found;
}

/* --- the SYN --- */

static int not_sent(int error)
{
    switch (error) {
    case EMFILE:
    case ENFILE: return -REASON_NO_DESCRIPTOR;
    case ENOMEM:
    case ENOBUFS: return -REASON_NO_MEMORY;
    case EADDRINUSE:
    case EADDRNOTAVAIL: return -REASON_NO_PORT;
    default: return -REASON_FIREWALL;
    }
}

static bool sign(int fd, const struct sockaddr *to, socklen_t length)
{
    struct tcp_md5sig signature = {.tcpm_keylen = 1, .tcpm_key = "?"};
    memcpy(&signature.tcpm_addr, to, length);
    return real.setsockopt(fd, IPPROTO_TCP, TCP_MD5SIG, &signature, sizeof signature) == 0;
}

/* 0: the listener's kernel side has seen it. */
static int send_syn(int fd, const struct endpoint *source, const struct endpoint *remote)
{
    struct sockaddr_storage from, to;
    socklen_t from_length = sizeof from, to_length = sizeof to;
    struct endpoint peer = *source;
    uint32_t before, now;
    peer.port = 0;
    int family = endpoint_is_v4(remote) ? AF_INET : AF_INET6;
    endpoint_to_sockaddr(&peer, family, (struct sockaddr *)&from, &from_length);
    endpoint_to_sockaddr(remote, family, (struct sockaddr *)&to, &to_length);
    if (!sign(fd, (struct sockaddr *)&to, to_length) || real.bind(fd, (struct sockaddr *)&from, from_length) < 0)
        return not_sent(errno);
    from_length = sizeof from;
    if (real.getsockname(fd, (struct sockaddr *)&from, &from_length) < 0 ||
        !endpoint_from_sockaddr(&peer, (struct sockaddr *)&from, from_length))
        return -REASON_FIREWALL;
    int error = netinfo_discarded(remote, &peer, &before);
    if (error)
        return error;
    if (real.connect(fd, (struct sockaddr *)&to, to_length) < 0 && errno != EINPROGRESS)
        return not_sent(errno);
    for (int wait = 0;; wait++) {
        struct pollfd refused = {fd, POLLIN, 0};
        error = netinfo_discarded(remote, &peer, &now);
        if (error || now != before)
            return error;
        if (wait == WAITS || real.poll(&refused, 1, WAIT_MS) != 0)
            return -REASON_FIREWALL;
    }
}

static int try_path(const struct endpoint *source, const struct endpoint *remote)
{
    int cancel, fd = real.socket(endpoint_is_v4(remote) ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return not_sent(errno);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
    int reason = send_syn(fd, source, remote);
    real.close(fd);
    pthread_setcancelstate(cancel, NULL);
    return reason;
}

static bool lasts(int reason)
{
    return reason == 0 || reason == -REASON_FIREWALL;
}

int firewall_connect(const struct endpoint *source, const struct endpoint *remote)
{
    if (flows_ignore_firewall())
        return 0;
    int found_rules = rules_now();
    if (found_rules & (endpoint_is_v4(remote) ? RULES_V4 : RULES_V6))
        return -REASON_FIREWALL;
    if (!(found_rules & UNSURE))
        return 0;
    int64_t now = clock_coarse_ms();
    struct path *place = &paths[endpoint_hash(remote) % ENTRIES], found = {.reason = 1};
    if (take_lock()) {
        if (place->until > now && endpoint_equal(&place->remote, remote) && endpoint_same_ip(&place->source, source))
            found = *place;
        give_lock();
    }
    if (found.reason <= 0)
        return found.reason;
    found = (struct path){*source, *remote, now + LIFETIME_MS, try_path(source, remote)};
    if (lasts(found.reason) && take_lock()) {
        *place = found;
        give_lock();
    }
    return found.reason;
}

/* Rules come and go, and each client looks for itself. What holds for the listener's own user and control group only, no
 * client can find. */
int firewall_listen(const struct endpoint *local, bool v6only)
{
    struct endpoint at = *local;
    if (flows_ignore_firewall() || !(rules_now() & UNSURE) || !netinfo_loopback_up())
        return 0;
    if (endpoint_is_wildcard(local)) {
        if (!endpoint_is_v4(local) && !v6only)
            endpoint_set_wildcard(&at, true);
        if (endpoint_is_v4(&at))
            at.ip[12] = 127;
        at.ip[15] = 1;
    }
    return try_path(&at, &at);
}
