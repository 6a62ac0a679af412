/* The rules of one role that apply to this process, found by port and address. */
#ifndef INTERPOSER_RULE_INDEX_H
#define INTERPOSER_RULE_INDEX_H
#include "policy_table.h"

struct rule_found {
    uint32_t rule, section;            /* indexes into the table; RULE_DEFAULT where none matches */
};

/* The first rule that matches. Builds the index of the role when first asked; without memory it scans. */
struct rule_found rule_index_find(struct policy_table *table, uint8_t role, const struct endpoint *local,
                                  const struct endpoint *remote);
void rule_index_free(struct policy_table *table);
#endif
