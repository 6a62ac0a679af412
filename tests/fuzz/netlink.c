/* X4: what the kernel says about routes, listeners and addresses: messages cut short, attributes that lie about their
 * length. */
#include "fuzz.h"
#include "answers.h"
#include "interposer/native/netinfo.c"

static bool fuzz_serves(const struct subnet *subnet)
{
    check(subnet->prefix <= 128);
    return true;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_answer();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct own_table own;
    static const struct san_provider provider = {.name = "fuzz", .id = 1, .wsp_serves = fuzz_serves};
    struct endpoint to = {.port = 80}, source;
    struct netinfo_listener listener;
    in = (struct fuzz_input){data, data + size};
    turns = 0;
    uint8_t mode = fuzz_byte(&in);
    endpoint_set_wildcard(&to, mode & 1);
    to.ip[15] = 1;
    switch (mode >> 1 & 3) {
    case 0: ask_local(&to, &source); break;
    case 1: ask_listener(&to, &listener); break;
    case 2:
        memset(&own, 0, sizeof own);
        build(&own.table, &own.answer);
        fuzz_allow();
        check(own.table.count <= SUBNETS);
        uint32_t providers;
        find_providers(&own.table, &to, &providers);
        break;
    default: netinfo_serves(&provider, &to);
    }
    fuzz_allow();
    return 0;
}
