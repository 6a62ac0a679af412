/* X4: /proc/self/fdinfo of an epoll, in pieces of any size. */
#include "fuzz.h"
#include "interposer/native/readiness.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_files();
    struct fuzz_input in = {data, data + size};
    size_t piece = fuzz_byte(&in);
    fuzz_serve(in.at, (size_t)(in.end - in.at), piece);
    kernel_events(3, 5, EPOLLIN);
    return 0;
}
