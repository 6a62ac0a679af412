/* Owns the log descriptor. Each line is one write() to a file opened for appending, so no lock. Keeps errno. */
#include "trace.h"
#include "fdtable.h"
#include "real.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/stat.h>
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

void trace_log(const char *format, ...)
{
    if (log_fd < 0)
        return;
    int saved = errno;
    char line[512];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int length = snprintf(line, sizeof line, "%lld.%06ld %d ", (long long)now.tv_sec, now.tv_nsec / 1000, getpid());
    va_list arguments;
    va_start(arguments, format);
    int body = vsnprintf(line + length, sizeof line - (size_t)length - 1, format, arguments);
    va_end(arguments);
    if (body > 0) {
        length += body;
        if (length > (int)sizeof line - 2)
            length = (int)sizeof line - 2;
        line[length++] = '\n';
        ssize_t ignored = writable(log_fd, (size_t)length) ? real.write(log_fd, line, (size_t)length) : 0;
        (void)ignored;
    }
    errno = saved;
}
