/* X4: /proc/self/fdinfo of an epoll, in pieces of any size. */
#include "fuzz.h"
#include "interposer/native/readiness.c"

static bool seen(const struct item *item, void *context)
{
    (void)context;
    return item->fd != 5;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_files();
    struct fuzz_input in = {data, data + size};
    size_t piece = fuzz_byte(&in);
    fuzz_serve(in.at, (size_t)(in.end - in.at), piece);
    each_item(3, seen, NULL);
    return 0;
}
