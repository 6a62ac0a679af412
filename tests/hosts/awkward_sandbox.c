/* awkward_sandbox PORT WHAT HOW: confines itself to the system calls that a plain TCP program makes, so that anything
 * else would be noticed. WHAT: client (connects afterwards), connected (connects before), server (listens and accepts
 * afterwards), listening (listens before and accepts afterwards), accepted (accepts before); a server prints its port; forked (connects before, and a child
 * reads); watched (connects and shuts its reading side before, and registers it with an epoll).
 * HOW: what befalls any other call: kill, errno (EPERM), trap (SIGSYS, with a handler that exits with 31); or strict, the
 * kernel's own mode of read, write and _exit; or syscall, as kill but installed through syscall(); or open, which allows
 * everything, and audit, which logs it; or exact, which kills, and allows beside a TCP program's
 * calls those that the switch says it needs; or probe, which only asks for filters. Exits with the letter of what carried the
 * connection. */
#include "awkward.h"
#include "../../interposer/native/sandbox.c"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

static void on_sigsys(int number)
{
    (void)number;
    past_libc(SYS_exit_group, 31, 0, 0, 0, 0);
}

#define FILTER_MAX 200

static struct sock_filter filter[FILTER_MAX];
static unsigned short length;

static void add(struct sock_filter step)
{
    if (length < FILTER_MAX)
        filter[length++] = step;
}

static void allow(int number)
{
    add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)number, 0, 1));
    add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
}

static void make_filter(const char *what, const char *how)
{
    static const int own[] = {SYS_read, SYS_write, SYS_close, SYS_connect, SYS_accept, SYS_bind, SYS_listen, SYS_getsockname,
                              SYS_exit_group, SYS_rt_sigreturn, SYS_poll, SYS_getsockopt};
    uint32_t action = !strcmp(how, "errno")  ? SECCOMP_RET_ERRNO | EPERM
                      : !strcmp(how, "trap") ? SECCOMP_RET_TRAP
                                             : SECCOMP_RET_KILL_PROCESS;
    static const int of_fork[] = {SYS_clone, SYS_wait4, SYS_set_robust_list, SYS_rseq, SYS_rt_sigprocmask};
    bool exact = !strcmp(how, "exact"), forks = !strcmp(what, "forked");
    if (!strcmp(how, "open") || !strcmp(how, "audit"))
        add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, how[0] == 'o' ? SECCOMP_RET_ALLOW : SECCOMP_RET_LOG));
    add((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)));
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        allow(own[i]);
    if (!strcmp(what, "watched"))
        allow(SYS_epoll_ctl);
    for (size_t i = 0; forks && i < sizeof of_fork / sizeof *of_fork; i++)
        allow(of_fork[i]);
    for (size_t i = 0; exact && i < sizeof needed / sizeof *needed; i++)
        allow(needed[i].number);
    /* socket(AF_INET, ...) only */
    add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 3));
    add((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])));
    add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 0, 1));
    add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action));
}

static void confine(const char *what, const char *how)
{
    struct sigaction sigsys = {.sa_handler = on_sigsys};
    make_filter(what, how);
    struct sock_fprog program = {length, filter};
    sigaction(SIGSYS, &sigsys, NULL);
    int failed = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (!failed && !strcmp(how, "strict"))
        failed = prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
    else if (!failed && !strcmp(how, "probe"))
        failed = prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, NULL) == 0;
    else if (!failed && !strcmp(how, "syscall"))
        failed = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
    else if (!failed)
        failed = prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
    if (failed)
        past_libc(SYS_exit, 98, 0, 0, 0, 0);
}

static void leave(const char *how, int status)
{
    past_libc(strcmp(how, "strict") ? SYS_exit_group : SYS_exit, status, 0, 0, 0, 0);
}

int main(int argc, char **argv)
{
    int port = argc > 3 ? atoi(argv[1]) : 0, own_port = 0, listener = -1, fd = -1;
    const char *what = argv[2], *how = argv[3];
    char letter;
    alarm(30);
    if (!strcmp(what, "client")) {
        confine(what, how);
        for (int i = 0; i < 3; i++)
            letter = talk(port);
        leave(how, letter);
    }
    if (!strcmp(what, "connected")) {
        fd = connect_to(INADDR_LOOPBACK, port);
        confine(what, how);
        letter = letter_from(fd);
        leave(how, letter == letter_from(fd) ? 'X' : letter);
    }
    if (!strcmp(what, "watched")) {
        struct epoll_event event = {.events = EPOLLIN};
        int epfd = epoll_create1(0);
        fd = connect_to(INADDR_LOOPBACK, port);
        letter = letter_from(fd);
        if (epfd < 0 || shutdown(fd, SHUT_RD) < 0)
            return 97;
        confine(what, how);
        leave(how, epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) < 0 ? 96 : letter);
    }
    if (!strcmp(what, "forked")) {
        int status;
        fd = connect_to(INADDR_LOOPBACK, port);
        confine(what, how);
        if (fork() == 0) {
            letter = letter_from(fd);
            close(fd);
            leave(how, letter);
        }
        if (wait4(-1, &status, 0, NULL) < 0)
            leave(how, 97);
        leave(how, WIFEXITED(status) ? WEXITSTATUS(status) : 96);
    }
    if (strcmp(what, "server"))
        listener = listener_at(&own_port);
    if (!strcmp(what, "accepted")) {
        SAY("%d\n", own_port);
        fd = accept(listener, NULL, NULL);
        letter = carrier(fd);
        confine(what, how);
    } else {
        confine(what, how);
        if (listener < 0)
            listener = listener_at(&own_port);
        SAY("%d\n", own_port);
        fd = accept(listener, NULL, NULL);
        letter = carrier(fd);
    }
    if (write(fd, &letter, 1) != 1)
        letter = '-';
    leave(how, letter);
}
