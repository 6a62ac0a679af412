/* The decision: the compiled table, then this process's remembered answers of the policy engine, then the engine.
 * Owner: flows.c. Nothing here blocks except the engine's answer; everything may run in a signal handler and after
 * fork, and keeps errno. */
#ifndef INTERPOSER_FLOWS_H
#define INTERPOSER_FLOWS_H
#include "engine.h"

/* Reads, checks and takes the table; 0, or minus a REASON_*. `facts` must stay. Called once before the first decision;
 * later changes of the file are noticed by flows_decide, at most a second late. */
int flows_load(const char *path, const struct process_facts *facts);

/* Strict even without a usable table: what cannot be decided is refused (sanrun --require). */
void flows_require(void);

/* `role` is ROLE_LISTEN or ROLE_CONNECT; `local` and `remote` may be NULL where unknown; `options` are what the program
 * has set, read only where a question is asked. *out is never ACTION_ASK. */
void flows_decide(uint8_t role, int family, const struct endpoint *local, const struct endpoint *remote,
                  const struct sock_option *options, uint32_t noptions, struct verdict *out);

/* Where a verdict's rule stands: "/etc/interposer/policy.toml:12", cut at the left where it does not fit; "defaults" for
 * RULE_DEFAULT; "" without a table. Returns the length. */
size_t flows_rule_text(uint32_t rule, char *out, size_t size);

uint64_t flows_generation(void);       /* 0 without a table */
const void *flows_table(void);         /* NULL without a table; valid until the policy has changed four more times */
uint8_t flows_engine(void);            /* ENGINE_* of this process; ENGINE_OFF without a table */
bool flows_ignore_firewall(void);     /* does the policy say so for this process? */
bool flows_strict(void);               /* may a connection of this process be refused because it cannot be on a SAN? */
#endif
