/* Owns the log descriptor. Each line is one system call to a file opened for appending, so no lock. Keeps errno. */
#include "trace.h"
#include "fdtable.h"
#include "real.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static _Atomic int log_fd = -1;
static dev_t log_dev;
static ino_t log_ino;

void trace_open(const char *path)
{
    int saved = errno;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0600);
    struct stat status;
    if (fd >= 0 && fstat(fd, &status) == 0) {
        log_dev = status.st_dev;
        log_ino = status.st_ino;
        log_fd = hidden_fd(fd);
    }
    errno = saved;
}

/* The number may be another file's since a close that no hook saw, and beyond the limit on file size a write is SIGXFSZ. */
static bool writable(int fd, size_t size)
{
    struct stat status;
    struct rlimit limit;
    return fstat(fd, &status) == 0 && status.st_dev == log_dev && status.st_ino == log_ino &&
           getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur - size >= (rlim_t)status.st_size && limit.rlim_cur > size;
}

static int stamp(char *text, size_t size)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return snprintf(text, size, "%lld.%06ld %d ", (long long)now.tv_sec, now.tv_nsec / 1000, getpid());
}

void trace_line(const char *line)
{
    if (log_fd < 0)
        return;
    int saved = errno;
    char when[48];
    struct iovec parts[] = {{when, (size_t)stamp(when, sizeof when)}, {(void *)line, strlen(line)}, {(void *)"\n", 1}};
    ssize_t ignored = writable(log_fd, parts[0].iov_len + parts[1].iov_len + 1) ? real.writev(log_fd, parts, 3) : 0;
    (void)ignored;
    errno = saved;
}

void trace_log(const char *format, ...)
{
    if (log_fd < 0)
        return;
    int saved = errno;
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length > 0)
        trace_line(line);
    errno = saved;
}
