/* Owns the log descriptor. Each line is one write() to a file opened for appending, so no lock. Keeps errno. */
#include "trace.h"
#include "fdtable.h"
#include "real.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LINE_SIZE 512
#define STAMP_SIZE 48

static _Atomic int log_fd = -1;
static dev_t log_dev;
static ino_t log_ino;

void trace_open(const char *path)
{
    int saved = errno;
    int fd = real.open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK, 0600);
    struct stat status;
    bool file = fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (file) {
        log_dev = status.st_dev;
        log_ino = status.st_ino;
        log_fd = hidden_fd(fd);
    } else if (fd >= 0) {
        real.close(fd);
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

/* One write(), which no filter of system calls forbids that lets a program log at all. */
static void append(char *line, size_t room, const char *text, size_t size)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    size_t length = (size_t)snprintf(line, room, "%lld.%06ld %d ", (long long)now.tv_sec, now.tv_nsec / 1000, getpid());
    if (size > room - length - 1)
        size = room - length - 1;
    memcpy(line + length, text, size);
    length += size;
    line[length++] = '\n';
    ssize_t ignored = writable(log_fd, length) ? real.write(log_fd, line, length) : 0;
    (void)ignored;
}

void trace_line(const char *text)
{
    int saved = errno;
    size_t size = strlen(text), room = size + STAMP_SIZE;
    char *line = log_fd < 0 ? NULL : malloc(room);
    if (line)
        append(line, room, text, size);
    free(line);
    errno = saved;
}

void trace_log(const char *format, ...)
{
    if (log_fd < 0)
        return;
    int saved = errno;
    char text[LINE_SIZE], line[LINE_SIZE + STAMP_SIZE];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length > 0)
        append(line, sizeof line, text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1);
    errno = saved;
}
