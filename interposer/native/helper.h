/* Asking the helper process (interposer/policy/helper.py) instead of an engine in this process. */
#ifndef INTERPOSER_HELPER_H
#define INTERPOSER_HELPER_H
#include "engine.h"

/* One AF_UNIX SOCK_SEQPACKET message each. Facts come first, once a connection, in as many pieces as they need, in the
 * order of the numbers; a request is answered by its number, or not at all. */
#define HELPER_PIECE 32768
enum { HELPER_FACT = 1, HELPER_REQUEST = 2, HELPER_ANSWER = 3, HELPER_WATCH = 4 };
enum { FACT_EXE = 1, FACT_NAME = 2, FACT_ARGUMENTS = 3, FACT_ENVIRONMENT = 4, FACT_CGROUPS = 5, FACT_USER = 6 };

struct helper_fact {                   /* 8 bytes, then the piece */
    uint32_t type, field;
};

struct helper_request {                /* 16 bytes, then the request up to its pointer (64), then the options (22 each) */
    uint32_t type, number;
    uint64_t generation;               /* of the asker's table, which `function` and `rule` are of */
};

struct helper_answer {                 /* 48 bytes */
    uint32_t type, number;
    uint64_t generation;               /* of the table by which it was decided */
    struct verdict verdict;
};

/* 0 and *out, or the reason number. `address` is an abstract name, or a path if it begins with a slash. */
uint16_t helper_ask(const char *address, uint64_t generation, const struct decision_request *request, uint32_t wait_ms,
                    struct verdict *out);
/* Closes idle connections; false: there was none. */
bool helper_yield(void);
void helper_after_fork_child(void);
#endif
