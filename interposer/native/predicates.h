/* Which sections of the policy apply to a process. */
#ifndef INTERPOSER_PREDICATES_H
#define INTERPOSER_PREDICATES_H
#include "engine.h"

/* `text` is the predicate's string. */
bool predicate_holds(const struct table_predicate *predicate, const char *text, const struct process_facts *facts);
#endif
