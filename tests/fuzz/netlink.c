/* X4: what the kernel says about routes, listeners and addresses: messages cut short, attributes that lie about their
 * length. An input is a list of answers, each with two bytes of length before it. */
#include "fuzz.h"
#include "interposer/native/netinfo.c"

static struct fuzz_input in;
static int turns;

static int fuzz_socket(int domain, int type, int protocol)
{
    (void)domain, (void)type, (void)protocol;
    return FUZZ_FD;
}

static ssize_t fuzz_send(int fd, const void *buffer, size_t size, int flags)
{
    (void)fd, (void)buffer, (void)flags;
    return (ssize_t)size;
}

static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags)
{
    uint16_t length;
    (void)fd, (void)flags;
    fuzz_allow();
    fuzz_take(&in, &length, sizeof length);
    if (!length || ++turns > 64) {
        errno = length & 1 ? EINTR : ENOBUFS;
        errno = turns > 64 ? ENOBUFS : errno;
        return -1;
    }
    size_t left = (size_t)(in.end - in.at), got = length < left ? length : left;
    got = got < size ? got : size;
    fuzz_take(&in, buffer, got);
    fuzz_forbid(buffer, got, size);
    return flags & MSG_TRUNC && got == size ? length : (ssize_t)got;
}

static bool fuzz_serves(const struct subnet *subnet)
{
    check(subnet->prefix <= 128);
    return true;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    real.socket = fuzz_socket;
    real.send = fuzz_send;
    real.recv = fuzz_recv;
    real.close = fuzz_close;
    lifecycle_moved = true;            /* nothing is remembered */
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
