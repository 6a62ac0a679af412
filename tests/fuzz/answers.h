/* A netlink socket that gives the answers of the input: a list of them, each with two bytes of length before it. */
#ifndef TESTS_FUZZ_ANSWERS_H
#define TESTS_FUZZ_ANSWERS_H
#include "fuzz.h"
#include "interposer/native/lifecycle.h"

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

static void fuzz_answer(void)
{
    real.socket = fuzz_socket;
    real.send = fuzz_send;
    real.recv = fuzz_recv;
    real.close = fuzz_close;
    lifecycle_moved = true;            /* nothing is remembered */
}
#endif
