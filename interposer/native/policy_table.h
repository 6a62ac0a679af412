/* The compiled table in this process's memory, checked so that nothing that uses it needs to check again. */
#ifndef INTERPOSER_POLICY_TABLE_H
#define INTERPOSER_POLICY_TABLE_H
#include "engine.h"
#include <stdatomic.h>
#include <sys/stat.h>

struct flow;
struct rule_index;

struct policy_table {
    size_t mapped;
    const struct table_header *header;
    const struct table_section *sections;
    const struct table_predicate *predicates;
    const struct table_rule *rules;
    const char *strings;
    uint8_t *applies;                        /* for each section, whether its predicates hold here */
    uint8_t engine, otherwise, firewall, providers[PROVIDERS_MAX];   /* of this process */
    _Atomic(struct rule_index *) index[2];   /* by role; owner: rule_index.c */
    _Atomic(struct flow *) flows;            /* owner: flows.c */
};

/* 0, or minus a REASON_*. *status is the file's, where it could be opened. */
int policy_table_read(const char *path, const struct process_facts *facts, struct policy_table **out,
                      struct stat *status);
void policy_table_free(struct policy_table *table);
/* Zeroed private memory, NULL where there is none. Nothing of the policy is ever on the program's heap. */
void *policy_memory(size_t size);
#endif
