/* Owns the embedded policy engine: whether this process may have one, its start, the one thread that runs users'
 * functions, and the fork protocol. Two locks: `admin` (start, that thread's life) is taken before `upcall` (whoever is
 * in Python holds it); waits for both are bounded. Questions to the function thread travel without a lock. A signal
 * handler that comes in while its thread asks is answered TCP. Python itself is behind engine_module.h: nothing here
 * needs its headers, and nothing is loaded before the first ask. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "engine.h"
#include "clock.h"
#include "engine_module.h"
#include "flows.h"
#include "helper.h"
#include "reasons.h"
#include "stats.h"
#include "switch.h"
#include "trace.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* musl has neither: lifecycle.c keeps the switch off there, but the library must load. */
#pragma weak pthread_mutex_clocklock
#pragma weak __libc_stack_end

#define STACK_NEEDED (64u << 10)
#define MEMORY_NEEDED (32u << 20)
#define START_STACK (1u << 20)
#define FUNCTION_STACK (2u << 20)
#define START_MS 5000
#define ADMIN_MS 1000
#define UPCALL_MS 100
#define FORK_MS 50
#define IMPORT_MS 1000
#define HELPER_SLACK_MS 250
#define IDLE_MS 1000
#define INTERRUPT_STACK (256u << 10)
#define TIMEOUTS_ALLOWED 3
#ifndef SPIN_NS
#define SPIN_NS 100000u
#endif
#define TASKS 16
#define PREPARED 256

enum state { NOT_STARTED, STARTING, READY, REFUSED };
enum task_state { TASK_FREE, TASK_CLAIMED, TASK_QUEUED, TASK_RUNNING, TASK_DONE, TASK_ABANDONED };
enum fork_mode { FORK_NONE, FORK_UNPROTECTED, FORK_LOCKED, FORK_PYTHON };

/* One call of a user's function on its way to the function thread. Memory of the process, not of the caller's stack:
 * the caller may be gone when the function returns. */
struct task {
    _Atomic uint32_t state;            /* enum task_state, and a futex */
    _Atomic bool asleep;               /* the asker waits on that futex */
    bool prepare;
    uint32_t ticket;
    uint64_t queued, done;             /* ns of the monotonic clock; done: where the asker was asleep */
    uint64_t generation;
    struct decision_request request;
    struct sock_option options[SOCK_OPTIONS];
    struct verdict verdict;
    uint16_t reason;
};

static pthread_mutex_t admin = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t upcall = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint32_t state;         /* enum state */
static uint16_t refusal;               /* reason number, in REFUSED */
static const struct engine_module *module;
static _Atomic uint64_t configured;    /* generation of the table that Python has */
static pid_t own_pid;
static _Atomic bool fork_waits;        /* for upcall, with admin held */
static _Atomic uint32_t forks;         /* a waiting frame that a fork carried into a child knows by this */

static _Atomic bool thread_alive;      /* written under admin */
static _Atomic bool thread_stays;      /* engine = "startup": and makes no call that a sandbox might not know */
static _Atomic bool thread_asleep;     /* waits on `work` */
static _Atomic uint32_t work;          /* futex: counts queued tasks */
static _Atomic uint32_t tickets, timeouts;
static _Atomic bool import_late;       /* a module's import has used up its time once */
static _Atomic bool interrupting;      /* a thread is about to interrupt a function; begins under admin */
static struct task tasks[TASKS];
static _Atomic uint64_t prepared[PREPARED / 64];

/* Where the outermost engine_ask of this thread stands on the stack, or 0. */
static _Thread_local uintptr_t asking;
static _Thread_local struct task *waiting;
static _Thread_local bool function_thread;
static _Thread_local enum fork_mode fork_mode;
static _Thread_local int fork_depth;   /* a signal handler may fork in the middle of a fork */
static _Thread_local uintptr_t stack_low, stack_high;

__attribute__((constructor)) static void remember_pid(void)
{
    own_pid = getpid();
}

static const struct table_header *header_of(const void *table)
{
    return table;
}

static const char *table_string(const void *table, uint32_t offset)
{
    return (const char *)table + header_of(table)->strings + offset;
}

static struct timespec after_ms(uint32_t ms)
{
    struct timespec when;
    clock_gettime(CLOCK_MONOTONIC, &when);
    when.tv_sec += ms / 1000;
    when.tv_nsec += (long)(ms % 1000) * 1000000;
    if (when.tv_nsec >= 1000000000) {
        when.tv_sec++;
        when.tv_nsec -= 1000000000;
    }
    return when;
}

static bool passed(const struct timespec *deadline)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec > deadline->tv_sec || (now.tv_sec == deadline->tv_sec && now.tv_nsec >= deadline->tv_nsec);
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value, const struct timespec *deadline)
{
    real.syscall(SYS_futex, (long)word, FUTEX_WAIT_BITSET_PRIVATE, value, (long)deadline, 0, FUTEX_BITSET_MATCH_ANY);
}

static void futex_wake(_Atomic uint32_t *word)
{
    real.syscall(SYS_futex, (long)word, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
}

/* --- spinning ------------------------------------------------------------------------------------------------------ */

/* To sleep and be woken costs 5 us on one CPU and 50 us across two, a function often 2. So who waits spins first, for as
 * long as it paid lately: the budget is doubled when what was waited for came in that time, halved when it did not, and
 * whole again when it came so soon after that a whole one would have caught it. One asker spins at a time, and nobody
 * with one CPU. */
static _Atomic uint32_t asker_budget = SPIN_NS, thread_budget = SPIN_NS;
static _Atomic bool alone = true;      /* one CPU for us; known when the function thread starts */
static _Atomic uint64_t asker_until;   /* when the asker that spins will have given up */

static uint64_t now_ns(void)
{
    return (uint64_t)clock_ns(CLOCK_MONOTONIC);
}

static void relax(void)
{
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

/* Whoever may change the allowed CPUs does so seldom. */
static void count_cpus(uint64_t now)
{
    static uint64_t counted;           /* the function thread's, or under admin while there is none */
    cpu_set_t allowed;
    if (counted && now - counted < 1000000000u)
        return;
    counted = now;
    atomic_store(&alone, sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) < 2);
}

/* Whether the word became `wanted`, or with `other` anything else than that. */
static bool spin(_Atomic uint32_t *word, uint32_t wanted, bool other, _Atomic uint32_t *budget)
{
    uint32_t ns = atomic_load_explicit(budget, memory_order_relaxed);
    if (!ns || atomic_load_explicit(&alone, memory_order_relaxed))
        return false;
    uint64_t until = now_ns() + ns;
    for (unsigned turn = 1;; turn++) {
        if ((atomic_load_explicit(word, memory_order_acquire) == wanted) != other) {
            atomic_store_explicit(budget, ns < SPIN_NS / 2 ? ns * 2 : SPIN_NS, memory_order_relaxed);
            return true;
        }
        relax();
        if (turn % 8 == 0 && now_ns() >= until)
            break;
    }
    atomic_store_explicit(budget, ns > 1000 ? ns / 2 : 0, memory_order_relaxed);
    return false;
}

static bool spin_for_answer(_Atomic uint32_t *word, uint32_t wanted)
{
    uint64_t now = now_ns(), until = atomic_load(&asker_until);
    if (until > now || !atomic_compare_exchange_strong(&asker_until, &until, now + SPIN_NS))
        return false;
    bool came = spin(word, wanted, false, &asker_budget);
    atomic_store(&asker_until, 0);
    return came;
}

static void came_after(uint64_t ns, _Atomic uint32_t *budget)
{
    if (ns && ns < SPIN_NS)
        atomic_store_explicit(budget, SPIN_NS, memory_order_relaxed);
}

/* A handler that leaves by longjmp must not take a lock with it, so signals stay out while one is held. */
static bool lock(pthread_mutex_t *mutex, uint32_t ms, sigset_t *mask)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, mask);
    if (!pthread_mutex_trylock(mutex))
        return true;
    struct timespec deadline = after_ms(ms);
    if (ms && !pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &deadline))
        return true;
    pthread_sigmask(SIG_SETMASK, mask, NULL);
    return false;
}

static void unlock(pthread_mutex_t *mutex, const sigset_t *mask)
{
    pthread_mutex_unlock(mutex);
    pthread_sigmask(SIG_SETMASK, mask, NULL);
}

/* Threads that ask without a pause hardly leave the mutex to one that waits for it, and a fork waits 50 ms. */
static void let_fork_pass(void)
{
    sigset_t mask;
    if (atomic_load_explicit(&fork_waits, memory_order_relaxed) && lock(&admin, FORK_MS, &mask))
        unlock(&admin, &mask);
}

static int start_thread(pthread_t *thread, size_t stack, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, mask;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack);
    pthread_sigmask(SIG_BLOCK, &all, &mask);
    int result = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    pthread_attr_destroy(&attributes);
    return result;
}

/* --- may this process have an engine ------------------------------------------------------------------------------- */

static int names_libpython(struct dl_phdr_info *object, size_t size, void *unused)
{
    (void)size, (void)unused;
    return object->dlpi_name && strstr(object->dlpi_name, "/libpython") != NULL;
}

static bool python_host(void)
{
    bool found = dlsym(RTLD_DEFAULT, "Py_IsInitialized") || dl_iterate_phdr(names_libpython, NULL);
    dlerror();                         /* what was not found is no error of the program's */
    return found;
}

static size_t read_some(const char *path, char *buffer, size_t size)
{
    size_t length = 0;
    int fd = real.open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return 0;
    for (ssize_t got; length < size - 1 && (got = real.read(fd, buffer + length, size - 1 - length)) > 0;)
        length += (size_t)got;
    real.close(fd);
    buffer[length] = '\0';
    return length;
}

static bool sandboxed(void)
{
    char status[4096];
    if (!read_some("/proc/thread-self/status", status, sizeof status))
        return false;
    const char *line = strstr(status, "\nSeccomp:");
    return line && atoi(line + sizeof "\nSeccomp:" - 1) != 0;
}

extern void *__libc_stack_end;

/* Finds the mapping that `here` lies in. A thread's stack, a coroutine's and a signal stack are one mapping each; the
 * main thread's grows down to its limit. */
static void find_stack(uintptr_t here)
{
    char buffer[1024];
    size_t have = 0;
    int fd = real.open("/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
    stack_low = stack_high = 0;
    if (fd < 0)
        return;
    for (ssize_t got; (got = real.read(fd, buffer + have, sizeof buffer - 1 - have)) > 0;) {
        char *line = buffer, *end;
        have += (size_t)got;
        buffer[have] = '\0';
        for (; (end = strchr(line, '\n')); line = end + 1) {
            char *rest;
            *end = '\0';
            uintptr_t low = strtoul(line, &rest, 16), high = strtoul(rest + 1, NULL, 16);
            if (here < low || here >= high)
                continue;
            struct rlimit limit;
            if ((uintptr_t)__libc_stack_end >= low && (uintptr_t)__libc_stack_end <= high && !getrlimit(RLIMIT_STACK, &limit)) {
                size_t size = limit.rlim_cur < (64u << 20) ? (size_t)limit.rlim_cur : 64u << 20;
                if (high - size < low)
                    low = high - size;
            }
            stack_low = low;
            stack_high = high;
            real.close(fd);
            return;
        }
        have = (size_t)(buffer + have - line);
        if (have == sizeof buffer - 1)
            have = 0;                  /* a line longer than the buffer: the end of a path, of no interest */
        memmove(buffer, line, have);
    }
    real.close(fd);
}

static bool stack_is_small(void)
{
    uintptr_t here = (uintptr_t)__builtin_frame_address(0);
    if (here < stack_low || here >= stack_high)
        find_stack(here);
    return stack_high && here - stack_low < STACK_NEEDED;
}

/* --- start --------------------------------------------------------------------------------------------------------- */

struct start {
    _Atomic uint32_t done;             /* futex: 0, or 1 + the reason */
    _Atomic uint32_t given_up;
    size_t size;
    char table[];                      /* a copy: the asker does not wait for ever */
};

/* libpython's read-only data serve its start: relocations for the loader, frozen modules. What is used again comes back
 * from the page cache. */
static int give_back_pages(struct dl_phdr_info *object, size_t size, void *libpython)
{
    (void)size;
    if (!object->dlpi_name || strcmp(object->dlpi_name, libpython))
        return 0;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[i];
        uintptr_t first = (object->dlpi_addr + segment->p_vaddr + page - 1) & ~(page - 1);
        uintptr_t last = (object->dlpi_addr + segment->p_vaddr + segment->p_filesz) & ~(page - 1);
        if (segment->p_type == PT_LOAD && segment->p_flags == PF_R && first < last)
            madvise((void *)first, last - first, MADV_DONTNEED);
    }
    return 1;
}

/* Python ends the program where memory runs out while it starts. */
static bool memory_is_short(void)
{
    void *room = mmap(NULL, MEMORY_NEEDED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return true;
    munmap(room, MEMORY_NEEDED);
    return false;
}

static uint16_t load_python(const void *table)
{
    const struct table_header *header = header_of(table);
    const char *libpython = table_string(table, header->libpython), *path = table_string(table, header->engine_module);
    const uint32_t *offsets = (const uint32_t *)((const char *)table + header->search_path);
    const char *search_path[header->nsearch_path + 1];
    char encodings[PATH_MAX];
    bool found = false;
    for (uint32_t i = 0; i < header->nsearch_path; i++) {
        search_path[i] = table_string(table, offsets[i]);
        int length = snprintf(encodings, sizeof encodings, "%s/encodings/__init__.py", search_path[i]);
        found = found || (length < (int)sizeof encodings && !access(encodings, R_OK));
    }
    search_path[header->nsearch_path] = NULL;
    if (libpython[0] != '/' || path[0] != '/')
        return REASON_ENGINE_NO_LIBPYTHON;
    if (!found) {
        /* Python would print to the host's stderr and give up half way. */
        trace_log("engine: no encodings module in the search path: the standard library is missing");
        return REASON_ENGINE_FAILED;
    }
    if (memory_is_short()) {
        trace_log("engine: less than %u MiB of memory are left", MEMORY_NEEDED >> 20);
        return REASON_ENGINE_FAILED;
    }
    /* Global: extension modules look for Py* symbols there. */
    if (!dlopen(libpython, RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE)) {
        trace_log("engine: %s", dlerror());
        return REASON_ENGINE_NO_LIBPYTHON;
    }
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    const struct engine_module *entry = handle ? dlsym(handle, "engine_module") : NULL;
    if (!entry || entry->version != ENGINE_MODULE_VERSION) {
        trace_log("engine: %s", handle ? "the embedding module is of another version" : dlerror());
        return REASON_ENGINE_FAILED;
    }
    struct engine_setup setup = {table_string(table, header->python_home), search_path, trace_line};
    if (entry->start(&setup))
        return REASON_ENGINE_FAILED;
    dl_iterate_phdr(give_back_pages, (void *)libpython);
    module = entry;
    return 0;
}

static void refuse(uint16_t reason)
{
    refusal = reason;
    atomic_store(&state, REFUSED);
    stats_engine(STATS_ENGINE_REFUSED, reason);
    trace_log("engine: not in this process, reason %u", reason);
}

static void *start_main(void *argument)
{
    struct start *start = argument;
    switch_guard = 1;
    uint16_t reason = load_python(start->table);
    if (reason) {
        refuse(reason);
    } else {
        atomic_store(&state, READY);
        stats_engine(STATS_ENGINE_READY, 0);
    }
    atomic_store(&start->done, 1);
    futex_wake(&start->done);
    if (atomic_exchange(&start->given_up, 1))
        munmap(start, start->size);
    return NULL;
}

/* Under admin. Python is started on a thread of its own, for its stack and its signal mask; it is waited for, so that
 * the program has no thread more than before. */
static void start_python(const void *table)
{
    size_t size = sizeof(struct start) + header_of(table)->size;
    struct start *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    if (start == MAP_FAILED) {
        refuse(REASON_ENGINE_FAILED);
        return;
    }
    start->size = size;
    memcpy(start->table, table, header_of(table)->size);
    atomic_store(&state, STARTING);
    if (start_thread(&thread, START_STACK, start_main, start)) {
        munmap(start, size);
        refuse(REASON_ENGINE_FAILED);
        return;
    }
    struct timespec deadline = after_ms(START_MS);
    while (!atomic_load(&start->done) && !passed(&deadline))
        futex_wait(&start->done, 0, &deadline);
    if (atomic_load(&start->done)) {
        pthread_join(thread, NULL);
        munmap(start, size);
        return;
    }
    /* The loader's lock may be held by this very thread, in a constructor. The start goes on without us. */
    pthread_detach(thread);
    if (atomic_exchange(&start->given_up, 1))
        munmap(start, size);
}

/* Who comes while another thread starts it waits with that thread. */
static uint16_t start_once(const void *table)
{
    sigset_t mask;
    if (!lock(&admin, ADMIN_MS, &mask))
        return REASON_ENGINE_BUSY;
    if (atomic_load(&state) == NOT_STARTED) {
        if (python_host())
            refuse(REASON_ENGINE_PYTHON_HOST);
        else if (sandboxed())
            refuse(REASON_ENGINE_SANDBOX);
        else
            start_python(table);
    }
    unlock(&admin, &mask);
    return 0;
}

/* --- asking -------------------------------------------------------------------------------------------------------- */

static bool overdue(void)
{
    for (size_t i = 0; i < TASKS; i++)
        if (atomic_load(&tasks[i].state) == TASK_ABANDONED)
            return true;
    return false;
}

/* Under upcall. */
static bool configure(const void *table)
{
    const struct table_header *header = header_of(table);
    if (atomic_load(&configured) == header->generation)
        return true;
    for (size_t i = 0; i < PREPARED / 64; i++)
        atomic_store(&prepared[i], 0);
    if (!module->configure(table, header->size, process_facts()))
        return false;
    if (!overdue())
        atomic_store(&timeouts, 0);    /* other functions, or the same ones mended */
    atomic_store(&configured, header->generation);
    return true;
}

static uint16_t ensure_configured(const void *table)
{
    sigset_t mask;
    if (atomic_load(&configured) == header_of(table)->generation)
        return 0;
    if (!lock(&upcall, UPCALL_MS, &mask))
        return REASON_ENGINE_BUSY;
    switch_guard++;
    bool done = configure(table);
    switch_guard--;
    unlock(&upcall, &mask);
    return done ? 0 : REASON_ENGINE_FAILED;
}

/* The rules, on the caller's own thread: 1 us, and no user's code. */
static uint16_t ask_rules(const void *table, const struct decision_request *request, struct verdict *out)
{
    sigset_t mask;
    let_fork_pass();
    if (!lock(&upcall, overdue() ? 0 : UPCALL_MS, &mask))
        return REASON_ENGINE_BUSY;
    switch_guard++;                    /* here and not for the whole ask: a handler may jump out of a wait */
    bool done = configure(table) && module->decide(request, out);
    switch_guard--;
    unlock(&upcall, &mask);
    stats_upcall();
    return done ? 0 : REASON_ENGINE_FAILED;
}

static struct task *next_task(void)
{
    struct task *first = NULL;
    for (size_t i = 0; i < TASKS; i++)
        if (atomic_load(&tasks[i].state) == TASK_QUEUED && (!first || (int32_t)(tasks[i].ticket - first->ticket) < 0))
            first = &tasks[i];
    return first;
}

static void run_task(struct task *task)
{
    uint32_t expected = TASK_QUEUED;
    if (!atomic_compare_exchange_strong(&task->state, &expected, TASK_RUNNING))
        return;
    /* A table that came in between has other functions at these numbers. */
    task->reason = REASON_ENGINE_BUSY;
    if (task->generation == atomic_load(&configured)) {
        int done = task->prepare ? module->prepare(task->request.function) : module->decide(&task->request, &task->verdict);
        task->reason = done ? 0 : REASON_ENGINE_FAILED;
    }
    task->done = atomic_load(&task->asleep) ? now_ns() : 0;
    expected = TASK_RUNNING;
    if (!atomic_compare_exchange_strong(&task->state, &expected, TASK_DONE))
        atomic_store(&task->state, TASK_FREE);
    else if (atomic_load(&task->asleep))
        futex_wake(&task->state);
}

/* Who queues a task looks whether the thread is alive; so it says first that it is not, and then looks for tasks. */
static bool no_work_left(void)
{
    pthread_mutex_lock(&admin);
    atomic_store(&thread_alive, false);
    if (atomic_load(&thread_stays) || next_task())
        atomic_store(&thread_alive, true);
    bool left = !atomic_load(&thread_alive);
    pthread_mutex_unlock(&admin);
    return left;
}

/* Lives for as long as there is work and a second longer: a program whose main thread has ended waits for all others. */
static void *function_main(void *unused)
{
    (void)unused;
    switch_guard = 1;
    function_thread = true;
    prctl(PR_SET_NAME, "policy");
    pthread_mutex_lock(&upcall);
    void *python = module->thread_begin();
    pthread_mutex_unlock(&upcall);
    uint64_t idle_since = 0;
    for (;;) {
        uint32_t seen = atomic_load(&work);
        struct task *task = next_task();
        if (task) {
            if (idle_since)
                came_after(task->queued - idle_since, &thread_budget);
            idle_since = 0;
            let_fork_pass();
            pthread_mutex_lock(&upcall);
            run_task(task);
            pthread_mutex_unlock(&upcall);
            continue;
        }
        if (!idle_since) {
            idle_since = now_ns();
            if (spin(&work, seen, true, &thread_budget))
                continue;
        }
        if (!atomic_load(&thread_stays))
            count_cpus(idle_since);
        struct timespec deadline = after_ms(IDLE_MS);
        atomic_store(&thread_asleep, true);
        futex_wait(&work, seen, &deadline);
        atomic_store(&thread_asleep, false);
        if (passed(&deadline) && no_work_left())
            break;
    }
    pthread_mutex_lock(&upcall);
    module->thread_end(python);
    pthread_mutex_unlock(&upcall);
    return NULL;
}

static uint16_t start_function_thread(void)
{
    sigset_t mask;
    pthread_t thread;
    uint16_t reason = 0;
    if (!lock(&admin, ADMIN_MS, &mask))
        return REASON_ENGINE_BUSY;
    if (!atomic_load(&thread_alive)) {
        count_cpus(now_ns());
        if (start_thread(&thread, FUNCTION_STACK, function_main, NULL)) {
            reason = REASON_ENGINE_FAILED;
        } else {
            pthread_detach(thread);
            atomic_store(&thread_alive, true);
        }
    }
    unlock(&admin, &mask);
    return reason;
}

static void *interrupt_main(void *unused)
{
    (void)unused;
    switch_guard = 1;
    module->interrupt(overdue);
    atomic_store(&interrupting, false);
    return NULL;
}

/* A function that loops would go on for the life of the program. It is interrupted by a thread made for that, because
 * this takes the GIL, which nobody can promise to get in time. */
static void interrupt_function(void)
{
    sigset_t mask;
    pthread_t thread;
    if (atomic_load(&thread_stays) || !lock(&admin, 0, &mask))
        return;
    if (!atomic_exchange(&interrupting, true)) {
        if (start_thread(&thread, INTERRUPT_STACK, interrupt_main, NULL))
            atomic_store(&interrupting, false);
        else
            pthread_detach(thread);
    }
    unlock(&admin, &mask);
}

/* Gives up on a task. False if it was done in the last moment. */
static bool abandon(struct task *task)
{
    uint32_t expected = TASK_QUEUED;
    bool slow = overdue();
    if (atomic_compare_exchange_strong(&task->state, &expected, TASK_FREE)) {
        if (!slow)
            return true;
    } else {
        expected = TASK_RUNNING;
        if (!atomic_compare_exchange_strong(&task->state, &expected, TASK_ABANDONED))
            return false;
    }
    atomic_fetch_add(&timeouts, 1);
    interrupt_function();
    return true;
}

/* Nobody waits for this one any more. The states are tried in the order in which they come. */
static void drop(struct task *task)
{
    static const uint32_t from[] = {TASK_QUEUED, TASK_RUNNING, TASK_DONE};
    static const uint32_t to[] = {TASK_FREE, TASK_ABANDONED, TASK_FREE};
    for (size_t i = 0; i < 3; i++) {
        uint32_t expected = from[i];
        if (atomic_compare_exchange_strong(&task->state, &expected, to[i]))
            return;
    }
}

static uint16_t wait_for(struct task *task, uint32_t fork_count, const struct timespec *deadline)
{
    bool slept = false, spun = false;
    for (;;) {
        if (atomic_load(&forks) != fork_count)
            return REASON_ENGINE_FORKED;   /* a signal handler forked, and this is the child: nobody will answer */
        uint32_t seen = atomic_load(&task->state);
        if (seen == TASK_DONE)
            break;
        if (passed(deadline) && abandon(task))
            return REASON_FUNCTION_TIMEOUT;
        if (!spun) {
            spun = true;
            spin_for_answer(&task->state, TASK_DONE);
        } else if (!slept) {
            slept = true;
            atomic_store(&task->asleep, true);
        } else {
            futex_wait(&task->state, seen, deadline);
        }
    }
    if (slept && task->done)
        came_after(task->done - task->queued, &asker_budget);
    return 0;
}

static uint16_t on_function_thread(bool prepare, const void *table, const struct decision_request *request, uint32_t ms,
                                   struct verdict *out)
{
    struct task *task = NULL;
    uint32_t fork_count = atomic_load(&forks);
    for (size_t i = 0; i < TASKS && !task; i++) {
        uint32_t expected = TASK_FREE;
        if (atomic_compare_exchange_strong(&tasks[i].state, &expected, TASK_CLAIMED))
            task = &tasks[i];
    }
    if (!task)
        return REASON_ENGINE_BUSY;
    task->prepare = prepare;
    task->ticket = atomic_fetch_add(&tickets, 1);
    task->generation = header_of(table)->generation;
    task->request = *request;
    task->request.options = task->options;
    if (request->noptions)
        memcpy(task->options, request->options, request->noptions * sizeof *task->options);
    task->queued = now_ns();
    atomic_store(&task->asleep, false);
    waiting = task;
    struct timespec deadline = after_ms(ms);
    atomic_store(&task->state, TASK_QUEUED);
    atomic_fetch_add(&work, 1);
    uint16_t reason = atomic_load(&thread_alive) ? 0 : start_function_thread();
    if (!reason) {
        if (atomic_load(&thread_asleep))
            futex_wake(&work);
        reason = wait_for(task, fork_count, &deadline);
    }
    if (!reason) {
        reason = task->reason;
        if (!reason && !prepare)
            *out = task->verdict;
        atomic_store(&task->state, TASK_FREE);
    } else if (reason != REASON_FUNCTION_TIMEOUT) {
        drop(task);
    }
    waiting = NULL;
    return reason;
}

static const struct table_function *function_of(const void *table, uint32_t index)
{
    const struct table_header *header = header_of(table);
    if (index >= header->nfunctions)
        return NULL;
    return (const struct table_function *)((const char *)table + header->functions) + index;
}

static uint16_t ask_function(const void *table, const struct decision_request *request, struct verdict *out)
{
    const struct table_function *function = function_of(table, request->function);
    if (!function)
        return REASON_FUNCTION_MISSING;
    if (atomic_load(&timeouts) >= TIMEOUTS_ALLOWED)
        return REASON_FUNCTION_REFUSED;
    uint16_t reason = ensure_configured(table);
    if (reason)
        return reason;
    uint64_t bit = 1ull << request->function % 64;
    _Atomic uint64_t *word = request->function < PREPARED ? &prepared[request->function / 64] : NULL;
    if (!word || !(atomic_load(word) & bit)) {
        uint32_t ms = atomic_load(&import_late) ? function->timeout_ms : IMPORT_MS;
        reason = on_function_thread(true, table, request, ms, out);
        if (reason == REASON_FUNCTION_TIMEOUT)
            atomic_store(&import_late, true);
        if (reason)
            return reason;
        if (word)
            atomic_fetch_or(word, bit);
    }
    stats_upcall();
    return on_function_thread(false, table, request, function->timeout_ms, out);
}

static uint16_t ask_python(const void *table, const struct decision_request *request, struct verdict *out)
{
    struct decision_request question = *request;
    if (question.function == FUNCTION_NONE) {
        uint16_t reason = ask_rules(table, &question, out);
        if (reason || out->action != ACTION_ASK)
            return reason;
        question.function = out->function;
        question.rule = out->rule;
    }
    uint8_t otherwise = out->otherwise;
    uint16_t reason = ask_function(table, &question, out);
    if (reason || out->otherwise == OTHERWISE_INHERIT)
        out->otherwise = otherwise;
    out->rule = question.rule;
    return reason;
}

static uint16_t ask_helper(const void *table, const struct decision_request *request, struct verdict *out)
{
    const struct table_header *header = header_of(table);
    const char *address = table_string(table, header->helper);
    const struct table_function *function = function_of(table, request->function);
    uint32_t slowest = 0;
    if (!address[0])
        return REASON_ENGINE_NO_HELPER;
    for (uint32_t i = 0; !function && i < header->nfunctions; i++)
        if (function_of(table, i)->timeout_ms > slowest)
            slowest = function_of(table, i)->timeout_ms;
    uint32_t ms = (function ? function->timeout_ms : slowest) + HELPER_SLACK_MS;
    uint8_t otherwise = out->otherwise;
    uint16_t reason = helper_ask(address, header->generation, request, ms, out);
    if (!reason) {
        stats_upcall();
        stats_engine(STATS_ENGINE_HELPER, 0);
    }
    if (reason || out->otherwise == OTHERWISE_INHERIT)
        out->otherwise = otherwise;
    return reason;
}

static uint16_t ask(const void *table, const struct decision_request *request, struct verdict *out)
{
    uint8_t mode = flows_engine();
    if (mode == ENGINE_OFF)
        return REASON_ENGINE_OFF;
    if (mode == ENGINE_HELPER)
        return ask_helper(table, request, out);
    uint16_t reason = 0;
    if (stack_is_small())
        reason = REASON_ENGINE_STACK;
    else if (atomic_load(&state) < READY)
        reason = start_once(table);
    if (!reason) {
        switch (atomic_load(&state)) {
        case READY:
            return ask_python(table, request, out);
        case REFUSED:
            reason = refusal;
            break;
        default:
            return REASON_STARTING;
        }
    }
    /* Whatever keeps Python out of this process, the launcher may have started a helper. */
    return ask_helper(table, request, out) ? reason : 0;
}

/* True where a signal handler, or Python inside an up-call, asks again. A mark that a handler left behind when it jumped
 * out of the asking frame counts no longer: frames above it are gone. */
static bool already_asking(uintptr_t here)
{
    stack_t alternate;
    if (!asking)
        return false;
    if (here < asking || sigaltstack(NULL, &alternate) || alternate.ss_flags & SS_ONSTACK)
        return true;
    asking = 0;
    if (waiting)
        drop(waiting);
    waiting = NULL;
    return false;
}

/* The program may want another rounding, or exceptions that are signals; Python's arithmetic wants neither, nor does the
 * program Python's flags. Returns what was in force. */
#define FLOAT_DEFAULT 0x1f80u
static uint32_t float_control(uint32_t control)
{
#ifdef __x86_64__
    uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control);
    return before;
#else
    return control;
#endif
}

void engine_ask(const void *table, const struct decision_request *request, struct verdict *out)
{
    int saved = errno, cancel;
    uintptr_t here = (uintptr_t)__builtin_frame_address(0);
    uint16_t reason = REASON_ENGINE_BUSY;
    out->rule = request->rule;
    if (getpid() != own_pid) {
        reason = REASON_ENGINE_FORKED;
    } else if (!function_thread && fork_mode == FORK_NONE && !already_asking(here)) {
        asking = here;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
        uint32_t control = float_control(FLOAT_DEFAULT);
        reason = ask(table, request, out);
        float_control(control);
        pthread_setcancelstate(cancel, &cancel);
        asking = 0;
    }
    if (reason)
        *out = (struct verdict){.action = ACTION_TCP, .otherwise = out->otherwise, .reason = reason, .rule = out->rule,
                                .function = FUNCTION_NONE};
    errno = saved;
}

/* Everything that a sandbox might forbid later is done now: the start, the imports, the thread. */
void engine_start(const void *table)
{
    int saved = errno;
    struct verdict ignored;
    asking = (uintptr_t)__builtin_frame_address(0);
    if (atomic_load(&state) == NOT_STARTED)
        start_once(table);
    if (atomic_load(&state) == READY && !ensure_configured(table)) {
        atomic_store(&thread_stays, true);
        for (uint32_t i = 0; i < header_of(table)->nfunctions && i < PREPARED; i++) {
            struct decision_request request = {.function = i, .rule = RULE_DEFAULT};
            if (on_function_thread(true, table, &request, IMPORT_MS, &ignored))
                break;
            atomic_fetch_or(&prepared[i / 64], 1ull << i % 64);
        }
    }
    asking = 0;
    errno = saved;
}

/* --- fork ---------------------------------------------------------------------------------------------------------- */

/* The child may call Python only if nobody was in it and its own locks were at rest: so both locks and the GIL are held
 * across the fork. A function that does not return in time costs the child its engine, not the program its fork. */
void engine_before_fork(void)
{
    if (fork_depth++)
        return;
    int saved = errno;
    struct timespec deadline = after_ms(ADMIN_MS);
    fork_mode = FORK_UNPROTECTED;
    if (!function_thread && !pthread_mutex_clocklock(&admin, CLOCK_MONOTONIC, &deadline)) {
        fork_mode = FORK_LOCKED;
        deadline = after_ms(overdue() ? 0 : FORK_MS);
        if (atomic_load(&state) == READY && !atomic_load(&interrupting)) {
            atomic_store(&fork_waits, true);
            if (!pthread_mutex_clocklock(&upcall, CLOCK_MONOTONIC, &deadline))
                fork_mode = FORK_PYTHON;
            atomic_store(&fork_waits, false);
        }
    }
    if (fork_mode == FORK_PYTHON) {
        switch_guard++;
        module->before_fork();
        switch_guard--;
    }
    errno = saved;
}

void engine_after_fork_parent(void)
{
    if (!fork_depth || --fork_depth)
        return;
    int saved = errno;
    if (fork_mode == FORK_PYTHON) {
        switch_guard++;
        module->after_fork_parent();
        switch_guard--;
        pthread_mutex_unlock(&upcall);
    }
    if (fork_mode >= FORK_LOCKED)
        pthread_mutex_unlock(&admin);
    fork_mode = FORK_NONE;
    errno = saved;
}

void engine_after_fork_child(void)
{
    int saved = errno;
    static const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    if (fork_depth > 1)
        fork_mode = FORK_UNPROTECTED;
    fork_depth = 0;
    if (fork_mode == FORK_PYTHON) {
        switch_guard++;
        module->after_fork_child();
        switch_guard--;
    }
    admin = fresh;
    upcall = fresh;
    own_pid = getpid();
    atomic_fetch_add(&forks, 1);
    atomic_store(&thread_alive, false);
    atomic_store(&thread_asleep, false);
    atomic_store(&asker_until, 0);
    atomic_store(&interrupting, false);
    for (size_t i = 0; i < TASKS; i++)
        atomic_store(&tasks[i].state, TASK_FREE);
    helper_after_fork_child();
    if (fork_mode != FORK_PYTHON && (atomic_load(&state) == READY || atomic_load(&state) == STARTING))
        refuse(REASON_ENGINE_FORKED);
    function_thread = false;
    fork_mode = FORK_NONE;
    errno = saved;
}
