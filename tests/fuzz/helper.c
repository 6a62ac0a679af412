/* X4: what answers where the helper should: messages cut short, of another kind, for another question, none at all. An
 * input is a list of messages, each with a byte for what becomes of the calls around it. */
#include "fuzz.h"
#undef mmap
#undef munmap
#include "interposer/native/fdtable.h"
#define hidden_fd(fd) (fd)
#define hidden_close(fd) ((void)(fd))
#include "interposer/native/clock.h"
static int64_t fuzz_clock;
#define clock_ms() (fuzz_clock += 20)
#define fstat(fd, status) fuzz_stat(status)
static int fuzz_stat(struct stat *status);
#include "interposer/native/helper.c"
#undef fstat

static struct fuzz_input in;
static uint32_t asked;

static int fuzz_stat(struct stat *status)
{
    *status = (struct stat){.st_mode = fuzz_byte(&in) & 1 ? S_IFSOCK : S_IFREG, .st_ino = 7};
    return 0;
}

static int fuzz_socket(int domain, int type, int protocol)
{
    (void)domain, (void)type, (void)protocol;
    return FUZZ_FD;
}

static int fuzz_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    (void)fd, (void)address;
    check(length <= sizeof(struct sockaddr_un));
    errno = ECONNREFUSED;
    return fuzz_byte(&in) % 16 ? 0 : -1;
}

static int fuzz_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    (void)fd, (void)level, (void)name;
    struct ucred peer = {1, fuzz_byte(&in) % 8 ? geteuid() : 12345, 1};
    memcpy(value, &peer, *length < sizeof peer ? *length : sizeof peer);
    return 0;
}

static int fuzz_setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    (void)fd, (void)level, (void)name, (void)value, (void)length;
    return 0;
}

static ssize_t fuzz_sendmsg(int fd, const struct msghdr *message, int flags)
{
    (void)fd, (void)flags;
    const struct helper_request *head = message->msg_iov[0].iov_base;
    if (head->type == HELPER_REQUEST)
        asked = head->number;
    size_t size = 0;
    for (size_t i = 0; i < message->msg_iovlen; i++)
        for (size_t j = 0; j < message->msg_iov[i].iov_len; j++)   /* all of it must be readable */
            size += 1 + 0 * ((volatile char *)message->msg_iov[i].iov_base)[j];
    uint8_t fate = fuzz_byte(&in);
    errno = fate == 1 ? EINTR : fate == 2 ? EAGAIN : EPIPE;
    return fate >= 1 && fate <= 3 ? -1 : (ssize_t)size;
}

static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags)
{
    (void)fd, (void)flags;
    uint8_t fate = fuzz_byte(&in);
    if (fate < 4) {
        errno = fate == 1 ? EINTR : fate == 2 ? EAGAIN : ECONNRESET;
        return fate ? -1 : 0;
    }
    size_t length = fate < 200 ? size : fate % 64;
    length = length < size ? length : size;
    struct helper_answer answer;
    fuzz_take(&in, &answer, sizeof answer);
    if (fate & 1) {                    /* else nothing would ever be the answer */
        answer.type = HELPER_ANSWER;
        answer.number = asked;
    }
    memcpy(buffer, &answer, length);
    return (ssize_t)length;
}

static int fuzz_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    (void)timeout;
    check(count == 1);
    fds->revents = fds->events;
    uint8_t fate = fuzz_byte(&in);
    return fate < 8 ? 0 : 1;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    real.socket = fuzz_socket;
    real.connect = fuzz_connect;
    real.getsockopt = fuzz_getsockopt;
    real.setsockopt = fuzz_setsockopt;
    real.sendmsg = fuzz_sendmsg;
    real.recv = fuzz_recv;
    real.poll = fuzz_poll;
    real.close = fuzz_close;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sock_option options[SOCK_OPTIONS] = {{0}};
    struct decision_request request = {.role = 2, .options = options};
    struct verdict verdict;
    in = (struct fuzz_input){data, data + size};
    request.noptions = fuzz_byte(&in) % (SOCK_OPTIONS + 1);
    request.function = fuzz_byte(&in) & 1 ? 0 : FUNCTION_NONE;
    for (int i = 0; i < 2; i++) {
        memset(&verdict, 0, sizeof verdict);
        if (helper_ask("interposer-helper/0/x", 1, &request, 0, &verdict) == 0)
            check((verdict.action == ACTION_TCP || verdict.action == ACTION_SAN) && verdict.otherwise <= OTHERWISE_ERROR);
    }
    helper_after_fork_child();
    return 0;
}
