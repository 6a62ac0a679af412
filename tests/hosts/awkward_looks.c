/* awkward_looks PORT SIGINT [LOCALE]: describes everything about itself that a policy engine might touch, connects,
 * serves a client, waits until the engine's thread has ended, and describes itself again; prints what differs. SIGINT:
 * default, ignored or handled. At the end it sends itself a SIGINT, and reads on in its standard input. */
#include "awkward.h"
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <fenv.h>
#include <locale.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <wctype.h>

#define LINES 400

extern char **environ;
static char lines[2][LINES][160];
static int count[2], turn, port;
static volatile sig_atomic_t interrupted;

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    if (count[turn] < LINES)
        vsnprintf(lines[turn][count[turn]++], sizeof lines[0][0], format, list);
    va_end(list);
}

static void on_interrupt(int number)
{
    interrupted += number == SIGINT;
}

static void note_locale(void)
{
    struct lconv *numbers = localeconv();
    char text[40];
    setlocale(LC_ALL, NULL);
    note("locale %s", setlocale(LC_ALL, NULL));
    snprintf(text, sizeof text, "%.2f %'d", 1234.5, 1234567);
    note("numbers %s [%s] [%s] [%s]", text, numbers->decimal_point, numbers->thousands_sep, numbers->currency_symbol);
    note("read %.2f %.2f", strtod("2,5", NULL), strtod("2.5", NULL));
    note("bytes %zu upper %x lower %x letter %d", MB_CUR_MAX, (unsigned)towupper(L'i'), (unsigned)towlower(L'I'),
         isalpha(0xe4) != 0);
    note("zone %s %s %ld", tzname[0], tzname[1], timezone);
}

static void note_signals(void)
{
    sigset_t mask;
    struct itimerval timer;
    stack_t alternate;
    for (int number = 1; number < NSIG; number++) {
        struct sigaction action = {0};
        if (sigaction(number, NULL, &action) < 0)
            continue;
        note("signal %d %p %x %lx", number, (void *)action.sa_handler, action.sa_flags & ~0x4000000,   /* libc's own flag */
             *(unsigned long *)&action.sa_mask);
    }
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    note("mask %lx", *(unsigned long *)&mask);
    sigpending(&mask);
    note("pending %lx", *(unsigned long *)&mask);
    for (int which = ITIMER_REAL; which <= ITIMER_PROF; which++) {
        getitimer(which, &timer);
        note("timer %d %d", which, timer.it_value.tv_sec > 0);
    }
    sigaltstack(NULL, &alternate);
    note("stack %p %x", alternate.ss_sp, (unsigned)alternate.ss_flags);
}

static void note_descriptors(void)
{
    struct stat status;
    struct rlimit limit;
    for (int fd = 0; fd < 64; fd++)
        if (fstat(fd, &status) == 0)
            note("fd %d %x %lu flags %x %x at %ld", fd, status.st_mode, (unsigned long)status.st_ino,
                 (unsigned)fcntl(fd, F_GETFD), (unsigned)fcntl(fd, F_GETFL), (long)lseek(fd, 0, SEEK_CUR));
    for (int which = 0; which < RLIM_NLIMITS; which++)
        if (getrlimit((__rlimit_resource_t)which, &limit) == 0)
            note("limit %d %lu %lu", which, limit.rlim_cur, limit.rlim_max);
}

static void note_rest(void)
{
    char directory[200], name[20] = "";
    int threads = 0;
    DIR *tasks = opendir("/proc/self/task");
    while (tasks && readdir(tasks))
        threads++;
    if (tasks)
        closedir(tasks);
    mode_t mode = umask(0);
    umask(mode);
    prctl(PR_GET_NAME, name);
    note("threads %d", threads - 2);
    note("umask %o directory %s name %s", mode, getcwd(directory, sizeof directory), name);
    note("dumpable %d subreaper %d", prctl(PR_GET_DUMPABLE), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    note("rounding %d exceptions %d", fegetround(), fetestexcept(FE_ALL_EXCEPT));
    note("stdout buffer %zu", __extension__ (size_t)(stdout->_IO_buf_end - stdout->_IO_buf_base));
    note("dlerror %s", dlerror());
    for (char **each = environ; *each; each++)
        note("environment %s", *each);
}

static void describe(void)
{
    note_locale();
    note_signals();
    note_descriptors();
    note_rest();
}

static void *client(void *own_port)
{
    return (void *)(long)talk(*(int *)own_port);
}

static int threads_now(void)
{
    int threads = 0;
    DIR *tasks = opendir("/proc/self/task");
    while (tasks && readdir(tasks))
        threads++;
    if (tasks)
        closedir(tasks);
    return threads - 2;
}

int main(int argc, char **argv)
{
    char half[3];
    if (argc < 3)
        return 2;
    port = atoi(argv[1]);
    if (argc > 3 && !setlocale(LC_ALL, argv[3]))
        return 3;
    alarm(40);
    tzset();
    if (strcmp(argv[2], "default")) {
        struct sigaction action = {.sa_handler = argv[2][0] == 'h' ? on_interrupt : SIG_IGN, .sa_flags = SA_RESTART};
        sigaddset(&action.sa_mask, SIGUSR2);
        sigaction(SIGINT, &action, NULL);
    }
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    raise(SIGUSR1);                    /* pending for the rest of its life */
    fesetround(FE_UPWARD);
    if (read(0, half, 3) != 3)
        return 4;
    describe();
    turn = 1;
    errno = 4242;
    char connected = talk(port);
    if (errno != 4242)
        SAY("errno %d\n", errno);
    int own_port = 0, listener = listener_at(&own_port);
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, client, &own_port);
    char served = serve_one(listener);
    pthread_join(thread, &result);
    close(listener);
    while (threads_now() > 1)          /* alarm() bounds it */
        usleep(10000);
    describe();
    for (int i = 0; i < count[0] || i < count[1]; i++)
        if (strcmp(lines[0][i], lines[1][i]))
            SAY("was: %.80s\nis:  %.80s\n", lines[0][i], lines[1][i]);
    if (read(0, half, 3) != 3 || memcmp(half, "def", 3))
        SAY("standard input was read\n");
    SAY("%c%c%c\n", connected, served, (char)(long)result);
    raise(SIGINT);
    return interrupted;
}
