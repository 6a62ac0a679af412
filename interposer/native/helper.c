/* Owns this process's connections to the helper: a few idle ones in atomic slots, taken by the thread that asks, so no
 * lock. A forked child closes its copies and connects anew; a connection that timed out is closed, and its late answer
 * with it. May run in a signal handler. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "helper.h"
#include "clock.h"
#include "fdtable.h"
#include "real.h"
#include "reasons.h"
#include "trace.h"
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define REQUEST_SIZE offsetof(struct decision_request, options)
_Static_assert(sizeof(struct helper_request) == 16 && REQUEST_SIZE == 64 && sizeof(struct sock_option) == 22 &&
               sizeof(struct helper_answer) == 48, "interposer/policy/helper.py");

#define IDLE 4
#define CONNECT_MS 250

/* fd + 1 and, as the program may close any descriptor and get the number for another, the inode. */
static _Atomic uint64_t idle[IDLE];
static _Atomic uint32_t numbers;

static uint64_t identity(int fd)
{
    struct stat status;
    if (fstat(fd, &status) || !S_ISSOCK(status.st_mode))
        return 0;
    return (uint64_t)(uint32_t)status.st_ino << 32 | (uint32_t)(fd + 1);
}

static bool wait_for(int fd, short events, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline - clock_ms();
        struct pollfd poll = {.fd = fd, .events = events};
        if (left <= 0)
            return false;
        int ready = real.poll(&poll, 1, (int)left);
        if (ready > 0)
            return true;
        if (ready < 0 && errno != EINTR)
            return false;
    }
}

static bool send_parts(int fd, const struct iovec *parts, int count, int64_t deadline)
{
    struct msghdr message = {.msg_iov = (struct iovec *)parts, .msg_iovlen = (size_t)count};
    for (;;) {
        if (real.sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
            return true;
        if (errno == EAGAIN ? !wait_for(fd, POLLOUT, deadline) : errno != EINTR)
            return false;
    }
}

static size_t list_size(const char *list)
{
    const char *end = list;
    while (*end)
        end += strlen(end) + 1;
    return (size_t)(end - list);
}

static bool send_fact(int fd, uint32_t field, const void *data, size_t size, int64_t deadline)
{
    struct helper_fact head = {.type = HELPER_FACT, .field = field};
    do {
        size_t piece = size < HELPER_PIECE ? size : HELPER_PIECE;
        struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, piece}};
        if (!send_parts(fd, parts, 2, deadline))
            return false;
        data = (const char *)data + piece;
        size -= piece;
    } while (size);
    return true;
}

static bool send_facts(int fd, int64_t deadline)
{
    const struct process_facts *facts = process_facts();
    return send_fact(fd, FACT_EXE, facts->exe, strlen(facts->exe), deadline) &&
           send_fact(fd, FACT_NAME, facts->name, strlen(facts->name), deadline) &&
           send_fact(fd, FACT_ARGUMENTS, facts->arguments, list_size(facts->arguments), deadline) &&
           send_fact(fd, FACT_ENVIRONMENT, facts->environment, list_size(facts->environment), deadline) &&
           send_fact(fd, FACT_CGROUPS, facts->cgroups, list_size(facts->cgroups), deadline) &&
           send_fact(fd, FACT_USER, &facts->user, sizeof facts->user, deadline);
}

/* -1 where nobody trustworthy answers: whoever holds the name must be root or this user. */
static int connect_helper(const char *address)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    size_t length = strlen(address);
    int64_t deadline = clock_ms() + CONNECT_MS;
    bool abstract = address[0] != '/';
    if (!length || length + abstract > sizeof name.sun_path)
        return -1;
    memcpy(name.sun_path + abstract, address, length);
    length += abstract;
    int fd = real.socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    /* The kernel bounds connect()'s wait for room in the backlog by the send timeout. */
    struct timeval bound = {.tv_usec = CONNECT_MS * 1000};
    real.setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof bound);
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (real.connect(fd, (struct sockaddr *)&name, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length)) ||
        real.getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size)) {
        real.close(fd);
        return -1;
    }
    if (peer.uid != 0 && peer.uid != geteuid()) {
        trace_log("engine: the helper's address is held by user %u: not asked", peer.uid);
        real.close(fd);
        return -1;
    }
    fd = hidden_fd(fd);
    if (fd >= 0 && !send_facts(fd, deadline)) {
        hidden_close(fd);
        fd = -1;
    }
    return fd;
}

static int take_idle(void)
{
    for (int i = 0; i < IDLE; i++) {
        uint64_t held = atomic_exchange(&idle[i], 0);
        if (!held)
            continue;
        int fd = (int)(uint32_t)held - 1;
        if (identity(fd) == held)
            return fd;
    }
    return -1;
}

static void give_idle(int fd)
{
    uint64_t held = identity(fd);
    for (int i = 0; i < IDLE && held; i++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&idle[i], &none, held))
            return;
    }
    hidden_close(fd);
}

/* 1: answered, 0: not in time, -1: the connection is of no use. */
static int ask(int fd, uint64_t generation, const struct decision_request *request, int64_t deadline, struct verdict *out)
{
    struct helper_request question = {.type = HELPER_REQUEST, .generation = generation};
    struct helper_answer answer;
    question.number = atomic_fetch_add(&numbers, 1);
    struct iovec parts[] = {{&question, sizeof question},
                            {(void *)request, REQUEST_SIZE},
                            {(void *)request->options, request->noptions * sizeof *request->options}};
    if (!send_parts(fd, parts, 3, deadline))
        return -1;
    for (;;) {
        ssize_t got = real.recv(fd, &answer, sizeof answer, MSG_DONTWAIT);
        if (got == (ssize_t)sizeof answer && answer.type == HELPER_ANSWER && answer.number == question.number) {
            *out = answer.verdict;
            /* Of a policy that this process has not read yet. */
            if (answer.generation != generation)
                out->remember_ms = REMEMBER_NOT;
            return 1;
        }
        if (got >= 0 || (errno != EAGAIN && errno != EINTR))
            return -1;
        if (!wait_for(fd, POLLIN, deadline))
            return 0;
    }
}

static bool sound(const struct verdict *verdict)
{
    return (verdict->action == ACTION_TCP || verdict->action == ACTION_SAN) && verdict->otherwise <= OTHERWISE_ERROR;
}

uint16_t helper_ask(const char *address, uint64_t generation, const struct decision_request *request, uint32_t wait_ms,
                    struct verdict *out)
{
    int64_t deadline = clock_ms() + wait_ms;
    int fd, answered = -1;
    /* An idle connection may be to a helper that has ended; a new one tells. */
    while (answered < 0 && (fd = take_idle()) >= 0) {
        answered = ask(fd, generation, request, deadline, out);
        if (answered < 0)
            hidden_close(fd);
    }
    if (answered < 0) {
        fd = connect_helper(address);
        if (fd < 0)
            return REASON_ENGINE_NO_HELPER;
        answered = ask(fd, generation, request, deadline, out);
    }
    if (answered == 1 && sound(out)) {
        give_idle(fd);
        return 0;
    }
    hidden_close(fd);
    return answered == 0 && request->function != FUNCTION_NONE ? REASON_FUNCTION_TIMEOUT : REASON_ENGINE_NO_HELPER;
}

bool helper_yield(void)
{
    bool some = false;
    for (int fd; (fd = take_idle()) >= 0; some = true)
        hidden_close(fd);
    return some;
}

void helper_after_fork_child(void)
{
    helper_yield();
}
