/* Owns nothing but a flag: reads a seccomp filter as the kernel will, with the system calls in mind that connections on a
 * SAN need and the program did not ask for. May run anywhere. */
#include "sandbox.h"
#include "endpoint.h"
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

_Atomic bool sandbox_closed;

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "name the architecture"
#endif
#define ANY 0

static const struct {
    int number;
    uint64_t arguments[4];
} needed[] = {
    {SYS_socket, {AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0}},
    {SYS_socket, {AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0}},
    {SYS_socket, {AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0}},
    {SYS_socket, {AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE}},
    {SYS_socket, {AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG}},
    {SYS_socket, {AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0}},
    {SYS_socket, {AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0}},
    {SYS_setsockopt, {ANY, IPPROTO_TCP, TCP_MD5SIG}},
    {SYS_bind, {ANY}},
    {SYS_connect, {ANY}},
    {SYS_listen, {ANY}},
    {SYS_accept4, {ANY}},
    {SYS_getsockname, {ANY}},
    {SYS_getsockopt, {ANY, SOL_SOCKET, SO_PEERCRED}},
    {SYS_setsockopt, {ANY, SOL_SOCKET, SO_SNDBUF}},
    {SYS_sendto, {ANY}},
    {SYS_sendmsg, {ANY}},
    {SYS_recvfrom, {ANY}},
    {SYS_recvmsg, {ANY}},
    {SYS_shutdown, {ANY}},
    {SYS_read, {ANY}},
    {SYS_pread64, {ANY}},
    {SYS_write, {ANY}},
    {SYS_close, {ANY}},
    {SYS_dup3, {ANY}},
    {SYS_fcntl, {ANY, F_DUPFD_CLOEXEC}},
    {SYS_fcntl, {ANY, F_GETFL}},
    {SYS_fcntl, {ANY, F_SETFL}},
    {SYS_openat, {(uint32_t)AT_FDCWD}},
    {SYS_newfstatat, {ANY}},
    {SYS_ppoll, {ANY}},
    {SYS_epoll_create1, {EPOLL_CLOEXEC}},
    {SYS_epoll_ctl, {ANY}},
    {SYS_epoll_pwait, {ANY}},
#ifdef SYS_poll
    {SYS_poll, {ANY}},
    {SYS_epoll_wait, {ANY}},
#endif
    {SYS_getrandom, {ANY}},
    {SYS_memfd_create, {ANY}},
    {SYS_ftruncate, {ANY}},
    {SYS_mmap, {ANY, ANY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS}},
    {SYS_mremap, {ANY}},
    {SYS_munmap, {ANY}},
    {SYS_munlock, {ANY}},
    {SYS_brk, {ANY}},
    {SYS_mprotect, {ANY}},
    {SYS_madvise, {ANY}},
    {SYS_futex, {ANY}},
    {SYS_rt_sigprocmask, {(uint32_t)-1}},
    {SYS_prlimit64, {ANY}},
    {SYS_getpid, {ANY}},
    {SYS_gettid, {ANY}},
    {SYS_tgkill, {ANY}},
    {SYS_geteuid, {ANY}},
    {SYS_rt_sigprocmask, {ANY}},
    {SYS_rt_sigaction, {ANY}},
    {SYS_sched_yield, {ANY}},
};

static uint32_t load(const struct seccomp_data *data, uint32_t offset)
{
    uint32_t word = 0;
    if (offset <= sizeof *data - sizeof word && offset % sizeof word == 0)
        memcpy(&word, (const char *)data + offset, sizeof word);
    return word;
}

static uint32_t arithmetic(uint32_t operation, uint32_t a, uint32_t b)
{
    switch (operation) {
    case BPF_ADD: return a + b;
    case BPF_SUB: return a - b;
    case BPF_MUL: return a * b;
    case BPF_DIV: return a / b;
    case BPF_AND: return a & b;
    case BPF_OR: return a | b;
    case BPF_XOR: return a ^ b;
    case BPF_LSH: return a << (b & 31);
    case BPF_RSH: return a >> (b & 31);
    default: return -a;                /* BPF_NEG */
    }
}

static bool jumps(uint32_t operation, uint32_t a, uint32_t b)
{
    switch (operation) {
    case BPF_JEQ: return a == b;
    case BPF_JGT: return a > b;
    case BPF_JGE: return a >= b;
    default: return a & b;             /* BPF_JSET */
    }
}

/* What the filter answers to one call. Jumps lead forward only, so it ends. */
static uint32_t answer(const struct sock_fprog *filter, const struct seccomp_data *data)
{
    uint32_t a = 0, x = 0, memory[BPF_MEMWORDS] = {0};
    for (uint64_t at = 0; at < filter->len; at++) {
        const struct sock_filter *step = &filter->filter[at];
        uint32_t operand = BPF_SRC(step->code) == BPF_X ? x : step->k, slot = step->k % BPF_MEMWORDS;
        uint32_t *loaded = BPF_CLASS(step->code) == BPF_LD ? &a : &x;
        switch (BPF_CLASS(step->code)) {
        case BPF_LD:
        case BPF_LDX:
            *loaded = BPF_MODE(step->code) == BPF_ABS ? load(data, step->k) : BPF_MODE(step->code) == BPF_LEN ? sizeof *data
                      : BPF_MODE(step->code) == BPF_MEM ? memory[slot] : step->k;
            break;
        case BPF_ST: memory[slot] = a; break;
        case BPF_STX: memory[slot] = x; break;
        case BPF_ALU:
            if (BPF_OP(step->code) == BPF_DIV && !operand)
                return SECCOMP_RET_KILL_THREAD;
            a = arithmetic(BPF_OP(step->code), a, operand);
            break;
        case BPF_JMP:
            at += BPF_OP(step->code) == BPF_JA ? step->k : jumps(BPF_OP(step->code), a, operand) ? step->jt : step->jf;
            break;
        case BPF_RET: return BPF_RVAL(step->code) == BPF_A ? a : step->k;
        default:
            if (BPF_MISCOP(step->code) == BPF_TAX)
                x = a;
            else
                a = x;
        }
    }
    return SECCOMP_RET_KILL_THREAD;
}

/* An error is not good enough: what reads and writes on a companion are other calls than on TCP. */
int sandbox_forbids(const struct sock_fprog *filter)
{
    if (is_no_pointer(filter) || is_no_pointer(filter->filter))
        return -1;                     /* the kernel will not take it: that is how programs ask whether there are filters */
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        struct seccomp_data data = {.nr = needed[i].number, .arch = ARCHITECTURE};
        for (size_t n = 0; n < sizeof needed->arguments / sizeof *needed->arguments; n++)
            data.args[n] = needed[i].arguments[n];
        uint32_t action = answer(filter, &data) & SECCOMP_RET_ACTION_FULL;
        if (action != SECCOMP_RET_ALLOW && action != SECCOMP_RET_LOG)
            return needed[i].number;
    }
    return -1;
}
