/* A host for native/engine.c alone: no hooks, its own idea of the facts and of the process's section. Prints what each
 * scenario saw, one line a fact; tests/behaviour/test_engine_*.py say what it should be.
 *   engine_host TABLE ENGINE SCENARIO [ARGUMENT...] */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "engine.h"
#include "fdtable.h"
#include "flows.h"
#include "reasons.h"
#include "real.h"
#include "stats.h"
#include "switch.h"
#include "trace.h"
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <locale.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <setjmp.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

_Thread_local int switch_guard;
static void *table;
static uint8_t engine_mode;
static _Atomic uint32_t engine_state, engine_reason, upcalls;

static int last_hidden;

int hidden_fd(int fd)
{
    int hidden = real.fcntl(fd, F_DUPFD_CLOEXEC, 900);
    real.close(fd);
    last_hidden = hidden;
    return hidden;
}

void hidden_close(int fd)
{
    real.close(fd);
}

void stats_engine(uint32_t state, uint32_t reason)
{
    engine_state = state;
    engine_reason = reason;
}

void stats_upcall(void)
{
    upcalls++;
}

uint8_t flows_engine(void)
{
    return engine_mode;
}

const struct process_facts *process_facts(void)
{
    static struct process_facts facts = {.exe = "/usr/bin/host", .name = "host", .arguments = "host\0--flag\0",
                                         .environment = "HOME=/root\0WORD=yes\0", .cgroups = "0::/\0"};
    facts.user = geteuid();
    return &facts;
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static double cpu_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static long memory_kib(const char *field)
{
    char line[128];
    long value = 0;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, field, strlen(field)))
            value = atol(line + strlen(field) + 1);
    if (file)
        fclose(file);
    return value;
}

static int threads(void)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks));)
        count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

/* A connect from an unbound socket to 127.0.0.1:port. */
static struct verdict ask(uint32_t function, uint16_t port)
{
    struct decision_request request = {.role = ROLE_CONNECT, .family = AF_INET, .function = function};
    struct verdict verdict = {.otherwise = OTHERWISE_TCP};
    request.rule = function == FUNCTION_NONE ? RULE_DEFAULT : function;
    request.remote = (struct endpoint){.ip = {[10] = 0xff, 0xff, 127, 0, 0, 1}, .port = port};
    errno = 4711;
    engine_ask(table, &request, &verdict);
    if (errno != 4711)
        printf("errno changed to %d\n", errno);
    return verdict;
}

static void show(const char *label, struct verdict verdict)
{
    printf("%s action=%u otherwise=%u providers=%u,%u reason=%u rule=%d remember=%u\n", label, verdict.action,
           verdict.otherwise, verdict.providers[0], verdict.providers[1], verdict.reason, (int)verdict.rule,
           verdict.remember_ms);
    fflush(stdout);
}

/* asks FUNCTION|- PORT [COUNT [PAUSE_MS]] */
static void asks(char **arguments, int count)
{
    uint32_t function = arguments[0][0] == '-' ? FUNCTION_NONE : (uint32_t)atoi(arguments[0]);
    int times = count > 2 ? atoi(arguments[2]) : 1, pause = count > 3 ? atoi(arguments[3]) : 0;
    for (int i = 0; i < times; i++) {
        double start = now_ms();
        struct verdict verdict = ask(function, (uint16_t)atoi(arguments[1]));
        printf("ms=%.3f ", now_ms() - start);
        show("verdict", verdict);
        if (pause)
            usleep((useconds_t)pause * 1000);
    }
}

/* cost [FUNCTION]: what the start costs, and an up-call: the best of ten rounds. */
static void cost(uint32_t function)
{
    long rss = memory_kib("Rss"), private = memory_kib("Private_Dirty");
    double start = now_ms(), cpu = cpu_ms();
    show("first", ask(function, 80));
    double middle = now_ms();
    printf("start_ms=%.2f cpu_ms=%.2f rss_kib=%ld private_kib=%ld threads=%d\n", middle - start, cpu_ms() - cpu,
           memory_kib("Rss") - rss, memory_kib("Private_Dirty") - private, threads());
    double best = 1e9;
    for (int round = 0; round < 10; round++) {
        start = now_ms();
        for (int i = 0; i < 1000; i++)
            ask(function, 80);
        if (now_ms() - start < best)
            best = now_ms() - start;
    }
    printf("upcall_us=%.2f\n", best);
}

/* quiet FUNCTION|- PORT COUNT GRACE_MS WATCH_MS: what the engine does with the CPU once the last of COUNT questions is
 * answered, after a grace. */
static void quiet(char **arguments)
{
    asks(arguments, 3);
    usleep((useconds_t)atoi(arguments[3]) * 1000);
    double cpu = cpu_ms();
    usleep((useconds_t)atoi(arguments[4]) * 1000);
    printf("burnt_ms=%.1f\n", cpu_ms() - cpu);
    show("after", ask(FUNCTION_NONE, 79));
}

static _Atomic int good, refused, bad;

/* 0: decided; 1: no engine since the fork, which is an answer too; 2: anything else. */
static int graded(struct verdict verdict)
{
    if (verdict.action == ACTION_SAN)
        return 0;
    return verdict.reason == REASON_ENGINE_FORKED ? 1 : 2;
}

static void *fork_many(void *argument)
{
    int count = *(int *)argument;
    for (int i = 0; i < count; i++) {
        pid_t child = fork();
        if (child == 0) {
            int rules = graded(ask(FUNCTION_NONE, 80)), function = graded(ask(0, 80));
            _exit(rules > function ? rules : function);
        }
        int status = -1;
        double deadline = now_ms() + 20000;
        pid_t ended;
        while ((ended = waitpid(child, &status, WNOHANG)) == 0 && now_ms() < deadline)
            usleep(500);
        if (ended != child) {
            kill(child, SIGKILL);
            waitpid(child, NULL, 0);
            printf("child hung\n");
            bad++;
        } else if (WIFEXITED(status) && WEXITSTATUS(status) < 2) {
            *(status ? &refused : &good) += 1;
        } else {
            bad++;
            printf("child status %x\n", status);
        }
    }
    return NULL;
}

static _Atomic bool stop;

static _Atomic long asked;

static void *ask_on(void *what)
{
    while (!stop) {
        if (strcmp(what, "function"))
            ask(FUNCTION_NONE, 80);
        if (strcmp(what, "rules"))
            ask(0, 80);
        asked++;
    }
    return NULL;
}

/* forks THREADS COUNT ASKERS rules|function|both: all threads fork while askers keep the engine busy. */
static void forks(char **arguments)
{
    int nforkers = atoi(arguments[0]), count = atoi(arguments[1]), naskers = atoi(arguments[2]);
    pthread_t forkers[64], askers[64];
    show("before", ask(0, 80));
    for (int i = 0; i < naskers; i++)
        pthread_create(&askers[i], NULL, ask_on, arguments[3]);
    for (int i = 0; i < nforkers; i++)
        pthread_create(&forkers[i], NULL, fork_many, &count);
    for (int i = 0; i < nforkers; i++)
        pthread_join(forkers[i], NULL);
    stop = true;
    for (int i = 0; i < naskers; i++)
        pthread_join(askers[i], NULL);
    printf("good=%d refused=%d bad=%d asked=%ld\n", good, refused, bad, asked);
}

/* forkslow: forks while a function sleeps. */
static void *ask_once(void *unused)
{
    (void)unused;
    show("slow", ask(0, 80));
    return NULL;
}

static void fork_slow(void)
{
    pthread_t thread;
    ask(1, 80);
    pthread_create(&thread, NULL, ask_once, NULL);
    usleep(20000);
    double start = now_ms();
    pid_t child = fork();
    if (child == 0) {
        show("child", ask(1, 80));
        fflush(stdout);
        _exit(0);
    }
    printf("fork_ms=%.1f\n", now_ms() - start);
    waitpid(child, NULL, 0);
    pthread_join(thread, NULL);
    show("parent", ask(1, 80));
}

/* spawns COUNT ASKERS: programs are started, by posix_spawn and by vfork, while askers keep the engine busy. */
static void spawns(char **arguments)
{
    int count = atoi(arguments[0]), naskers = atoi(arguments[1]), status;
    char *words[] = {"/bin/true", NULL};
    pthread_t askers[64];
    ask(0, 80);
    for (int i = 0; i < naskers; i++)
        pthread_create(&askers[i], NULL, ask_on, "both");
    for (int i = 0; i < count; i++) {
        pid_t child;
        if (i % 2) {
            if (posix_spawn(&child, words[0], NULL, NULL, words, environ))
                _exit(125);
        } else if (!(child = vfork())) {
            execv(words[0], words);
            _exit(125);
        }
        *(waitpid(child, &status, 0) == child && status == 0 ? &good : &bad) += 1;
    }
    stop = true;
    for (int i = 0; i < naskers; i++)
        pthread_join(askers[i], NULL);
    printf("good=%d bad=%d\n", good, bad);
    show("after", ask(0, 80));
}

/* A child that no fork handler saw, as libraries with a clone of their own make it. */
static void raw_fork(void)
{
    show("parent", ask(FUNCTION_NONE, 80));
    fflush(stdout);
    long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        show("raw", ask(FUNCTION_NONE, 80));
        show("raw", ask(0, 80));
        fflush(stdout);
        _exit(0);
    }
    waitpid((pid_t)child, NULL, 0);
    child = vfork();
    if (child == 0) {
        show("vfork", ask(FUNCTION_NONE, 80));
        show("vfork", ask(0, 80));
        _exit(0);
    }
    waitpid((pid_t)child, NULL, 0);
    show("parent", ask(FUNCTION_NONE, 80));
    show("parent", ask(0, 80));
}

static unsigned long inode_of(int fd)
{
    struct stat status = {0};
    fstat(fd, &status);
    return status.st_ino;
}

/* connections: whose the connection to the helper is. */
static void connections(void)
{
    int pair[2];
    char byte;
    show("first", ask(0, 81));
    int connection = last_hidden;
    unsigned long own = inode_of(connection);
    pid_t child = fork();
    if (child == 0) {
        struct verdict verdict = ask(0, 81);
        printf("inherited=%d\n", inode_of(last_hidden) == own);
        show("child", verdict);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) || real.dup2(pair[0], connection) != connection)
        _exit(125);
    show("closed", ask(0, 81));
    printf("leaked=%d\n", real.recv(pair[1], &byte, 1, MSG_DONTWAIT) >= 0);
}

static void on_signal(int number)
{
    (void)number;
    show("handler", ask(FUNCTION_NONE, 80));
}

static sigjmp_buf jump;

static void jump_away(int number)
{
    siglongjmp(jump, number);
}

static void alarm_in(int ms, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};
    struct itimerval timer = {.it_value = {.tv_usec = ms * 1000}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* reenter: a signal comes while function 0 sleeps, and its handler asks; or jumps away, more often than there are places
 * for questions. */
static void reenter(void)
{
    ask(1, 80);
    alarm_in(40, on_signal);
    show("outer", ask(0, 80));
    for (volatile int i = 0; i < 20; i++) {
        alarm_in(20, jump_away);
        if (sigsetjmp(jump, 1) == 0)
            show("never", ask(0, 80));
    }
    printf("guard=%d\n", switch_guard);
    /* The function that the last jump left may run for a while, and another may be queued behind it. */
    struct verdict rules;
    double deadline = now_ms() + 5000;
    do
        rules = ask(FUNCTION_NONE, 80);
    while (rules.reason == REASON_ENGINE_BUSY && now_ms() < deadline);
    show("after", rules);
    show("after", ask(1, 80));
}

static void describe(char *text, size_t size)
{
    struct stat status[3] = {0};
    struct sigaction action[3];
    sigset_t mask;
    char *set = setlocale(LC_ALL, NULL);
    const int numbers[3] = {SIGINT, SIGPIPE, SIGCHLD};
    size_t length = 0;
    for (int i = 0; i < 3; i++) {
        fstat(i, &status[i]);
        sigaction(numbers[i], NULL, &action[i]);
        length += (size_t)snprintf(text + length, size - length, "fd%d=%ld:%ld:%x sig%d=%p/%x ", i,
                                   (long)status[i].st_ino, (long)real.fcntl(i, F_GETFL, 0), status[i].st_mode,
                                   numbers[i], (void *)action[i].sa_handler, action[i].sa_flags & ~0x4000000);   /* libc's own */
    }
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    int fd = open("/dev/null", O_RDONLY);
    close(fd);
    char directory[256];
    length += (size_t)snprintf(text + length, size - length, "mask=%lx locale=%s mb=%zu next_fd=%d cwd=%s threads=%d env=",
                               *(unsigned long *)&mask, set, MB_CUR_MAX, fd, getcwd(directory, sizeof directory),
                               threads());
    for (char **each = environ; *each && length < size; each++)
        length += (size_t)snprintf(text + length, size - length, "%s;", *each);
}

/* untouched FUNCTION|- [HANDLER]: what the host would notice, before and after. */
static void untouched(char **arguments, int count)
{
    static char before[65536], after[65536];
    if (count > 1)
        signal(SIGINT, on_signal);
    describe(before, sizeof before);
    /* No rule asks a function for port 79. */
    show("verdict", arguments[0][0] == '-' ? ask(FUNCTION_NONE, 79) : ask((uint32_t)atoi(arguments[0]), 80));
    if (arguments[0][0] != '-')
        usleep(1300000);                 /* the function thread ends when idle */
    describe(after, sizeof after);
    printf("same=%d\n", !strcmp(before, after));
    if (strcmp(before, after))
        printf("before %s\nafter  %s\n", before, after);
}

static void *ask_small(void *unused)
{
    (void)unused;
    show("small", ask(FUNCTION_NONE, 80));
    return NULL;
}

static void small_stack(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 56 << 10);
    pthread_create(&thread, &attributes, ask_small, NULL);
    pthread_join(thread, NULL);
    show("large", ask(FUNCTION_NONE, 80));
}

/* Kills who starts threads or asks for CPUs, in every thread. */
static void sandbox(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_sched_getaffinity, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program))
        perror("seccomp");
}

static void *ask_at_once(void *barrier)
{
    pthread_barrier_wait(barrier);
    struct verdict rules = ask(FUNCTION_NONE, 80), function = ask(0, 80);
    if (rules.action == ACTION_SAN && function.action == ACTION_SAN)
        good++;
    else {
        show("rules", rules);
        show("function", function);
    }
    return NULL;
}

static void at_once(int count)
{
    pthread_t thread[64];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, (unsigned)count);
    for (int i = 0; i < count; i++)
        pthread_create(&thread[i], NULL, ask_at_once, &barrier);
    for (int i = 0; i < count; i++)
        pthread_join(thread[i], NULL);
    printf("good=%d\n", good);
}

/* late LIBPYTHON: the host loads the engine's own libpython and runs Python by the book, then ends it. */
static void late(const char *path)
{
    show("before", ask(0, 80));
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        _exit(125);
    void (*initialize)(int) = (void (*)(int))dlsym(library, "Py_InitializeEx");
    int (*ensure)(void) = (int (*)(void))dlsym(library, "PyGILState_Ensure");
    int (*run)(const char *) = (int (*)(const char *))dlsym(library, "PyRun_SimpleString");
    int (*finalize)(void) = (int (*)(void))dlsym(library, "Py_FinalizeEx");
    initialize(0);
    ensure();
    printf("python=%d", run("import json; assert json.loads('1') == 1"));
    printf(" end=%d\n", finalize());
    show("after", ask(0, 80));
    show("after", ask(FUNCTION_NONE, 80));
    pid_t child = fork();
    if (child == 0) {
        show("child", ask(FUNCTION_NONE, 80));
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

/* As flows.c does it: a table that was replaced stays mapped. */
static void load(const char *path)
{
    struct stat status;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &status))
        _exit(125);
    table = malloc((size_t)status.st_size);
    if (real.read(fd, table, (size_t)status.st_size) != status.st_size)
        _exit(125);
    close(fd);
}

int main(int argc, char **argv)
{
    const char *scenario = argv[3];
    char **arguments = argv + 4;
    int count = argc - 4;
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(100);
    load(argv[1]);
    engine_mode = (uint8_t)atoi(argv[2]);
    if (getenv("HOST_LOG"))
        trace_open(getenv("HOST_LOG"));
    pthread_atfork(engine_before_fork, engine_after_fork_parent, engine_after_fork_child);
    if (!strcmp(scenario, "asks"))
        asks(arguments, count);
    else if (!strcmp(scenario, "cost"))
        cost(count ? (uint32_t)atoi(arguments[0]) : FUNCTION_NONE);
    else if (!strcmp(scenario, "forks"))
        forks(arguments);
    else if (!strcmp(scenario, "late"))
        late(arguments[0]);
    else if (!strcmp(scenario, "spawns"))
        spawns(arguments);
    else if (!strcmp(scenario, "quiet"))
        quiet(arguments);
    else if (!strcmp(scenario, "fork-slow"))
        fork_slow();
    else if (!strcmp(scenario, "connections"))
        connections();
    else if (!strcmp(scenario, "raw-fork"))
        raw_fork();
    else if (!strcmp(scenario, "reenter"))
        reenter();
    else if (!strcmp(scenario, "untouched"))
        untouched(arguments, count);
    else if (!strcmp(scenario, "small-stack"))
        small_stack();
    else if (!strcmp(scenario, "at-once"))
        at_once(atoi(arguments[0]));
    else if (!strcmp(scenario, "sandbox") || !strcmp(scenario, "startup")) {
        if (scenario[1] == 't')
            engine_start(table);
        sandbox();
        asks(arguments, count);
    } else if (!strcmp(scenario, "python")) {
        if (!dlopen(arguments[0], RTLD_NOW | RTLD_GLOBAL))
            _exit(125);
        asks(arguments + 1, count - 1);
    } else if (!strcmp(scenario, "pause")) {
        /* Reads the table again and asks, once for each line on stdin. */
        char line[16];
        while (fgets(line, sizeof line, stdin)) {
            load(argv[1]);
            asks(arguments, count);
        }
    } else if (!strcmp(scenario, "leave-main")) {
        show("verdict", ask(0, 80));
        pthread_exit(NULL);              /* the process ends with its last thread */
    } else {
        return 2;
    }
    printf("engine=%u engine_reason=%u upcalls=%u\n", engine_state, engine_reason, upcalls);
    return 0;
}
