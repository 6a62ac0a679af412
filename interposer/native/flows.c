/* Owns the current table and the answers of the policy engine that this process remembers. No lock: one thread in each
 * second wins the ticket to look for a new table, tables are replaced by an atomic exchange, and a replaced one is freed
 * only while nobody else is inside a decision. A fork at any point leaves at worst memory behind. Runs in signal
 * handlers. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "flows.h"
#include "clock.h"
#include "policy_table.h"
#include "reasons.h"
#include "rule_index.h"
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define FLOWS 4096u                    /* a power of two */
#define FLOW_PROBES 8u
#define KEY_WORDS 7
#define ATTEMPTS 3                     /* questions that a reload overtakes are asked anew, but not for ever */
#define RETIRED 4u                     /* replaced tables that stay mapped in any case */
#define CHECK_EVERY_MS 800u            /* so that a new table is noticed within the promised second */

/* A remembered answer under a sequence lock, odd while written. A writer that never finishes costs this entry only. */
struct flow {
    _Atomic uint32_t sequence, rule;
    _Atomic uint64_t key[KEY_WORDS], answer, buffers;
    _Atomic uint64_t expires;          /* milliseconds of the monotonic clock; 0: with the table */
};

static _Atomic(struct policy_table *) current;
static bool required;
static _Atomic(struct policy_table *) retired[RETIRED];
static _Atomic uint32_t retirements;
static _Atomic uint32_t readers;       /* threads inside a function that uses `current` */
static _Atomic uint64_t next_check;    /* milliseconds of the monotonic clock */
static _Atomic uint64_t seen[3];       /* inode, change time and size of the file last looked at */
static _Atomic(const struct process_facts *) facts_of_process;
static char table_path[PATH_MAX];

static uint64_t milliseconds(void)
{
    return (uint64_t)clock_coarse_ms();
}

/* The change time: a table that was refused for its owner or mode may be taken when these were mended. */
static void identify_file(uint64_t identity[3], const struct stat *status)
{
    identity[0] = status->st_ino;
    identity[1] = (uint64_t)status->st_ctim.tv_sec * 1000000000u + (uint64_t)status->st_ctim.tv_nsec;
    identity[2] = (uint64_t)status->st_size;
}

static bool file_changed(const struct stat *status)
{
    uint64_t now[3];
    bool changed = false;

    identify_file(now, status);
    for (int i = 0; i < 3; i++)
        changed |= atomic_load_explicit(&seen[i], memory_order_relaxed) != now[i];
    return changed;
}

static void file_seen(const struct stat *status)
{
    uint64_t now[3];

    identify_file(now, status);
    for (int i = 0; i < 3; i++)
        atomic_store_explicit(&seen[i], now[i], memory_order_relaxed);
}

static void free_table(struct policy_table *table)
{
    struct flow *flows = atomic_load(&table->flows);
    if (flows)
        munmap(flows, FLOWS * sizeof *flows);
    rule_index_free(table);
    policy_table_free(table);
}

/* The caller is a reader itself. With others inside, the oldest table stays mapped for good. */
static void retire(struct policy_table *table)
{
    uint32_t slot = atomic_fetch_add(&retirements, 1) % RETIRED;
    struct policy_table *oldest = atomic_exchange(&retired[slot], table);

    if (oldest && atomic_load(&readers) == 1)
        free_table(oldest);
}

/* The caller is a reader. A thread that was overtaken while it read looks again: what it has may be the older one. */
static int take_table(void)
{
    struct policy_table *old, *table;
    struct stat status;
    int error;

    for (;;) {
        old = atomic_load(&current);
        table = NULL;
        memset(&status, 0, sizeof status);
        error = policy_table_read(table_path, atomic_load(&facts_of_process), &table, &status);
        if (error || atomic_compare_exchange_strong(&current, &old, table))
            break;
        free_table(table);
    }
    if (error != -REASON_NO_MEMORY)
        file_seen(&status);
    if (!error && old)
        retire(old);
    return error;
}

static __attribute__((noinline)) void look_for_table(uint64_t now, uint64_t due)
{
    struct stat status;

    if (table_path[0] && atomic_compare_exchange_strong(&next_check, &due, now + CHECK_EVERY_MS) &&
        stat(table_path, &status) == 0 && file_changed(&status))
        take_table();
}

/* In the way of every decision. */
static inline void reload_if_due(void)
{
    uint64_t now = milliseconds(), due = atomic_load_explicit(&next_check, memory_order_relaxed);

    if (now >= due)
        look_for_table(now, due);
}

static struct policy_table *enter(void)
{
    atomic_fetch_add(&readers, 1);
    return atomic_load(&current);
}

static void leave(void)
{
    atomic_fetch_sub(&readers, 1);
}

void flows_require(void)
{
    required = true;
}

int flows_load(const char *path, const struct process_facts *facts)
{
    int saved = errno;

    if (strlen(path) >= sizeof table_path)
        return -REASON_BAD_TABLE;
    memcpy(table_path, path, strlen(path) + 1);
    atomic_store(&facts_of_process, facts);
    atomic_store(&next_check, milliseconds() + CHECK_EVERY_MS);
    enter();
    int error = take_table();
    leave();
    errno = saved;
    return error;
}

static uint64_t mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
    return hash ^ hash >> 32;
}

static uint64_t options_hash(const struct decision_request *request)
{
    uint64_t hash = request->noptions;

    for (uint32_t i = 0; i < request->noptions; i++) {
        const struct sock_option *option = &request->options[i];
        uint64_t words[SOCK_OPTION_SIZE / 8];
        memcpy(words, option->value, sizeof words);
        hash = mix(hash, (uint64_t)(uint16_t)option->level << 32 | (uint64_t)(uint16_t)option->name << 16 | option->length);
        for (size_t j = 0; j < SOCK_OPTION_SIZE / 8; j++)
            hash = mix(hash, words[j]);
    }
    return hash;
}

/* Options count only where a function may look at them. */
static void flow_key(uint64_t key[KEY_WORDS], const struct policy_table *table, const struct decision_request *request)
{
    key[0] = (uint64_t)request->role << 40 | (uint64_t)request->family << 32 | (uint64_t)request->local.port << 16 |
             request->remote.port;
    key[1] = (uint64_t)request->local.scope << 32 | request->remote.scope;
    memcpy(&key[2], request->local.ip, 16);
    memcpy(&key[4], request->remote.ip, 16);
    key[6] = request->noptions && table->header->nfunctions ? options_hash(request) : 0;
}

static uint32_t flow_hash(const uint64_t key[KEY_WORDS])
{
    uint64_t hash = 0;
    for (int i = 0; i < KEY_WORDS; i++)
        hash = mix(hash, key[i]);
    return (uint32_t)hash;
}

static uint64_t pack_answer(const struct verdict *verdict)
{
    uint64_t packed = (uint64_t)verdict->action << 56 | (uint64_t)verdict->otherwise << 48 |
                      (uint64_t)verdict->reason << 32;
    for (int i = 0; i < PROVIDERS_MAX; i++)
        packed |= (uint64_t)verdict->providers[i] << i * 8;
    return packed;
}

static void unpack_answer(struct verdict *verdict, uint64_t packed, uint64_t buffers, uint32_t rule)
{
    *verdict = (struct verdict){.action = (uint8_t)(packed >> 56), .otherwise = (uint8_t)(packed >> 48),
                                .reason = (uint16_t)(packed >> 32), .rule = rule, .function = FUNCTION_NONE,
                                .send_buffer = (uint32_t)(buffers >> 32), .receive_buffer = (uint32_t)buffers};
    for (int i = 0; i < PROVIDERS_MAX; i++)
        verdict->providers[i] = (uint8_t)(packed >> i * 8);
}

static bool flow_is_of(struct flow *flow, const uint64_t key[KEY_WORDS])
{
    bool same = true;

    for (int i = 0; i < KEY_WORDS; i++)
        same &= atomic_load_explicit(&flow->key[i], memory_order_relaxed) == key[i];
    return same;
}

static bool flow_has_expired(struct flow *flow)
{
    uint64_t expires = atomic_load_explicit(&flow->expires, memory_order_relaxed);
    return expires && milliseconds() >= expires;
}

static bool flow_read(struct flow *flow, const uint64_t key[KEY_WORDS], struct verdict *out)
{
    uint32_t before = atomic_load_explicit(&flow->sequence, memory_order_acquire);

    if (!flow_is_of(flow, key) || before % 2 || before == 0 || flow_has_expired(flow))
        return false;
    uint64_t answer = atomic_load_explicit(&flow->answer, memory_order_relaxed);
    uint64_t buffers = atomic_load_explicit(&flow->buffers, memory_order_relaxed);
    uint32_t rule = atomic_load_explicit(&flow->rule, memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    if (atomic_load_explicit(&flow->sequence, memory_order_relaxed) != before)
        return false;
    unpack_answer(out, answer, buffers, rule);
    return true;
}

static bool flow_write(struct flow *flow, uint32_t before, const uint64_t key[KEY_WORDS],
                       const struct verdict *verdict)
{
    if (before % 2 || !atomic_compare_exchange_strong_explicit(&flow->sequence, &before, before + 1,
                                                               memory_order_acquire, memory_order_relaxed))
        return false;
    atomic_thread_fence(memory_order_release);
    for (int i = 0; i < KEY_WORDS; i++)
        atomic_store_explicit(&flow->key[i], key[i], memory_order_relaxed);
    atomic_store_explicit(&flow->answer, pack_answer(verdict), memory_order_relaxed);
    atomic_store_explicit(&flow->buffers, (uint64_t)verdict->send_buffer << 32 | verdict->receive_buffer,
                          memory_order_relaxed);
    atomic_store_explicit(&flow->expires, verdict->remember_ms ? milliseconds() + verdict->remember_ms : 0,
                          memory_order_relaxed);
    atomic_store_explicit(&flow->rule, verdict->rule, memory_order_relaxed);
    atomic_store_explicit(&flow->sequence, before + 2 ? before + 2 : 2, memory_order_release);
    return true;
}

static bool recall(struct policy_table *table, const uint64_t key[KEY_WORDS], struct verdict *out)
{
    struct flow *flows = atomic_load_explicit(&table->flows, memory_order_acquire);
    uint32_t hash = flow_hash(key);

    for (uint32_t i = 0; flows && i < FLOW_PROBES; i++)
        if (flow_read(&flows[(hash + i) % FLOWS], key, out))
            return true;
    return false;
}

/* Its own old entry or one that is over or free, if one is near; else one of the near ones gives way. */
static void remember(struct policy_table *table, const uint64_t key[KEY_WORDS], const struct verdict *verdict)
{
    struct flow *flows = atomic_load_explicit(&table->flows, memory_order_acquire), *other = NULL;
    uint32_t hash = flow_hash(key);

    if (!flows) {
        flows = policy_memory(FLOWS * sizeof *flows);
        if (!flows)
            return;
        if (!atomic_compare_exchange_strong(&table->flows, &other, flows)) {
            munmap(flows, FLOWS * sizeof *flows);
            flows = other;
        }
    }
    for (uint32_t i = 0; i < FLOW_PROBES; i++) {
        struct flow *flow = &flows[(hash + i) % FLOWS];
        uint32_t sequence = atomic_load(&flow->sequence);
        if ((sequence == 0 || flow_is_of(flow, key) || flow_has_expired(flow)) &&
            flow_write(flow, sequence, key, verdict))
            return;
    }
    struct flow *victim = &flows[(hash + (hash >> 24) % FLOW_PROBES) % FLOWS];
    flow_write(victim, atomic_load(&victim->sequence), key, verdict);
}

/* Whether the answer is the policy's. One that only says that the engine could not answer now is not kept. */
static bool worth_remembering(const struct verdict *verdict)
{
    if (verdict->remember_ms == REMEMBER_NOT)
        return false;
    switch (verdict->reason) {
    case REASON_NONE:
    case REASON_POLICY_TCP:
    case REASON_FUNCTION_RAISED:
    case REASON_FUNCTION_NONSENSE:
    case REASON_FUNCTION_MISSING:
    case REASON_FUNCTION_TCP:
        return true;
    default:
        return false;
    }
}

static const uint8_t *providers_for(const struct policy_table *table, struct rule_found found)
{
    if (found.rule != RULE_DEFAULT) {
        if (table->rules[found.rule].providers[0])
            return table->rules[found.rule].providers;
        if (table->sections[found.section].providers[0] && found.section + 1 < table->header->nsections)
            return table->sections[found.section].providers;
    }
    return table->providers;
}

static uint8_t otherwise_for(const struct policy_table *table, struct rule_found found)
{
    if (found.rule != RULE_DEFAULT) {
        if (table->rules[found.rule].otherwise)
            return table->rules[found.rule].otherwise;
        if (table->sections[found.section].otherwise && found.section + 1 < table->header->nsections)
            return table->sections[found.section].otherwise;
    }
    return table->otherwise;
}

static void decide_from_rules(struct policy_table *table, const struct decision_request *request,
                              struct rule_found *found, struct verdict *out)
{
    *found = rule_index_find(table, request->role, &request->local, &request->remote);
    uint8_t action = found->rule == RULE_DEFAULT ? ACTION_SAN : table->rules[found->rule].action;
    const uint8_t *providers = providers_for(table, *found);

    *out = (struct verdict){.action = ACTION_TCP, .otherwise = otherwise_for(table, *found),
                            .reason = REASON_POLICY_TCP, .rule = found->rule, .function = FUNCTION_NONE};
    if (action == ACTION_ASK && table->engine == ENGINE_OFF) {
        out->reason = REASON_ENGINE_OFF;
    } else if (action == ACTION_ASK) {
        out->action = ACTION_ASK;
        out->reason = REASON_NONE;
        out->function = table->rules[found->rule].function;
    } else if (action == ACTION_SAN && providers[0]) {
        out->action = ACTION_SAN;
        out->reason = REASON_NONE;
        memcpy(out->providers, providers, PROVIDERS_MAX);
    }
}

/* Completes what an answer may leave open, so that the switch finds a whole verdict. */
static void settle(const struct policy_table *table, const struct decision_request *request, struct rule_found found,
                   struct verdict *out)
{
    if (request->function != FUNCTION_NONE)
        out->rule = request->rule;
    else if (out->rule >= table->header->nrules)
        out->rule = RULE_DEFAULT;
    out->function = FUNCTION_NONE;
    if (out->otherwise != OTHERWISE_TCP && out->otherwise != OTHERWISE_ERROR)
        out->otherwise = otherwise_for(table, found);
    if (out->action == ACTION_SAN && !out->providers[0])
        memcpy(out->providers, providers_for(table, found), PROVIDERS_MAX);
    if (out->action != ACTION_SAN || !out->providers[0]) {
        if (out->action != ACTION_TCP)
            out->reason = REASON_FUNCTION_NONSENSE;
        out->action = ACTION_TCP;
        memset(out->providers, 0, sizeof out->providers);
    }
}

/* False: a reload overtook the answer, which is then worth nothing. */
static bool ask(struct policy_table *table, struct decision_request *request, struct rule_found found,
                struct verdict *out)
{
    uint64_t key[KEY_WORDS];

    flow_key(key, table, request);
    if (recall(table, key, out))
        return true;
    request->rule = found.rule;
    *out = (struct verdict){.action = ACTION_TCP, .otherwise = otherwise_for(table, found), .rule = found.rule,
                            .function = FUNCTION_NONE};
    engine_ask(table->header, request, out);
    reload_if_due();
    if (atomic_load(&current) != table)
        return false;
    settle(table, request, found, out);
    if (worth_remembering(out))
        remember(table, key, out);
    return true;
}

static bool decide(struct policy_table *table, struct decision_request *request, struct verdict *out)
{
    struct rule_found found = {RULE_DEFAULT, 0};

    if (table->engine == ENGINE_REACTIVE) {
        request->function = FUNCTION_NONE;
        return ask(table, request, found, out);
    }
    decide_from_rules(table, request, &found, out);
    if (out->action != ACTION_ASK)
        return true;
    request->function = out->function;
    return ask(table, request, found, out);
}

static void stay_on_tcp(struct verdict *out, uint16_t reason)
{
    *out = (struct verdict){.action = ACTION_TCP, .otherwise = OTHERWISE_TCP, .reason = reason, .rule = RULE_DEFAULT,
                            .function = FUNCTION_NONE};
}

void flows_decide(uint8_t role, int family, const struct endpoint *local, const struct endpoint *remote,
                  const struct sock_option *options, uint32_t noptions, struct verdict *out)
{
    static const struct endpoint unknown;
    int saved = errno;
    struct decision_request request;

    request.role = role;
    request.family = (uint8_t)family;
    request.noptions = noptions < SOCK_OPTIONS ? (uint16_t)noptions : SOCK_OPTIONS;
    request.options = options;
    request.local = local ? *local : unknown;
    request.remote = remote ? *remote : unknown;
    atomic_fetch_add(&readers, 1);
    reload_if_due();
    for (int attempt = 0;; attempt++) {
        struct policy_table *table = atomic_load(&current);
        if (!table) {
            stay_on_tcp(out, REASON_BAD_TABLE);
            out->otherwise = required ? OTHERWISE_ERROR : OTHERWISE_TCP;
            break;
        }
        if (decide(table, &request, out))
            break;
        if (attempt + 1 == ATTEMPTS) {
            stay_on_tcp(out, REASON_ENGINE_BUSY);
            out->otherwise = table->otherwise;
            break;
        }
    }
    leave();
    errno = saved;
}

static size_t copy_text(char *out, size_t size, const char *text)
{
    size_t length = strlen(text);

    if (size == 0)
        return 0;
    if (length >= size)
        length = size - 1;
    memcpy(out, text, length);
    out[length] = '\0';
    return length;
}

/* Of the path the end is what tells files apart. */
static size_t place_text(const char *path, uint32_t line, char *out, size_t size)
{
    char number[12] = "", *digits = number + sizeof number - 1;
    size_t length = strlen(path);

    do
        *--digits = (char)('0' + line % 10);
    while (line /= 10);
    *--digits = ':';
    size_t tail = strlen(digits);
    if (size <= tail + 3)
        return copy_text(out, size, "");
    if (length + tail < size) {
        memcpy(out, path, length);
    } else {
        size_t kept = size - 1 - tail - 3;
        memcpy(out, "...", 3);
        memcpy(out + 3, path + length - kept, kept);
        length = kept + 3;
    }
    memcpy(out + length, digits, tail + 1);
    return length + tail;
}

size_t flows_rule_text(uint32_t rule, char *out, size_t size)
{
    struct policy_table *table = enter();
    size_t length;

    if (!table)
        length = copy_text(out, size, "");
    else if (rule >= table->header->nrules)
        length = copy_text(out, size, "defaults");
    else
        length = place_text(table->strings + table->rules[rule].file, table->rules[rule].line, out, size);
    leave();
    return length;
}

uint64_t flows_generation(void)
{
    struct policy_table *table = enter();
    uint64_t generation = table ? table->header->generation : 0;
    leave();
    return generation;
}

const void *flows_table(void)
{
    struct policy_table *table = atomic_load(&current);
    return table ? table->header : NULL;
}

uint8_t flows_engine(void)
{
    struct policy_table *table = enter();
    uint8_t engine = table ? table->engine : ENGINE_OFF;
    leave();
    return engine;
}

bool flows_ignore_firewall(void)
{
    struct policy_table *table = enter();
    bool ignore = table && table->firewall == FIREWALL_IGNORE;
    leave();
    return ignore;
}

bool flows_strict(void)
{
    struct policy_table *table = enter();
    bool strict = table ? table->otherwise == OTHERWISE_ERROR : required;
    for (uint32_t i = 0; table && i < table->header->nsections; i++)
        strict |= table->sections[i].otherwise == OTHERWISE_ERROR;
    for (uint32_t i = 0; table && i < table->header->nrules; i++)
        strict |= table->rules[i].otherwise == OTHERWISE_ERROR;
    leave();
    return strict;
}
