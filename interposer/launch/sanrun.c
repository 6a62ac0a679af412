/* The command sanrun: becomes the Python beside it, which runs interposer/cli/sanrun.py. In C, because Python ignores
 * SIGPIPE before it can be asked whether the caller did, and because the program's PYTHONPATH and PYTHONHOME are not
 * meant for us. */
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SYSTEM_PYTHON "/usr/bin/python3"

static const char *ignored(int number, const char *text) {
    struct sigaction now;
    return sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_IGN ? text : "";
}

int main(int argc, char **argv) {
    char self[PATH_MAX] = "", python[PATH_MAX + sizeof "/python3"], code[96];
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0)
        self[0] = 0;
    snprintf(python, sizeof python, "%s/python3", dirname(self));
    snprintf(code, sizeof code, "from interposer.cli.sanrun import main; main(%s%s)", ignored(SIGPIPE, "'SIGPIPE',"),
             ignored(SIGXFSZ, "'SIGXFSZ',"));

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
