/* X2, X4: the names of AF_UNIX peers and listeners, and socket addresses. What is taken is what we would have written. */
#include "fuzz.h"
#include "interposer/native/provider_unix.c"

static struct fuzz_input in;

static int fuzz_name(int fd, struct sockaddr *address, socklen_t *length)
{
    uint8_t size = fuzz_byte(&in);
    (void)fd;
    if (size > 200) {
        errno = ENOTCONN;
        return -1;
    }
    size = size < *length ? size : (uint8_t)*length;
    fuzz_take(&in, address, size);
    fuzz_forbid(address, size, *length);
    *length = size;
    return 0;
}

static int fuzz_accept(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    (void)flags;
    return fuzz_name(fd, address, length) < 0 ? -1 : FUZZ_FD;
}

static int fuzz_refuse(int domain, int type, int protocol)
{
    (void)domain, (void)type, (void)protocol;
    errno = EMFILE;
    return -1;
}

static int fuzz_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    struct ucred nobody = {1, 65534, 65534};
    (void)fd, (void)level, (void)name;
    memcpy(value, &nobody, *length < sizeof nobody ? *length : sizeof nobody);
    return 0;
}

static int fuzz_setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    (void)fd, (void)level, (void)name, (void)value, (void)length;
    return 0;
}

static void look_at(const uint8_t *data, size_t size)
{
    struct endpoint first, second;
    struct sockaddr_un again, *exact = malloc(size ? size : 1);
    memcpy(exact, data, size);
    if (endpoint_from_sockaddr(&first, size < 2 ? (void *)"\0\0" : (void *)exact, (socklen_t)size)) {
        char text[80];
        check(endpoint_text(&first, text, sizeof text) < ENDPOINT_TEXT);
    }
    char kind = size < 2 ? 0 : parse_name(exact, (socklen_t)size, &first, &second);
    if (kind) {
        socklen_t length = kind == 'C' ? connection_name(&again, &first, &second)
                                       : listener_name(&again, &first, kind == 'D', 0);
        check(kind != 'C' || (length == size && memcmp(&again, exact, size) == 0));
        check(length <= size && memcmp(&again, exact, length - 1) == 0);
    }
    free(exact);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    real.getsockname = real.getpeername = fuzz_name;
    real.accept4 = fuzz_accept;
    real.socket = fuzz_refuse;         /* no question to the kernel */
    real.getsockopt = fuzz_getsockopt;
    real.setsockopt = fuzz_setsockopt;
    real.close = fuzz_close;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct endpoint local, peer;
    bool v6;
    wsp_descriptor accepted;
    look_at(data, size);
    in = (struct fuzz_input){data, data + size};
    int end = unix_recognise(FUZZ_FD, &local, &peer, &v6);
    fuzz_allow();
    check(end < 0 || endpoint_is_v4(&local) == endpoint_is_v4(&local));

    struct unix_companion listener = {.fd = FUZZ_FD, .beacon = -1};
    in = (struct fuzz_input){data, data + size};
    endpoint_set_wildcard(&listener.local, fuzz_byte(&in) & 1);
    listener.local.port = 80;
    listener.dual = true;
    in = (struct fuzz_input){data, data + size};
    int error = unix_accept((wsp_descriptor)&listener, 1, false, false, &accepted, &local, &peer);
    fuzz_allow();
    if (!error) {
        check(local.port == 80 && peer.port >= PRIVILEGED_PORTS);
        give_companion((struct unix_companion *)accepted);
    }
    return 0;
}
