/* awkward_sandbox PORT WHAT HOW: confines itself to the system calls that a plain TCP program makes, so that anything
 * else would be noticed. WHAT: client (connects afterwards), connected (connects before), server (listens and accepts
 * afterwards), listening (listens before and accepts afterwards), accepted (accepts before); a server prints its port.
 * HOW: what befalls any other call: kill, errno (EPERM), trap (SIGSYS, with a handler that exits with 31); or strict, the
 * kernel's own mode of read, write and _exit; or syscall, as kill but installed through syscall(); or open, which allows
 * everything, and audit, which logs it; or probe, which only asks for filters. Exits with the letter of what carried the
 * connection. */
#include "awkward.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/prctl.h>

#define ALLOW(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static void on_sigsys(int number)
{
    (void)number;
    past_libc(SYS_exit_group, 31, 0, 0, 0, 0);
}

static void confine(const char *how)
{
    uint32_t action = !strcmp(how, "errno") ? SECCOMP_RET_ERRNO | EPERM : !strcmp(how, "trap") ? SECCOMP_RET_TRAP
                                                                                               : SECCOMP_RET_KILL_PROCESS;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(SYS_read), ALLOW(SYS_write), ALLOW(SYS_close), ALLOW(SYS_connect), ALLOW(SYS_accept), ALLOW(SYS_bind),
        ALLOW(SYS_listen), ALLOW(SYS_getsockname), ALLOW(SYS_exit_group), ALLOW(SYS_rt_sigreturn), ALLOW(SYS_poll),
        ALLOW(SYS_getsockopt),
        /* socket(AF_INET, ...) only */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, action),
    };
    if (!strcmp(how, "open") || !strcmp(how, "audit"))   /* the first answer is that of all */
        filter[0] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, how[0] == 'o' ? SECCOMP_RET_ALLOW : SECCOMP_RET_LOG);
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    struct sigaction sigsys = {.sa_handler = on_sigsys};
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
        confine(how);
        for (int i = 0; i < 3; i++)
            letter = talk(port);
        leave(how, letter);
    }
    if (!strcmp(what, "connected")) {
        fd = connect_to(INADDR_LOOPBACK, port);
        confine(how);
        letter = letter_from(fd);
        leave(how, letter == letter_from(fd) ? 'X' : letter);
    }
    if (strcmp(what, "server"))
        listener = listener_at(&own_port);
    if (!strcmp(what, "accepted")) {
        SAY("%d\n", own_port);
        fd = accept(listener, NULL, NULL);
        letter = carrier(fd);
        confine(how);
    } else {
        confine(how);
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
