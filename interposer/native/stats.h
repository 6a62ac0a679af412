/* What a process shows of itself: counters and one row per socket, in a memfd named "interposer" that is sealed against
 * shrinking. `sanctl` opens it through /proc/PID/fd, so nothing is left behind. Written only by the owning process with
 * relaxed atomics; a reader trusts nothing in it. The row of descriptor N is row N. Reader: interposer/diag/stats.py,
 * held to this by tests/unit/test_stats.py. */
#ifndef INTERPOSER_STATS_H
#define INTERPOSER_STATS_H
#include "endpoint.h"
#include <stdatomic.h>

#define STATS_MAGIC "SANSTATS"
#define STATS_VERSION 1
#define STATS_NAME "interposer"        /* the link reads /memfd:interposer (deleted) */
#define STATS_PROVIDERS 8              /* index 0 is TCP */
#define STATS_REASONS 64
#define STATS_ROWS 65536
#define STATS_RULE_SIZE 96

enum { STATS_ENGINE_NOT_STARTED = 0, STATS_ENGINE_READY = 1, STATS_ENGINE_HELPER = 2, STATS_ENGINE_REFUSED = 3 };
enum { ROW_FREE = 0, ROW_LISTEN = 1, ROW_CONNECT = 2, ROW_ACCEPT = 3 };

struct stats_row {                     /* 192 bytes */
    _Atomic uint32_t role;             /* ROW_* */
    uint32_t family;                   /* AF_INET or AF_INET6 */
    uint32_t provider;                 /* PROVIDER_* that serves, 0 for TCP */
    uint32_t reason;                   /* why TCP, 0 when on a SAN; a listener with a companion: 0 */
    struct endpoint local, remote;     /* 24 bytes each; zero: not known, ask the kernel for descriptor N */
    uint64_t inode;                    /* of the TCP socket that the application made, 0 for an accepted companion */
    uint64_t started;                  /* CLOCK_REALTIME in nanoseconds */
    char rule[STATS_RULE_SIZE];        /* "file:line", "defaults" or ""; NUL-terminated; a long path loses its front */
    _Atomic uint64_t sequence;         /* odd while the row is being written, another one after each write */
    uint64_t rule_key;                 /* the writer's: whose text `rule` is */
};

struct stats_page {
    char magic[8];
    uint32_t version, pid;
    uint32_t row_size, nrows;
    uint32_t rows;                     /* offset of the first row in the memfd */
    _Atomic uint32_t engine;           /* STATS_ENGINE_* */
    _Atomic uint32_t engine_reason;    /* reason number when refused */
    _Atomic uint32_t max_row;          /* highest row ever written */
    uint64_t started;
    uint64_t table_generation;
    _Atomic uint64_t connections[STATS_PROVIDERS];   /* made or accepted since the start */
    _Atomic uint64_t listeners[STATS_PROVIDERS];
    _Atomic uint64_t reasons[STATS_REASONS];         /* fall-backs by reason number */
    _Atomic uint64_t upcalls;
};

/* What to say of a rule; returns the length. */
typedef size_t stats_rule_text(uint32_t rule, char *out, size_t size);

/* All of these may be called from any thread, a signal handler or a forked child, keep errno, and do nothing where the
 * page cannot be had. The first write makes the page. A child of vfork shares its parent's page and must not call them. */
/* `text` is asked, unless the row says already what it would. */
void stats_row_set(int fd, uint32_t role, int family, uint32_t provider, uint32_t reason, const struct endpoint *local,
                   const struct endpoint *remote, uint64_t inode, uint32_t rule, stats_rule_text *text);
void stats_row_clear(int fd);
void stats_row_copy(int from, int to);
void stats_connection(uint32_t provider);
void stats_listener(uint32_t provider);
void stats_reason(uint32_t reason);
void stats_upcall(void);
void stats_engine(uint32_t state, uint32_t reason);   /* inherited by forked children */
void stats_generation(uint64_t generation);           /* makes no page; inherited by forked children */
/* The page's descriptor, for a second or more; false: there was none. */
bool stats_yield(void);
/* No page is made any more, in children neither; the one that exists goes on counting. */
void stats_freeze(void);
/* For pthread_atfork's child handler. A child made without it (raw clone) finds out by itself. */
void stats_after_fork_child(void);
/* `rewrite` is called, with no lock held, each time that a forked child has made its own page, to write the rows of the
 * sockets that it inherited. */
void stats_on_new_page(void (*rewrite)(void));
#endif
