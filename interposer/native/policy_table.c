/* Reads and checks compiled tables; no state. The file is read, never mapped: a mapping that somebody cuts short is a
 * SIGBUS in the host. May run after fork and in a signal handler. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "policy_table.h"
#include "predicates.h"
#include "real.h"
#include "reasons.h"
#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void *policy_memory(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static uint32_t crc32_of(const uint8_t *bytes, size_t size)
{
    uint32_t rows[256], crc = 0xffffffffu;

    for (uint32_t i = 0; i < 256; i++) {
        uint32_t row = i;
        for (int bit = 0; bit < 8; bit++)
            row = row >> 1 ^ (row & 1 ? 0xedb88320u : 0);
        rows[i] = row;
    }
    while (size--)
        crc = crc >> 8 ^ rows[(crc ^ *bytes++) & 0xff];
    return ~crc;
}

static bool area_fits(const struct table_header *header, uint32_t offset, uint32_t count, size_t record)
{
    return offset % 4 == 0 && offset >= sizeof *header && offset + (uint64_t)count * record <= header->size;
}

/* Ranges follow one another, as the compiler writes them: overlapping ones would make a small file a large policy. */
static bool range_follows(uint32_t first, uint32_t count, uint32_t total, uint32_t *next)
{
    if (first != *next || count > total - first)
        return false;
    *next += count;
    return true;
}

static bool providers_valid(const uint8_t *providers)
{
    for (int i = 0; i < PROVIDERS_MAX; i++)
        if (providers[i] >= STATS_PROVIDERS || (i && providers[i] && !providers[i - 1]))
            return false;
    return true;
}

static bool rule_valid(const struct table_header *header, const struct table_rule *rule)
{
    return rule->role >= 1 && rule->role <= (ROLE_LISTEN | ROLE_CONNECT) && rule->action >= ACTION_TCP &&
           rule->action <= ACTION_ASK && rule->otherwise <= OTHERWISE_ERROR && providers_valid(rule->providers) &&
           rule->local_families >= 1 && rule->local_families <= (FAMILY_V4 | FAMILY_V6) &&
           rule->remote_families >= 1 && rule->remote_families <= (FAMILY_V4 | FAMILY_V6) &&
           rule->local_prefix <= 128 && rule->remote_prefix <= 128 && rule->local_port[0] <= rule->local_port[1] &&
           rule->remote_port[0] <= rule->remote_port[1] && rule->file < header->strings_size &&
           (rule->action != ACTION_ASK || rule->function < header->nfunctions);
}

static bool section_valid(const struct table_header *header, const struct table_section *section, bool last,
                          uint32_t *predicate, uint32_t *rule)
{
    return range_follows(section->predicate, section->npredicates, header->npredicates, predicate) &&
           range_follows(section->rule, section->nrules, header->nrules, rule) &&
           section->file < header->strings_size &&
           section->engine <= ENGINE_OFF && section->otherwise <= OTHERWISE_ERROR &&
           section->firewall <= FIREWALL_IGNORE &&
           providers_valid(section->providers) &&
           (!last || (section->npredicates == 0 && section->engine && section->otherwise));
}

static bool table_valid(const uint8_t *bytes, size_t size)
{
    const struct table_header *header = (const void *)bytes;

    if (size < sizeof *header || memcmp(header->magic, TABLE_MAGIC, sizeof header->magic) != 0 ||
        header->version != TABLE_VERSION || header->size != size ||
        header->crc != crc32_of(bytes + sizeof *header, size - sizeof *header))
        return false;
    if (!area_fits(header, header->sections, header->nsections, sizeof(struct table_section)) ||
        !area_fits(header, header->predicates, header->npredicates, sizeof(struct table_predicate)) ||
        !area_fits(header, header->rules, header->nrules, sizeof(struct table_rule)) ||
        !area_fits(header, header->functions, header->nfunctions, sizeof(struct table_function)) ||
        !area_fits(header, header->search_path, header->nsearch_path, sizeof(uint32_t)) ||
        !area_fits(header, header->strings, header->strings_size, 1) || header->nsections == 0 ||
        header->strings_size == 0)
        return false;

    const char *strings = (const char *)bytes + header->strings;
    uint32_t room = header->strings_size;
    if (strings[0] || strings[room - 1] || header->libpython >= room || header->python_home >= room ||
        header->engine_module >= room || header->helper >= room || header->key >= room)
        return false;

    const struct table_section *sections = (const void *)(bytes + header->sections);
    uint32_t predicate = 0, rule = 0;
    for (uint32_t i = 0; i < header->nsections; i++)
        if (!section_valid(header, &sections[i], i + 1 == header->nsections, &predicate, &rule))
            return false;
    const struct table_predicate *predicates = (const void *)(bytes + header->predicates);
    for (uint32_t i = 0; i < header->npredicates; i++)
        if (predicates[i].kind < PREDICATE_EXE || predicates[i].kind > PREDICATE_ENV || predicates[i].text >= room)
            return false;
    const struct table_rule *rules = (const void *)(bytes + header->rules);
    for (uint32_t i = 0; i < header->nrules; i++)
        if (!rule_valid(header, &rules[i]))
            return false;
    const struct table_function *functions = (const void *)(bytes + header->functions);
    for (uint32_t i = 0; i < header->nfunctions; i++)
        if (functions[i].module >= room || functions[i].name >= room || functions[i].file >= room ||
            functions[i].timeout_ms < 1 || functions[i].timeout_ms > TIMEOUT_MS_MAX)
            return false;
    const uint32_t *search_path = (const void *)(bytes + header->search_path);
    for (uint32_t i = 0; i < header->nsearch_path; i++)
        if (search_path[i] >= room)
            return false;
    return true;
}

static int read_whole(int fd, uint8_t *bytes, size_t size)
{
    while (size) {
        ssize_t got = real.read(fd, bytes, size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return -REASON_BAD_TABLE;
        bytes += got;
        size -= (size_t)got;
    }
    return 0;
}

/* A table whose owner could be somebody else, or that somebody else may write, could make this program load any
 * library. */
static bool file_trusted(const struct stat *status)
{
    return S_ISREG(status->st_mode) && (status->st_uid == 0 || status->st_uid == geteuid()) &&
           !(status->st_mode & (S_IWGRP | S_IWOTH)) && status->st_size >= (off_t)sizeof(struct table_header) &&
           status->st_size <= (off_t)TABLE_MAX_SIZE;
}

static void apply_sections(struct policy_table *table, const struct process_facts *facts)
{
    for (uint32_t i = 0; i < table->header->nsections; i++) {
        const struct table_section *section = &table->sections[i];
        bool holds = true;

        for (uint32_t j = 0; holds && j < section->npredicates; j++) {
            const struct table_predicate *predicate = &table->predicates[section->predicate + j];
            holds = predicate_holds(predicate, table->strings + predicate->text, facts);
        }
        table->applies[i] = holds;
        if (!holds)
            continue;
        if (!table->engine)
            table->engine = section->engine;
        if (!table->otherwise)
            table->otherwise = section->otherwise;
        if (!table->firewall)
            table->firewall = section->firewall;
        if (!table->providers[0])
            memcpy(table->providers, section->providers, PROVIDERS_MAX);
    }
}

static int read_open_file(int fd, const struct process_facts *facts, struct policy_table **out, struct stat *status)
{
    if (fstat(fd, status) != 0 || !file_trusted(status))
        return -REASON_BAD_TABLE;

    size_t size = (size_t)status->st_size, head = (sizeof(struct policy_table) + 63) & ~(size_t)63;
    /* The file holds fewer sections than bytes / sizeof(section): room for one byte each. */
    size_t mapped = head + size + size / sizeof(struct table_section);
    struct policy_table *table = policy_memory(mapped);
    if (!table)
        return -REASON_NO_MEMORY;

    uint8_t *bytes = (uint8_t *)table + head;
    table->mapped = mapped;
    int error = read_whole(fd, bytes, size);
    if (error == 0 && !table_valid(bytes, size))
        error = -REASON_BAD_TABLE;
    if (error) {
        munmap(table, mapped);
        return error;
    }
    table->header = (const void *)bytes;
    table->sections = (const void *)(bytes + table->header->sections);
    table->predicates = (const void *)(bytes + table->header->predicates);
    table->rules = (const void *)(bytes + table->header->rules);
    table->strings = (const char *)bytes + table->header->strings;
    table->applies = bytes + size;
    apply_sections(table, facts);
    *out = table;
    return 0;
}

int policy_table_read(const char *path, const struct process_facts *facts, struct policy_table **out,
                      struct stat *status)
{
    int fd = real.open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0);

    if (fd < 0)
        return -REASON_BAD_TABLE;
    int error = read_open_file(fd, facts, out, status);
    real.close(fd);
    return error;
}

void policy_table_free(struct policy_table *table)
{
    munmap(table, table->mapped);
}
