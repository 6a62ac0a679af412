/* The question to the policy engine and its answer. Owner: engine.c. Never called with a lock held, never in a child
 * made by vfork; a thread inside an up-call bypasses all hooks (switch_guard). */
#ifndef INTERPOSER_ENGINE_H
#define INTERPOSER_ENGINE_H
#include "endpoint.h"
#include "table.h"

#define RULE_DEFAULT 0xffffffffu       /* no rule matched: [defaults] */
#define FUNCTION_NONE 0xffffffffu      /* reactive: ask for the whole decision */

#define SOCK_OPTIONS 16
#define SOCK_OPTION_SIZE 16

/* A socket option that the program has set. */
struct sock_option {
    int16_t level, name;
    uint8_t length;
    uint8_t value[SOCK_OPTION_SIZE];
};

/* Whoever keeps a request beyond the call that brought it copies `options`, which are the asker's, with it. */
struct decision_request {
    uint8_t role, family;              /* ROLE_*; AF_INET or AF_INET6 of the application's socket */
    uint16_t noptions;                 /* at most SOCK_OPTIONS */
    uint32_t function;                 /* the function of the rule that said "ask", or FUNCTION_NONE */
    uint32_t rule;                     /* that rule, or RULE_DEFAULT */
    struct endpoint local, remote;     /* zero where unknown */
    const struct sock_option *options;
};

#define REMEMBER_NOT 0xffffffffu       /* remember_ms: ask every time */

struct verdict {
    uint8_t action;                    /* ACTION_TCP or ACTION_SAN; ACTION_ASK only between flows.c and decide.c */
    uint8_t otherwise;                 /* OTHERWISE_TCP or OTHERWISE_ERROR */
    uint8_t providers[PROVIDERS_MAX];
    uint16_t reason;                   /* why TCP */
    uint32_t rule;                     /* index into the table, or RULE_DEFAULT */
    uint32_t function;                 /* for ACTION_ASK */
    uint32_t send_buffer, receive_buffer;   /* bytes that the companion shall have; 0: as it is */
    uint32_t remember_ms;              /* 0: until the policy changes */
};

/* Facts about this process, captured by lifecycle.c before main (programs wipe their environment later). Lists are
 * NUL-separated and ended by an empty string. */
struct process_facts {
    const char *exe, *name, *arguments, *environment, *cgroups;
    uint32_t user;
};
const struct process_facts *process_facts(void);

/* Asks and fills *out in every case: where the engine cannot answer, ACTION_TCP with the reason. out->otherwise is what
 * stands where the answer leaves it open. Keeps errno. `table` is the validated table of this process. */
void engine_ask(const void *table, const struct decision_request *request, struct verdict *out);
/* engine = "startup": starts the engine now. */
void engine_start(const void *table);
/* Fork protocol, called by lifecycle.c from its pthread_atfork handlers. */
void engine_before_fork(void);
void engine_after_fork_parent(void);
void engine_after_fork_child(void);
#endif
