/* awkward_children PORT WAY: has a connection and a listener of its own, makes a child by WAY, which connects or runs
 * another program that does, and prints what carried what: before, in the child, in the parent afterwards on the
 * connection that it had, on a new one, and at its listener. `awkward_children PORT talk` is that other program. */
#include "awkward.h"
#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <stdbool.h>
#include <sys/mman.h>

#define PATIENCE 10
#define STACK (256 << 10)

extern char **environ;
static char *self, *port_word;
static int port, connection, listener;

static char *const *words(void)
{
    static char *list[4];
    list[0] = self;
    list[1] = port_word;
    list[2] = (char *)"talk";
    return list;
}

static void exec_self(void)
{
    execv("/proc/self/exe", words());
    _exit(77);
}

/* What libraries that start programs do in the child: everything but 0, 1 and 2 is closed, one number after another. */
static void close_all(void)
{
    for (int fd = 3; fd < 1024; fd++)
        close(fd);
}

static int child_execs(void *unused)
{
    (void)unused;
    exec_self();
    return 0;
}

static int child_closes_and_execs(void *unused)
{
    (void)unused;
    dup2(2, connection);
    close_all();
    exec_self();
    return 0;
}

static int child_closes_and_ends(void *unused)
{
    (void)unused;
    shutdown(-1, SHUT_RDWR);
    close(connection);
    close(listener);
    close_all();
    _exit('U');
}

static int child_talks(void *unused)
{
    (void)unused;
    _exit(talk(port));
}

static pid_t clone_child(int (*run)(void *), int flags)
{
    char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    return stack == MAP_FAILED ? -1 : clone(run, stack + STACK, flags | SIGCHLD, NULL);
}

static pid_t spawn(bool everything)
{
    posix_spawn_file_actions_t actions;
    pid_t pid;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addclose(&actions, listener);
    posix_spawn_file_actions_adddup2(&actions, connection, 9);
    posix_spawn_file_actions_adddup2(&actions, 2, connection);
    posix_spawn_file_actions_addopen(&actions, 11, "/dev/null", O_RDONLY, 0);
    if (everything)
        posix_spawn_file_actions_addclosefrom_np(&actions, 3);
    int error = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, words(), environ);
    posix_spawn_file_actions_destroy(&actions);
    return error ? -1 : pid;
}

static pid_t child_by(const char *way)
{
    pid_t pid;
    if (!strcmp(way, "vfork-exec")) {
        if ((pid = vfork()) == 0)
            exec_self();
        return pid;
    }
    if (!strcmp(way, "vfork-close-exec")) {
        if ((pid = vfork()) == 0)
            child_closes_and_execs(NULL);
        return pid;
    }
    if (!strcmp(way, "vfork-exit")) {
        if ((pid = vfork()) == 0)
            child_closes_and_ends(NULL);
        return pid;
    }
    if (!strcmp(way, "spawn") || !strcmp(way, "spawn-closefrom"))
        return spawn(way[5]);
    if (!strcmp(way, "clone-vfork-exec"))
        return clone_child(child_execs, CLONE_VM | CLONE_VFORK);
    if (!strcmp(way, "clone-vfork-close-exec"))
        return clone_child(child_closes_and_execs, CLONE_VM | CLONE_VFORK);
    if (!strcmp(way, "clone-vfork-exit"))
        return clone_child(child_closes_and_ends, CLONE_VM | CLONE_VFORK);
    if (!strcmp(way, "clone-vfork-talk"))
        return clone_child(child_talks, CLONE_VM | CLONE_VFORK);
    if (!strcmp(way, "clone-fork-talk"))
        return clone_child(child_talks, 0);
    if (!strcmp(way, "clone-fork-close-exec"))
        return clone_child(child_closes_and_execs, 0);
    return -1;
}

static char shown(int status)
{
    return status > ' ' && status < 127 ? (char)status : '!';
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    self = argv[0];
    port_word = argv[1];
    port = atoi(argv[1]);
    alarm(30);
    if (!strcmp(argv[2], "talk"))
        return talk(port);
    int own_port = 0;
    listener = listener_at(&own_port);
    connection = connect_to(INADDR_LOOPBACK, port);
    if (listener < 0 || connection < 0)
        return 3;
    SAY("before %c\n", carrier(connection));
    pid_t child = child_by(argv[2]);
    if (child < 0)
        return 4;
    int status = ended_within(child, PATIENCE);
    SAY("child %c %d\n", shown(status), status);
    struct sockaddr_in peer = {0};
    socklen_t length = sizeof peer;
    if (getpeername(connection, (struct sockaddr *)&peer, &length) < 0 || peer.sin_family != AF_INET ||
        ntohs(peer.sin_port) != port)
        SAY("peer lost: family %d, port %d\n", peer.sin_family, ntohs(peer.sin_port));
    SAY("connection %c\n", letter_from(connection) == carrier(connection) ? carrier(connection) : 'X');
    SAY("new %c\n", talk(port));
    /* The listener's client is a forked child: all of this is under the switch. */
    pid_t client = fork();
    if (client == 0)
        _exit(talk(own_port));
    struct pollfd wait = {listener, POLLIN, 0};
    char served = poll(&wait, 1, PATIENCE * 1000) == 1 ? serve_one(listener) : 'H';
    SAY("served %c\n", served);
    SAY("client %c\n", shown(ended_within(client, PATIENCE)));
    return 0;
}
