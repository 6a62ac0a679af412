/* X4: /proc/self/maps and /proc/thread-self/status, in pieces of any size. */
#include "fuzz.h"
#include "interposer/native/engine.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_files();
    struct fuzz_input in = {data, data + size};
    size_t piece = fuzz_byte(&in);
    fuzz_serve(in.at, (size_t)(in.end - in.at), piece);
    find_stack(0x7ffd12345678);
    check(stack_low <= stack_high || !stack_high);
    fuzz_serve(in.at, (size_t)(in.end - in.at), piece);
    sandboxed();
    return 0;
}
