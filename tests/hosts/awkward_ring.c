/* awkward_ring WHAT [PORT | RING PIPE]: a program with an io_uring of its own, which it makes by an instruction, or with -DBY_LIBC by
 * libc's syscall(), or with -DHIDDEN by syscall() with a number that stands nowhere in its code. Servers print their
 * port, serve one client through the ring and end with the letter of what carried it; a worker's listener is its descriptor 3. */
#include "awkward.h"
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdbool.h>
#include <sys/mman.h>

#if defined HIDDEN
static volatile long four = 4;
#define RING_CALL(number, a, b, c, d, e) syscall((number) / 4 * four + (number) % 4, a, b, c, d, e, 0)
#elif defined BY_LIBC
#define RING_CALL(number, a, b, c, d, e) syscall(number, a, b, c, d, e, 0)
#else
#define RING_CALL(number, a, b, c, d, e) past_libc(number, a, b, c, d, e)
#endif

static struct io_uring_params parameters;
static char *queues;
static struct io_uring_sqe *entries;
static int ring = -1;

static void map_ring(void)
{
    size_t size = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
    queues = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    entries = mmap(NULL, parameters.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (queues == MAP_FAILED || (void *)entries == MAP_FAILED)
        _exit(20);
}

static void make_ring(void)
{
    ring = (int)RING_CALL(SYS_io_uring_setup, 4, (long)&parameters, 0, 0, 0);
    if (ring < 0)
        _exit(21);
    map_ring();
}

/* One operation, and its end. */
static int by_ring(int operation, int fd, void *buffer, unsigned length, unsigned flags)
{
    unsigned *tail = (unsigned *)(void *)(queues + parameters.sq_off.tail), at = *tail & (parameters.sq_entries - 1);
    entries[at] = (struct io_uring_sqe){.opcode = (uint8_t)operation, .flags = (uint8_t)flags, .fd = fd,
                                        .addr = (uint64_t)buffer, .len = length};
    ((unsigned *)(void *)(queues + parameters.sq_off.array))[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (RING_CALL(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0) < 0)
        _exit(22);
    unsigned *head = (unsigned *)(void *)(queues + parameters.cq_off.head);
    int result = ((struct io_uring_cqe *)(void *)(queues + parameters.cq_off.cqes))[*head & (parameters.cq_entries - 1)].res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return result;
}

static int converse(int fd)
{
    char letter = carrier(fd);
    return fd >= 0 && by_ring(IORING_OP_SEND, fd, &letter, 1, 0) == 1 ? letter : 23;
}

static int connected_letter(int port, bool fixed)
{
    struct sockaddr_in at = {AF_INET, htons((uint16_t)port), {htonl(INADDR_LOOPBACK)}, {0}};
    char letter = 0;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fixed) {
        make_ring();
        if (RING_CALL(SYS_io_uring_register, ring, IORING_REGISTER_FILES, (long)&fd, 1, 0) < 0)
            return 24;
    }
    if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0)
        return 25;
    if (!fixed)
        make_ring();
    int got = by_ring(IORING_OP_RECV, fixed ? 0 : fd, &letter, 1, fixed ? IOSQE_FIXED_FILE : 0);
    return got == 1 && letter == carrier(fd) ? letter : 26;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    int port = argc > 2 ? atoi(argv[2]) : 0;
    alarm(30);
    if (strncmp(what, "connect", 7) == 0)   /* connect: the ring comes after it; connect-fixed: before, and knows the socket */
        return connected_letter(port, what[7]);
    if (strcmp(what, "inherit") == 0 && argc < 3) {   /* the ring, and a pipe that says how large it is, for the next program */
        char words[2][16];
        int told[2];
        make_ring();
        if (past_libc(SYS_fcntl, ring, F_SETFD, 0, 0, 0) < 0 || pipe(told) < 0 ||
            write(told[1], &parameters, sizeof parameters) != sizeof parameters)
            return 27;
        snprintf(words[0], sizeof words[0], "%d", ring);
        snprintf(words[1], sizeof words[1], "%d", told[0]);
        execl(argv[0], argv[0], what, words[0], words[1], (char *)NULL);
        return 28;
    }
    if (strcmp(what, "before") == 0)
        make_ring();
    bool worker = strcmp(what, "worker") == 0;
    int listener = worker ? 3 : listener_at(&port);
    if (listener < 0)
        return 11;
    if (strcmp(what, "inherit") == 0) {
        ring = atoi(argv[2]);
        if (read(atoi(argv[3]), &parameters, sizeof parameters) != sizeof parameters)
            return 29;
        map_ring();
    }
    if (strcmp(what, "after") == 0)
        make_ring();
    if (!worker)
        SAY("%d\n", port);
    struct pollfd ready = {listener, POLLIN, 0};
    if (strcmp(what, "late") == 0)     /* a client comes before there is a ring; one on a SAN is not seen here */
        past_libc(SYS_poll, (long)&ready, 1, 2000, 0, 0);
    if (strncmp(what, "poll", 4) == 0) {   /* poll-before: the ring first; poll: waits by libc, then makes the ring */
        if (what[4])
            make_ring();
        if (poll(&ready, 1, 20000) != 1)
            return 31;
        if (!what[4])
            make_ring();
        return converse(accept(listener, NULL, NULL));
    }
    if (ring < 0)
        make_ring();
    return converse(by_ring(IORING_OP_ACCEPT, listener, NULL, 0, 0));
}
