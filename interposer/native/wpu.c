/* Owns the handles that providers hold. A handle is an index and the generation of its pool item, so one that was given
 * back is recognised for ever. Lock-free; runs after fork and in signal handlers. */
#include "connecting.h"
#include <errno.h>

struct handle {
    struct pool_item item;
    const struct san_provider *provider;
    wsp_descriptor companion;
    _Atomic uintptr_t context;
};

POOL(handles, struct handle);

static struct handle *resolve(wpu_handle number)
{
    struct handle *handle = (uint32_t)number ? pool_at(&handles, (uint32_t)number - 1) : NULL;
    return handle && atomic_load(&handle->item.generation) == (uint32_t)(number >> 32) && handle->context ? handle : NULL;
}

wpu_handle wpu_create_socket_handle(const struct san_provider *provider, wsp_descriptor companion, uintptr_t context)
{
    struct handle *handle = context ? pool_take(&handles) : NULL;
    if (!handle)
        return 0;
    handle->provider = provider;
    handle->companion = companion;
    atomic_store(&handle->context, context);
    return (wpu_handle)atomic_load(&handle->item.generation) << 32 | (handle->item.index + 1);
}

int wpu_query_socket_handle_context(wpu_handle number, uintptr_t *context)
{
    struct handle *handle = resolve(number);
    if (!handle)
        return -ENOTSOCK;
    *context = atomic_load(&handle->context);
    return 0;
}

int wpu_close_socket_handle(wpu_handle number)
{
    struct handle *handle = resolve(number);
    uintptr_t context = handle ? atomic_load(&handle->context) : 0;
    if (!context || !atomic_compare_exchange_strong(&handle->context, &context, 0))
        return -ENOTSOCK;
    pool_give(&handles, handle);
    return 0;
}

int wpu_complete_overlapped_request(wpu_handle number, int error)
{
    uintptr_t context;
    struct sock *sock = wpu_query_socket_handle_context(number, &context) == 0 ? fdtable_at((uint32_t)context - 1) : NULL;
    if (!sock)
        return -ENOTSOCK;
    /* Held now; but the handle may have been given back, and the socket be another, before it was. Later the attempt's
     * number tells. */
    int result = wpu_query_socket_handle_context(number, &context) == 0
                     ? connecting_complete(sock, (uint32_t)(context >> 32), error) : -ENOTSOCK;
    sock_put(sock);
    return result;
}

const struct san_provider *provider_nth(int index)
{
    if (index == 0)
        return &provider_unix;
    return provider_tests ? provider_tests[index - 1] : NULL;
}

const struct san_provider *provider_by_id(uint8_t id)
{
    const struct san_provider *provider;
    for (int i = 0; (provider = provider_nth(i)) && provider->id != id; i++)
        ;
    return provider;
}
