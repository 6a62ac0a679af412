/* X4, T14: filters that a program hands to seccomp(), which the kernel has not looked at yet. */
#include "fuzz.h"
#include "interposer/native/sandbox.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t count = size / sizeof(struct sock_filter);
    struct sock_filter *steps = malloc(count ? count * sizeof *steps : 1);
    memcpy(steps, data, count * sizeof *steps);
    struct sock_fprog filter = {(unsigned short)count, steps};
    sandbox_forbids(&filter);
    free(steps);
    return 0;
}
