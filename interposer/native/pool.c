/* Lock-free; see pool.h. */
#include "pool.h"
#include <sys/mman.h>

void *pool_at(struct pool *pool, uint32_t index)
{
    if (index >= POOL_CHUNK * POOL_CHUNKS)
        return NULL;
    char *chunk = atomic_load_explicit(&pool->chunks[index / POOL_CHUNK], memory_order_acquire);
    return chunk ? chunk + (size_t)(index % POOL_CHUNK) * pool->item_size : NULL;
}

static void *grow(struct pool *pool)
{
    uint32_t index = atomic_fetch_add(&pool->used, 1);
    if (index >= POOL_CHUNK * POOL_CHUNKS) {
        atomic_fetch_sub(&pool->used, 1);
        return NULL;
    }
    _Atomic(char *) *slot = &pool->chunks[index / POOL_CHUNK];
    if (!atomic_load_explicit(slot, memory_order_acquire)) {
        size_t size = (size_t)POOL_CHUNK * pool->item_size;
        char *fresh = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fresh == MAP_FAILED) {
            uint32_t next = index + 1; /* where another thread has taken that, the index is lost */
            atomic_compare_exchange_strong(&pool->used, &next, index);
            return NULL;
        }
        char *expected = NULL;
        if (!atomic_compare_exchange_strong(slot, &expected, fresh))
            munmap(fresh, size);
    }
    struct pool_item *item = pool_at(pool, index);
    item->index = index;
    return item;
}

void *pool_take(struct pool *pool)
{
    uint64_t head = atomic_load(&pool->head);
    while ((uint32_t)head) {
        struct pool_item *item = pool_at(pool, (uint32_t)head - 1);
        uint64_t next = ((head >> 32) + 1) << 32 | atomic_load_explicit(&item->next, memory_order_relaxed);
        if (atomic_compare_exchange_weak(&pool->head, &head, next))
            return item;
    }
    return grow(pool);
}

void pool_give(struct pool *pool, void *pointer)
{
    struct pool_item *item = pointer;
    atomic_fetch_add(&item->generation, 1);
    uint64_t head = atomic_load(&pool->head), mine;
    do {
        atomic_store_explicit(&item->next, (uint32_t)head, memory_order_relaxed);
        mine = ((head >> 32) + 1) << 32 | (item->index + 1);
    } while (!atomic_compare_exchange_weak(&pool->head, &head, mine));
}
