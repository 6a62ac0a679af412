/* X4: the page that others of the same user can write through /proc/PID/fd, while its owner goes on. An input is a list of
 * calls and of scribblings between them. */
#include "fuzz.h"
#undef mmap
#undef munmap
#include "interposer/native/stats.c"

static size_t rule_text(uint32_t rule, char *out, size_t size)
{
    return (size_t)snprintf(out, size, "rule %u", rule);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct endpoint somebody = {.port = 80};
    struct fuzz_input in = {data, data + size};
    while (in.at < in.end) {
        uint16_t one, two;
        uint64_t word;
        uint8_t call = fuzz_byte(&in);
        fuzz_take(&in, &one, sizeof one);
        fuzz_take(&in, &two, sizeof two);
        int first = call & 0x80 ? (int16_t)one : one % 32, second = call & 0x40 ? two : two % 32;
        struct stats_page *now = atomic_load(&page);
        switch (call % 8) {
        case 0: stats_row_set(first, one, two, two, one, &somebody, NULL, 1, two, rule_text); break;
        case 1: stats_row_clear(first); break;
        case 2: stats_row_copy(first, second); break;
        case 3: stats_connection(one); stats_listener(two); break;
        case 4: stats_reason(one); stats_engine(two, one); break;
        case 5: stats_generation(one); stats_upcall(); break;
        default:
            fuzz_take(&in, &word, sizeof word);
            if (now)
                memcpy((char *)now + (call & 8 ? one % sizeof *now : ROWS_OFFSET + one % (32 * sizeof(struct stats_row))), &word, sizeof word);
        }
    }
    return 0;
}
