/* Owns what is true of the whole process: whether the switch is on, its facts, and the fork protocol. The constructor
 * runs before main and starts nothing; what may be wiped later (environment, arguments) is copied here. */
#include "lifecycle.h"
#include "engine.h"
#include "fdtable.h"
#include "firewall.h"
#include "flows.h"
#include "handover.h"
#include "netinfo.h"
#include "ports.h"
#include "provider_unix.h"
#include "private_epoll.h"
#include "real.h"
#include "sandbox.h"
#include "stats.h"
#include "switch.h"
#include "trace.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define FACTS_MAX (4 << 20)

extern char **environ;
bool lifecycle_active;
int32_t lifecycle_pid;
_Atomic bool lifecycle_moved;
_Thread_local int lifecycle_vfork;
_Thread_local int switch_guard;

static struct process_facts facts = {"", "", "", "", "", 0};
static _Atomic uint32_t forks;
static _Atomic uint32_t *alive;        /* a page that the kernel wipes in every child with memory of its own */

const struct process_facts *process_facts(void)
{
    return &facts;
}

uint32_t lifecycle_forks(void)
{
    return atomic_load(&forks);
}

bool lifecycle_borrowed(void)
{
    if (!lifecycle_vfork)
        return false;
    if (getpid() != lifecycle_pid)
        return true;
    lifecycle_vfork = 0;               /* the parent, after its child has gone on */
    return false;
}

static void before_fork(void)
{
    private_epoll_before_fork();
    atomic_fetch_add(&forks, 1);
    if (!sandbox_closed)               /* where nothing is decided any more */
        engine_before_fork();
    fdtable_before_fork();
}

static void after_fork_parent(void)
{
    fdtable_after_fork_parent();
    engine_after_fork_parent();
}

static void after_fork_child(void)
{
    int saved = errno;
    if (!sandbox_closed)
        lifecycle_pid = getpid();
    lifecycle_vfork = 0;
    if (alive)
        atomic_store(alive, 1);
    netinfo_after_fork_child();
    firewall_after_fork_child();
    ports_after_fork_child();
    provider_unix_after_fork_child();
    fdtable_after_fork_child();
    handover_after_fork_child();
    stats_after_fork_child();
    if (!sandbox_closed)
        engine_after_fork_child();
    errno = saved;
}

void lifecycle_check(void)
{
    if (alive && !atomic_load(alive)) {
        atomic_fetch_add(&forks, 1);
        after_fork_child();
    }
}

/* --- facts --- */

static char *place, *limit;

static const char *keep_file(const char *path, char separator)
{
    char *start = place;
    int fd = real.open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd >= 0) {
        ssize_t got;
        while (place < limit - 2 && (got = real.read(fd, place, (size_t)(limit - 2 - place))) > 0)
            place += got;
        real.close(fd);
    }
    for (char *at = start; separator && at < place; at++)
        if (*at == separator)
            *at = 0;
    *place++ = 0;
    *place++ = 0;
    return start;
}

/* "0::/user.slice" becomes "/user.slice". */
static void strip_hierarchies(char *list)
{
    char *to = list;
    for (char *line = list, *next; *line; line = next) {
        next = line + strlen(line) + 1;
        char *path = strchr(line, ':');
        path = path ? strchr(path + 1, ':') : NULL;
        path = path ? path + 1 : line;
        memmove(to, path, (size_t)(next - path));
        to += next - path;
    }
    to[0] = to[1] = 0;
}

static void keep_facts(void)
{
    size_t size = 64 << 10;
    for (char **each = environ; each && *each; each++)
        size += strlen(*each) + 1;
    if (size > FACTS_MAX)
        size = FACTS_MAX;
    place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED)
        return;
    limit = place + size;
    facts.exe = place;
    ssize_t length = readlink("/proc/self/exe", place, 4095);
    place += length > 0 ? length + 1 : 1;
    facts.name = keep_file("/proc/self/comm", '\n');
    facts.cgroups = keep_file("/proc/self/cgroup", '\n');
    strip_hierarchies((char *)facts.cgroups);
    facts.environment = place;
    for (char **each = environ; each && *each; each++) {
        size_t need = strlen(*each) + 1;
        if (need > (size_t)(limit - place) - (32 << 10))
            break;
        memcpy(place, *each, need);
        place += need;
    }
    *place++ = 0;
    *place++ = 0;
    facts.arguments = keep_file("/proc/self/cmdline", 0);
    char *to = (char *)facts.arguments;
    for (char *at = to, *end = place - 2; at < end; at++)
        if (*at || (to > facts.arguments && to[-1]))
            *to++ = *at;               /* an empty argument would end the list */
    to[0] = to[1] = 0;
    facts.user = geteuid();
}

static bool publish(int fd, struct sock *sock, void *context)
{
    (void)context;
    if (sock->role)
        switch_publish(fd, sock);
    return true;
}

static void publish_all(void)
{
    fdtable_each(0, ~0u, publish, NULL);
}

/* A shell under sanrun may start programs that sanrun itself would have left alone. musl's loader resolves our symbols in
 * its own library, so we get here; only root's loader preloads into privileged programs. */
extern const char *gnu_get_libc_version(void) __attribute__((weak));
extern int __register_atfork(void (*before)(void), void (*parent)(void), void (*child)(void), void *object)
    __attribute__((weak));

static bool left_alone(void)
{
    struct stat program;
    return !gnu_get_libc_version || getauxval(AT_SECURE) ||
           (stat("/proc/self/exe", &program) == 0 &&
            ((program.st_mode & S_ISUID) || (program.st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP))) ||
           getxattr("/proc/self/exe", "security.capability", NULL, 0) > 0;
}

__attribute__((constructor)) static void start(void)
{
    int saved = errno;
    real_resolve();
    lifecycle_pid = getpid();
    const char *word = getenv("INTERPOSER"), *table = getenv("INTERPOSER_TABLE"), *log = getenv("INTERPOSER_LOG");
    if (!(word && strcmp(word, "off") == 0) && table && *table == '/' && !left_alone()) {
        if (log && *log == '/')
            trace_open(log);
        keep_facts();
        if (getenv("INTERPOSER_REQUIRE"))
            flows_require();
        int error = flows_load(table, &facts);
        if (error)
            trace_log("policy table %s is unusable: reason %d", table, -error);
        alive = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (alive == MAP_FAILED || madvise(alive, 4096, MADV_WIPEONFORK) < 0)
            alive = NULL;
        else
            atomic_store(alive, 1);
        stats_on_new_page(publish_all);
        __register_atfork(before_fork, after_fork_parent, after_fork_child, NULL);
        lifecycle_active = true;
        if (flows_engine() == ENGINE_STARTUP)
            engine_start(flows_table());
        handover_start();              /* before the descriptor table grows, so that it looks at few numbers */
        hidden_prepare();
    }
    errno = saved;
}
