/* Makes each socket call COUNT times on TCP connections of its own, so that somebody outside can count what one costs.
 *   bench_calls instructions COUNT    to be run under callgrind --collect-atstart=no: one dump for each call
 *   bench_calls trace COUNT           to be run under:
 *   bench_calls counter PROGRAM...    counts PROGRAM's system calls within each call: prints CALL NUMBER TIMES
 * The first two say whether the switch is there: "interposed 0" or "interposed 1". */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <linux/ptrace.h>
#include <unistd.h>
#include <valgrind/callgrind.h>

#define WARM 8                         /* first calls resolve names and map memory */
#define MARK 0x6000                    /* system calls that do not exist tell the counter where it is */
#define MARK_END 0x6fff

static int listener, client, server, fresh, epfd, pipe_ends[2];
static struct sockaddr_in at;
static char buffer[64];
static long result;
static struct iovec vector = {buffer, 8};
static struct msghdr message;
static struct sockaddr_in seen;
static socklen_t seen_length;
static int option, spare = -1;

static void need(bool good, const char *what)
{
    if (!good) {
        perror(what);
        exit(2);
    }
}

static int tcp_socket(void)
{
    return socket(AF_INET, SOCK_STREAM, 0);
}

static void nothing(void) {}

/* --- made ready before a call, and undone after it --- */

static void fill_server(void)
{
    need(send(client, buffer, 8, 0) == 8, "send");
}

static void drain_server(void)
{
    need(recv(server, buffer, sizeof buffer, 0) == 8, "recv");
}

static void fill_pipe(void)
{
    result = write(pipe_ends[1], buffer, 8);
}

static void drain_pipe(void)
{
    result = read(pipe_ends[0], buffer, 8);
}

static void make_fresh(void)
{
    need((fresh = tcp_socket()) >= 0, "socket");
}

static void make_bound(void)
{
    struct sockaddr_in own = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    make_fresh();
    need(bind(fresh, (struct sockaddr *)&own, sizeof own) == 0, "bind");
}

static void close_fresh(void)
{
    close(fresh);
}

static void make_connected(void)
{
    make_fresh();
    need(connect(fresh, (struct sockaddr *)&at, sizeof at) == 0, "connect");
}

static void take_connection(void)
{
    need((spare = accept(listener, NULL, NULL)) >= 0, "accept");
    close(spare);
    close(fresh);
}

static void end_connection(void)
{
    close(spare);
    close(fresh);
}

static void make_pair(void)
{
    make_connected();
    need((spare = accept(listener, NULL, NULL)) >= 0, "accept");
}

static void close_spare(void)
{
    close(spare);
}

static void make_spare(void)
{
    spare = dup(client);
}

static void name_room(void)
{
    seen_length = sizeof seen;
}

static void leave_epoll(void)
{
    epoll_ctl(epfd, EPOLL_CTL_DEL, server, NULL);
}

static void enter_epoll(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(epfd, EPOLL_CTL_ADD, server, &event);
}

/* --- the calls --- */

static void call_socket(void)
{
    fresh = tcp_socket();
}

static void call_bind(void)
{
    static const struct sockaddr_in own = {AF_INET, 0, {0}, {0}};
    result = bind(fresh, (const struct sockaddr *)&own, sizeof own);
}

static void call_listen(void)
{
    result = listen(fresh, 8);
}

static void call_connect(void)
{
    result = connect(fresh, (struct sockaddr *)&at, sizeof at);
}

static void call_accept(void)
{
    spare = accept(listener, NULL, NULL);
}

static void call_accept4(void)
{
    seen_length = sizeof seen;
    spare = accept4(listener, (struct sockaddr *)&seen, &seen_length, SOCK_CLOEXEC);
}

static void call_read(void)
{
    result = read(server, buffer, 8);
}

static void call_readv(void)
{
    result = readv(server, &vector, 1);
}

static void call_recv(void)
{
    result = recv(server, buffer, 8, 0);
}

static void call_recvfrom(void)
{
    result = recvfrom(server, buffer, 8, 0, NULL, NULL);
}

static void call_recvmsg(void)
{
    message = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
    result = recvmsg(server, &message, 0);
}

static void call_write(void)
{
    result = write(client, buffer, 8);
}

static void call_writev(void)
{
    result = writev(client, &vector, 1);
}

static void call_send(void)
{
    result = send(client, buffer, 8, MSG_NOSIGNAL);
}

static void call_sendto(void)
{
    result = sendto(client, buffer, 8, 0, NULL, 0);
}

static void call_sendmsg(void)
{
    message = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
    result = sendmsg(client, &message, 0);
}

static void call_poll(void)
{
    struct pollfd wait = {server, POLLIN, 0};
    result = poll(&wait, 1, 0);
}

static void call_ppoll(void)
{
    struct pollfd wait = {server, POLLIN, 0};
    struct timespec now = {0};
    result = ppoll(&wait, 1, &now, NULL);
}

static void call_select(void)
{
    struct timeval now = {0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(server, &set);
    result = select(server + 1, &set, NULL, NULL, &now);
}

static void call_epoll_wait(void)
{
    struct epoll_event event;
    result = epoll_wait(epfd, &event, 1, 0);
}

static void call_epoll_ctl(void)
{
    enter_epoll();
}

static void call_getsockname(void)
{
    result = getsockname(client, (struct sockaddr *)&seen, &seen_length);
}

static void call_getpeername(void)
{
    result = getpeername(client, (struct sockaddr *)&seen, &seen_length);
}

static void call_setsockopt(void)
{
    option = 1;
    result = setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &option, sizeof option);
}

static void call_getsockopt(void)
{
    socklen_t length = sizeof option;
    result = getsockopt(client, IPPROTO_TCP, TCP_NODELAY, &option, &length);
}

static void call_fcntl(void)
{
    result = fcntl(client, F_GETFL);
}

static void call_ioctl(void)
{
    result = ioctl(client, FIONREAD, &option);
}

static void call_dup(void)
{
    spare = dup(client);
}

static void call_shutdown(void)
{
    result = shutdown(fresh, SHUT_WR);
}

static const struct operation {
    const char *name;
    void (*before)(void);
    void (*call)(void);
    void (*after)(void);
} operations[] = {
    {"nothing", nothing, nothing, nothing},   /* what counting itself costs */
    {"read", fill_server, call_read, nothing},
    {"readv", fill_server, call_readv, nothing},
    {"recv", fill_server, call_recv, nothing},
    {"recvfrom", fill_server, call_recvfrom, nothing},
    {"recvmsg", fill_server, call_recvmsg, nothing},
    {"write", nothing, call_write, drain_server},
    {"writev", nothing, call_writev, drain_server},
    {"send", nothing, call_send, drain_server},
    {"sendto", nothing, call_sendto, drain_server},
    {"sendmsg", nothing, call_sendmsg, drain_server},
    {"poll", fill_server, call_poll, drain_server},
    {"ppoll", fill_server, call_ppoll, drain_server},
    {"select", fill_server, call_select, drain_server},
    {"epoll_wait", fill_server, call_epoll_wait, drain_server},
    {"epoll_ctl", leave_epoll, call_epoll_ctl, nothing},
    {"socket", nothing, call_socket, close_fresh},
    {"bind", make_fresh, call_bind, close_fresh},
    {"listen", make_bound, call_listen, close_fresh},
    {"connect", make_fresh, call_connect, take_connection},
    {"accept", make_connected, call_accept, end_connection},
    {"accept4", make_connected, call_accept4, end_connection},
    {"close", make_pair, close_fresh, close_spare},
    {"shutdown", make_pair, call_shutdown, end_connection},
    {"getsockname", name_room, call_getsockname, nothing},
    {"getpeername", name_room, call_getpeername, nothing},
    {"setsockopt", nothing, call_setsockopt, nothing},
    {"getsockopt", nothing, call_getsockopt, nothing},
    {"fcntl", nothing, call_fcntl, nothing},
    {"ioctl", nothing, call_ioctl, nothing},
    {"dup", nothing, call_dup, close_spare},
    {"close-dup", make_spare, close_spare, nothing},
    {"read-pipe", fill_pipe, drain_pipe, nothing},
    {"write-pipe", nothing, fill_pipe, drain_pipe},
};
#define OPERATIONS (sizeof operations / sizeof *operations)

static void arrange(void)
{
    socklen_t length = sizeof at;
    at = (struct sockaddr_in){AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    need((listener = tcp_socket()) >= 0, "socket");
    need(bind(listener, (struct sockaddr *)&at, sizeof at) == 0, "bind");
    need(listen(listener, 64) == 0, "listen");
    need(getsockname(listener, (struct sockaddr *)&at, &length) == 0, "getsockname");
    make_connected();
    client = fresh;
    need((server = accept(listener, NULL, NULL)) >= 0, "accept");
    need((epfd = epoll_create1(EPOLL_CLOEXEC)) >= 0 && pipe(pipe_ends) == 0, "epoll, pipe");
    enter_epoll();
}

/* An instruction, because libc's syscall() is one of the calls that the switch hooks. */
static void mark(long number)
{
#if defined __x86_64__
    __asm__ volatile("syscall" : "+a"(number) : : "rcx", "r11", "memory");
#elif defined __aarch64__
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = 0;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8) : "memory");
#endif
}

static bool interposed(void)
{
    char line[4096];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "r");
    need(maps, "/proc/self/maps");
    while (fgets(line, sizeof line, maps))
        found |= strstr(line, "/libinterposer.so") != NULL;
    fclose(maps);
    return found;
}

static int run(bool counted_outside, int count)
{
    printf("interposed %d\n", interposed());
    fflush(stdout);
    arrange();
    for (size_t i = 0; i < OPERATIONS; i++) {
        const struct operation *each = &operations[i];
        for (int n = -WARM; n < count; n++) {
            each->before();
            if (n < 0) {
                each->call();
            } else if (counted_outside) {
                mark(MARK + (long)i);
                each->call();
                mark(MARK_END);
            } else {
                CALLGRIND_TOGGLE_COLLECT;
                each->call();
                CALLGRIND_TOGGLE_COLLECT;
            }
            need(result >= 0 && spare >= -1 && fresh >= 0, each->name);
            each->after();
        }
        if (!counted_outside)
            CALLGRIND_DUMP_STATS_AT(each->name);
    }
    return 0;
}

static int counter(char **program)
{
    static unsigned counts[OPERATIONS][512];
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        execv(program[0], program);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        return 1;
    ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL);
    long at_operation = -1;
    for (;;) {
        ptrace(PTRACE_SYSCALL, child, 0, 0);
        if (waitpid(child, &status, 0) < 0 || !WIFSTOPPED(status))
            break;
        struct __ptrace_syscall_info info;
        if (WSTOPSIG(status) != (SIGTRAP | 0x80) || ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof info, &info) <= 0 ||
            info.op != PTRACE_SYSCALL_INFO_ENTRY)
            continue;
        if (info.entry.nr >= MARK && info.entry.nr <= MARK_END)
            at_operation = info.entry.nr == MARK_END ? -1 : (long)info.entry.nr - MARK;
        else if (at_operation >= 0 && at_operation < (long)OPERATIONS && info.entry.nr < 512)
            counts[at_operation][info.entry.nr]++;
    }
    for (size_t i = 0; i < OPERATIONS; i++)
        for (int number = 0; number < 512; number++)
            if (counts[i][number])
                printf("%s %d %u\n", operations[i].name, number, counts[i][number]);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    if (strcmp(what, "counter") == 0)
        return counter(argv + 2);
    if (strcmp(what, "trace") == 0 || strcmp(what, "instructions") == 0)
        return run(what[0] == 't', atoi(argv[2]));
    return 64;
}
