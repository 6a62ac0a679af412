/* Owns the index of a table's rules, one for each role, made when first needed. No lock: whoever builds one second
 * throws its own away. May run after fork and in a signal handler.
 *
 * Ports are cut into segments where rules begin or end. Within a segment the rules are grouped by prefix length, and a
 * group is sorted by address, so that a decision costs one binary search for each prefix length in use. The index only
 * nominates rules; rule_matches() decides. */
#include "rule_index.h"
#include <endian.h>
#include <string.h>
#include <sys/mman.h>

#define PORTS 65536u
#define CANDIDATES_FACTOR 8u           /* beyond this many nominations a rule, one segment holds all ports */

struct words {
    uint64_t high, low;
};

struct question {
    uint8_t role, local_family, remote_family;
    uint16_t local_port, remote_port;
    struct words local, remote;
};

/* A rule that applies to this process; its place in the array is its place in the order of evaluation. */
struct applied {
    uint32_t rule, section;
};

struct candidate {
    struct words address;              /* masked */
    uint32_t position;                 /* in `applied` */
    uint32_t group;                    /* families and prefix length, as group_key() gives them */
};

/* The candidates of a segment that have the same families and prefix length, sorted by address and position. */
struct group {
    uint32_t first, count, key;
};

struct rule_index {
    size_t mapped;
    const struct table_rule *rules;
    uint8_t role;
    uint32_t napplied, nsegments;
    struct applied *applied;
    uint32_t *bounds;                  /* the first port of each segment */
    uint32_t *candidates_of, *groups_of;   /* the first of each segment, and the end */
    struct candidate *candidates;
    struct group *groups;
    uint64_t *port_bits;               /* scratch: where segments begin */
};

static struct words words_of(const uint8_t *ip)
{
    struct words words;

    memcpy(&words, ip, sizeof words);
    words.high = be64toh(words.high);
    words.low = be64toh(words.low);
    return words;
}

static struct words masked(struct words words, unsigned prefix)
{
    if (prefix < 64)
        words.high &= prefix ? ~0ull << (64 - prefix) : 0;
    if (prefix < 128)
        words.low &= prefix > 64 ? ~0ull << (128 - prefix) : 0;
    return words;
}

static bool same_words(struct words a, struct words b)
{
    return a.high == b.high && a.low == b.low;
}

static bool rule_matches(const struct table_rule *rule, const struct question *question)
{
    return (rule->role & question->role) && (rule->local_families & question->local_family) &&
           (rule->remote_families & question->remote_family) && rule->local_port[0] <= question->local_port &&
           question->local_port <= rule->local_port[1] && rule->remote_port[0] <= question->remote_port &&
           question->remote_port <= rule->remote_port[1] &&
           same_words(masked(question->local, rule->local_prefix),
                      masked(words_of(rule->local), rule->local_prefix)) &&
           same_words(masked(question->remote, rule->remote_prefix),
                      masked(words_of(rule->remote), rule->remote_prefix));
}

/* Rules are indexed by the listener's own address, or by the destination. */
static const uint16_t *key_ports(const struct table_rule *rule, uint8_t role)
{
    return role == ROLE_LISTEN ? rule->local_port : rule->remote_port;
}

static uint32_t group_key(const struct table_rule *rule, uint8_t role)
{
    return role == ROLE_LISTEN ? rule->local_families << 8 | rule->local_prefix
                               : rule->remote_families << 8 | rule->remote_prefix;
}

static unsigned group_prefix(uint32_t key)
{
    return key & 0xff;
}

static unsigned group_families(uint32_t key)
{
    return key >> 8;
}

static int compare_words(struct words a, struct words b)
{
    if (a.high != b.high)
        return a.high < b.high ? -1 : 1;
    return a.low < b.low ? -1 : a.low > b.low;
}

static bool sorts_before(const struct candidate *a, const struct candidate *b)
{
    if (a->group != b->group)
        return a->group < b->group;
    int order = compare_words(a->address, b->address);
    return order ? order < 0 : a->position < b->position;
}

static void swap_candidates(struct candidate *a, struct candidate *b)
{
    struct candidate swap = *a;
    *a = *b;
    *b = swap;
}

static void sift_down(struct candidate *heap, size_t root, size_t count)
{
    for (size_t child; (child = root * 2 + 1) < count; root = child) {
        if (child + 1 < count && sorts_before(&heap[child], &heap[child + 1]))
            child++;
        if (!sorts_before(&heap[root], &heap[child]))
            return;
        swap_candidates(&heap[root], &heap[child]);
    }
}

/* Heapsort, because qsort() allocates. */
static void sort_candidates(struct candidate *heap, size_t count)
{
    for (size_t i = count / 2; i-- > 0;)
        sift_down(heap, i, count);
    for (size_t end = count; end-- > 1;) {
        swap_candidates(&heap[0], &heap[end]);
        sift_down(heap, 0, end);
    }
}

static uint32_t segment_of(const struct rule_index *index, uint32_t port)
{
    uint32_t low = 0, high = index->nsegments;     /* bounds[0] is 0 */

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (index->bounds[middle] <= port)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void list_applied(const struct policy_table *table, uint8_t role, struct applied *applied, uint32_t *count)
{
    *count = 0;
    for (uint32_t s = 0; s < table->header->nsections; s++) {
        const struct table_section *section = &table->sections[s];
        if (!table->applies[s])
            continue;
        for (uint32_t rule = section->rule; rule < section->rule + section->nrules; rule++) {
            if (!(table->rules[rule].role & role))
                continue;
            if (applied)
                applied[*count] = (struct applied){rule, s};
            ++*count;
        }
    }
}

static void cut_segments(struct rule_index *index, size_t candidates_max)
{
    size_t nominations = 0;

    index->port_bits[0] = 1;
    for (uint32_t i = 0; i < index->napplied; i++) {
        const uint16_t *ports = key_ports(&index->rules[index->applied[i].rule], index->role);
        uint32_t after = ports[1] + 1u;
        index->port_bits[ports[0] / 64] |= 1ull << ports[0] % 64;
        if (after < PORTS)
            index->port_bits[after / 64] |= 1ull << after % 64;
    }
    for (uint32_t i = 0; i < PORTS / 64; i++)
        for (uint64_t bits = index->port_bits[i]; bits; bits &= bits - 1)
            index->bounds[index->nsegments++] = i * 64 + (uint32_t)__builtin_ctzll(bits);
    for (uint32_t i = 0; i < index->napplied; i++) {
        const uint16_t *ports = key_ports(&index->rules[index->applied[i].rule], index->role);
        nominations += segment_of(index, ports[1]) - segment_of(index, ports[0]) + 1;
    }
    if (nominations > candidates_max)
        index->nsegments = 1;
}

static void nominate(struct rule_index *index)
{
    uint32_t *cursor = index->groups_of;           /* scratch until the groups are made */

    for (uint32_t i = 0; i < index->napplied; i++) {
        const uint16_t *ports = key_ports(&index->rules[index->applied[i].rule], index->role);
        for (uint32_t s = segment_of(index, ports[0]); s <= segment_of(index, ports[1]); s++)
            index->candidates_of[s + 1]++;
    }
    for (uint32_t s = 0; s < index->nsegments; s++) {
        index->candidates_of[s + 1] += index->candidates_of[s];
        cursor[s] = index->candidates_of[s];
    }
    for (uint32_t i = 0; i < index->napplied; i++) {
        const struct table_rule *rule = &index->rules[index->applied[i].rule];
        const uint16_t *ports = key_ports(rule, index->role);
        uint32_t key = group_key(rule, index->role);
        struct words address = words_of(index->role == ROLE_LISTEN ? rule->local : rule->remote);
        struct candidate candidate = {masked(address, group_prefix(key)), i, key};
        for (uint32_t s = segment_of(index, ports[0]); s <= segment_of(index, ports[1]); s++)
            index->candidates[cursor[s]++] = candidate;
    }
}

static void make_groups(struct rule_index *index)
{
    uint32_t ngroups = 0;

    for (uint32_t s = 0; s < index->nsegments; s++) {
        uint32_t first = index->candidates_of[s], end = index->candidates_of[s + 1];
        sort_candidates(&index->candidates[first], end - first);
        index->groups_of[s] = ngroups;
        for (uint32_t i = first; i < end; i++) {
            if (i == first || index->candidates[i].group != index->candidates[i - 1].group)
                index->groups[ngroups++] = (struct group){i, 0, index->candidates[i].group};
            index->groups[ngroups - 1].count++;
        }
    }
    index->groups_of[index->nsegments] = ngroups;
}

static void *carve(uint8_t **at, size_t size)
{
    void *part = *at;
    *at += (size + 7) & ~(size_t)7;
    return part;
}

static struct rule_index *build(const struct policy_table *table, uint8_t role)
{
    uint32_t napplied;
    list_applied(table, role, NULL, &napplied);

    size_t segments = 2 * (size_t)napplied + 1 < PORTS ? 2 * (size_t)napplied + 1 : PORTS;
    size_t candidates = CANDIDATES_FACTOR * (size_t)napplied;
    size_t numbers = (segments + 1) * sizeof(uint32_t) + 8;
    size_t size = sizeof(struct rule_index) + napplied * sizeof(struct applied) + 3 * numbers +
                  candidates * (sizeof(struct candidate) + sizeof(struct group)) + PORTS / 8 + 64;
    struct rule_index *index = policy_memory(size);
    if (!index)
        return NULL;

    uint8_t *at = (uint8_t *)(index + 1);
    index->mapped = size;
    index->rules = table->rules;
    index->role = role;
    index->applied = carve(&at, napplied * sizeof(struct applied));
    index->bounds = carve(&at, (segments + 1) * sizeof(uint32_t));
    index->candidates_of = carve(&at, (segments + 1) * sizeof(uint32_t));
    index->groups_of = carve(&at, (segments + 1) * sizeof(uint32_t));
    index->candidates = carve(&at, candidates * sizeof(struct candidate));
    index->groups = carve(&at, candidates * sizeof(struct group));
    index->port_bits = carve(&at, PORTS / 8);
    list_applied(table, role, index->applied, &index->napplied);
    cut_segments(index, candidates);
    nominate(index);
    make_groups(index);
    return index;
}

static struct rule_index *index_of(struct policy_table *table, uint8_t role)
{
    _Atomic(struct rule_index *) *slot = &table->index[role - 1];
    struct rule_index *index = atomic_load_explicit(slot, memory_order_acquire), *other = NULL;

    if (index)
        return index;
    index = build(table, role);
    if (index && !atomic_compare_exchange_strong(slot, &other, index)) {
        munmap(index, index->mapped);
        index = other;
    }
    return index;
}

/* The first candidate of a group at or after an address. */
static const struct candidate *lower_bound(const struct candidate *first, uint32_t count, struct words address)
{
    while (count) {
        uint32_t half = count / 2;
        if (compare_words(first[half].address, address) < 0) {
            first += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return first;
}

static struct rule_found find(const struct rule_index *index, const struct question *question)
{
    bool listens = question->role == ROLE_LISTEN;
    uint8_t family = listens ? question->local_family : question->remote_family;
    struct words key = listens ? question->local : question->remote;
    uint32_t segment = segment_of(index, listens ? question->local_port : question->remote_port);
    uint32_t best = UINT32_MAX;

    for (uint32_t g = index->groups_of[segment]; g < index->groups_of[segment + 1]; g++) {
        const struct group *group = &index->groups[g];
        const struct candidate *first = &index->candidates[group->first], *end = first + group->count;
        struct words address = masked(key, group_prefix(group->key));
        if (!(group_families(group->key) & family))
            continue;
        for (first = lower_bound(first, group->count, address);
             first < end && first->position < best && compare_words(first->address, address) == 0; first++)
            if (rule_matches(&index->rules[index->applied[first->position].rule], question))
                best = first->position;
    }
    if (best == UINT32_MAX)
        return (struct rule_found){RULE_DEFAULT, 0};
    return (struct rule_found){index->applied[best].rule, index->applied[best].section};
}

static struct rule_found scan(const struct policy_table *table, const struct question *question)
{
    for (uint32_t s = 0; s < table->header->nsections; s++) {
        const struct table_section *section = &table->sections[s];
        if (!table->applies[s])
            continue;
        for (uint32_t rule = section->rule; rule < section->rule + section->nrules; rule++)
            if (rule_matches(&table->rules[rule], question))
                return (struct rule_found){rule, s};
    }
    return (struct rule_found){RULE_DEFAULT, 0};
}

static uint8_t family_of(const struct endpoint *endpoint)
{
    return endpoint_is_v4(endpoint) ? FAMILY_V4 : FAMILY_V6;
}

struct rule_found rule_index_find(struct policy_table *table, uint8_t role, const struct endpoint *local,
                                  const struct endpoint *remote)
{
    struct question question = {role,         family_of(local),      family_of(remote),   local->port,
                                remote->port, words_of(local->ip), words_of(remote->ip)};

    if (table->header->nrules == 0)
        return (struct rule_found){RULE_DEFAULT, 0};
    /* An unbound source has the family of the destination. */
    if (role == ROLE_CONNECT && endpoint_is_wildcard(local)) {
        struct endpoint wildcard;
        endpoint_set_wildcard(&wildcard, question.remote_family == FAMILY_V4);
        question.local = words_of(wildcard.ip);
        question.local_family = question.remote_family;
    }
    const struct rule_index *index = index_of(table, role);
    return index ? find(index, &question) : scan(table, &question);
}

void rule_index_free(struct policy_table *table)
{
    for (int i = 0; i < 2; i++) {
        struct rule_index *index = atomic_load(&table->index[i]);
        if (index)
            munmap(index, index->mapped);
    }
}
