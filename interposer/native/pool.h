/* A lock-free pool of equal items. Its memory is type-stable: an item that was given back may be read for ever after,
 * so a thread that still holds a pointer sees another item, never a hole. Usable in signal handlers and after fork; an
 * allocation that a fork cut through costs the child one item at most. */
#ifndef INTERPOSER_POOL_H
#define INTERPOSER_POOL_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define POOL_CHUNK 64
#define POOL_CHUNKS 16384

struct pool_item {                     /* first member of every item */
    _Atomic uint32_t next;             /* index + 1 of the next free item */
    uint32_t index;
    _Atomic uint32_t generation;       /* counts the times the item was given back */
};

struct pool {
    _Atomic uint64_t head;             /* a tag against ABA, and index + 1 of the first free item */
    _Atomic uint32_t used;
    uint32_t item_size;
    _Atomic(char *) *chunks;
};

/* The chunks stand apart: an initialised array of that size would be paid for in the file. */
#define POOL(name, type)                                                                                               \
    static _Atomic(char *) name##_chunks[POOL_CHUNKS];                                                                 \
    static struct pool name = {.item_size = sizeof(type), .chunks = name##_chunks}

/* NULL when memory or the pool is exhausted. All but the pool_item is as the last owner left it, or zero. */
void *pool_take(struct pool *pool);
void pool_give(struct pool *pool, void *item);
/* The item with that index, or NULL if it never existed. */
void *pool_at(struct pool *pool, uint32_t index);
#endif
