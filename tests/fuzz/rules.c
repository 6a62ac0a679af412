/* X4: what the kernel says about the rules of packet filters: chains cut short, attributes that lie about their length. */
#include "fuzz.h"
#include "answers.h"
#include "interposer/native/firewall.c"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_answer();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    in = (struct fuzz_input){data, data + size};
    turns = 0;
    if (fuzz_byte(&in) & 1) {
        check((nftables_rules() & ~(RULES_ALL | UNSURE)) == 0);
    } else {
        int64_t generation = nftables_generation();
        check(generation >= -4095 && generation <= UINT32_MAX);
    }
    fuzz_allow();
    return 0;
}
