/* X4: /proc/sys/net/ipv4: ranges of ports. */
#include "fuzz.h"
#include "interposer/native/ports.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_files();
    fuzz_serve(data, size, 0);
    int most = size & 1 ? RESERVED : 1;
    struct range *ranges = calloc((size_t)most, sizeof *ranges);
    int count = read_ranges("x", ranges, most, size & 1 ? '-' : '\t');
    check(count <= most);
    free(ranges);
    learn();
    check(upper_half().first <= upper_half().last && nreserved <= RESERVED);
    return 0;
}
