/* The command sanrun: becomes the Python beside it, which runs interposer/cli/sanrun.py. In C, because Python ignores
 * SIGPIPE before it can be asked whether the caller did, and because the program's PYTHONPATH and PYTHONHOME are not
 * meant for us. */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SYSTEM_PYTHON "/usr/bin/python3"

static const char *ignored(int number, const char *text) {
    struct sigaction now;
    return sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_IGN ? text : "";
}

#define FILES_NEEDED 2
#define DATA_NEEDED (4 << 20)
#define SPACE_NEEDED (16 << 20)

static int has_room(size_t size, int protection) {
    void *room = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return room != MAP_FAILED && munmap(room, size) == 0;
}

/* The limit under which Python cannot start, and would say so in its own way; or 0. */
static const char *too_low(void) {
    int opened = 0, fds[FILES_NEEDED];
    while (opened < FILES_NEEDED && (fds[opened] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0)
        opened++;
    int error = errno, enough = opened == FILES_NEEDED;
    while (opened)
        close(fds[--opened]);
    if (!enough && error == EMFILE)
        return "too few file descriptors are free: raise the limit (ulimit -n)";
    if (!has_room(DATA_NEEDED, PROT_READ | PROT_WRITE))
        return "too little memory is allowed: raise the limits (ulimit -d, ulimit -v)";
    return has_room(SPACE_NEEDED, PROT_NONE) ? NULL : "too little memory is allowed: raise the limit (ulimit -v)";
}

int main(int argc, char **argv) {
    char self[PATH_MAX] = "", python[PATH_MAX + sizeof "/python3"], code[96];
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0)
        self[0] = 0;
    snprintf(python, sizeof python, "%s/python3", dirname(self));
    snprintf(code, sizeof code, "from interposer.cli.sanrun import main; main(%s%s)", ignored(SIGPIPE, "'SIGPIPE',"),
             ignored(SIGXFSZ, "'SIGXFSZ',"));

    const char *limit = too_low();
    if (limit) {
        fprintf(stderr, "sanrun: %s\n", limit);
        return 125;
    }
    char *fixed[] = {python, "-E", "-P", "-c", code};
    size_t count = sizeof fixed / sizeof *fixed;
    char **words = calloc(count + (size_t)argc + 1, sizeof *words);
    if (!words) {
        perror("sanrun");
        return 125;
    }
    memcpy(words, fixed, sizeof fixed);
    if (argc > 1)
        memcpy(words + count, argv + 1, (size_t)(argc - 1) * sizeof *words);
    execv(python, words);
    if (errno == ENOENT) {
        words[0] = SYSTEM_PYTHON; /* installed into a directory that has no Python, as /usr/local/bin */
        execv(SYSTEM_PYTHON, words);
    }
    fprintf(stderr, "sanrun: cannot execute %s: %s; install interposer again\n", words[0], strerror(errno));
    return 125;
}
