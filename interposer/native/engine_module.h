/* What engine.c and the embedding module (interposer/policy/build_engine.py) know of each other. The module is compiled
 * against Python.h and exports one object of this type, "engine_module"; engine.c knows no Python. Every call but start
 * takes and gives back the GIL by itself; but for interrupt none may run in two threads at once. */
#ifndef INTERPOSER_ENGINE_MODULE_H
#define INTERPOSER_ENGINE_MODULE_H
#include "engine.h"

#define ENGINE_MODULE_VERSION 2

struct engine_setup {
    const char *home;                    /* the prefix that holds lib/python3.X */
    const char *const *search_path;      /* sys.path, ended by NULL */
    void (*log)(const char *line);
};

struct engine_module {
    uint32_t version;
    /* Starts Python and imports the policy engine, on a thread of its own. 0, or -1 after a line in the log. */
    int (*start)(const struct engine_setup *setup);
    /* A new table; copied. 1 if Python took it. */
    int (*configure)(const void *table, uint32_t size, const struct process_facts *facts);
    /* Imports a policy function, so that only its run counts against its time. 1 if done, for better or worse. */
    int (*prepare)(uint32_t function);
    /* 1 if *out was filled in. */
    int (*decide)(const struct decision_request *request, struct verdict *out);
    /* Around the life of a thread that calls often: keeps its Python thread state. */
    void *(*thread_begin)(void);
    void (*thread_end)(void *state);
    /* Raises an exception in what that thread runs, if it is still `due`. Waits for the GIL for as long as it takes. */
    void (*interrupt)(bool (*due)(void));
    void (*before_fork)(void);
    void (*after_fork_parent)(void);
    void (*after_fork_child)(void);
};
#endif
