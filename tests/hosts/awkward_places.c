/* awkward_places PORT WHAT...: does each WHAT to itself, in turn, and connects and serves after it; prints a letter for
 * the connection, one for the client that it served, and one for that client itself. What can be done: nothing, chroot
 * (to an empty directory), nobody (drop root), unmount (a mount name space without /proc), close-standard, close-rest,
 * close-range, wipe (the environment and the arguments), clearenv, no-environ, umask. `exec:NAME` runs awkward_places
 * once more, with the words that are left, and with: env (an empty environment), exec (its own). */
#include "awkward.h"
#include <grp.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

extern char **environ;
static int port;

static void *client(void *own_port)
{
    return (void *)(long)talk(*(int *)own_port);
}

static void show(const char *after)
{
    int own_port = 0, listener;
    pthread_t thread;
    void *result;
    char connected = talk(port), served;
    listener = listener_at(&own_port);
    if (listener < 0 || pthread_create(&thread, NULL, client, &own_port))
        _exit(50);
    served = serve_one(listener);
    pthread_join(thread, &result);
    close(listener);
    SAY("%s %c%c%c\n", after, connected, served, (char)(long)result);
}

static void must(bool done, const char *what)
{
    if (!done) {
        SAY("%s: %s\n", what, strerror(errno));
        _exit(51);
    }
}

/* As daemons that show their state in ps do it: the area of arguments and environment is theirs. */
static void wipe(int argc, char **argv)
{
    char *first = argv[0], *end = argv[argc - 1] + strlen(argv[argc - 1]);
    for (char **each = environ; *each; each++)
        end = *each + strlen(*each);
    memset(first, 'x', (size_t)(end - first));
    environ = NULL;
}

static void enter_empty_root(void)
{
    char empty[] = "/tmp/awkward-root-XXXXXX";
    must(mkdtemp(empty) && chdir(empty) == 0, "mkdtemp");
    rmdir(empty);                      /* an empty directory that no longer has a name: nobody puts anything into it */
    must(chroot(".") == 0 && access("/proc", F_OK) < 0, "chroot");
}

static void leave_mounts(void)
{
    must(unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "unshare");
    must(mount("none", "/proc", "tmpfs", 0, NULL) == 0, "mount");
    must(access("/proc/self", F_OK) < 0, "/proc");
}

static void drop_root(void)
{
    must(setgroups(0, NULL) == 0 && setgid(65534) == 0 && setuid(65534) == 0, "setuid");
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    alarm(30);
    port = atoi(argv[1]);
    char words[argc][40];
    for (int i = 0; i < argc; i++)
        snprintf(words[i], sizeof words[i], "%s", argv[i]);
    for (int i = 2; i < argc; i++) {
        const char *what = words[i];
        if (!strcmp(what, "chroot"))
            enter_empty_root();
        else if (!strcmp(what, "nobody"))
            drop_root();
        else if (!strcmp(what, "unmount"))
            leave_mounts();
        else if (!strcmp(what, "close-rest"))
            for (int fd = 3; fd < sysconf(_SC_OPEN_MAX); fd++)
                close(fd);
        else if (!strcmp(what, "close-range"))
            must(close_range(3, ~0u, 0) == 0, what);
        else if (!strcmp(what, "raw-close-range"))
            past_libc(SYS_close_range, 3, ~0u, 0, 0, 0);
        else if (!strcmp(what, "wipe"))
            wipe(argc, argv);
        else if (!strcmp(what, "clearenv"))
            clearenv();
        else if (!strcmp(what, "no-environ"))
            environ = NULL;
        else if (!strcmp(what, "umask"))
            umask(0777);
        else if (!strcmp(what, "exec-empty") || !strcmp(what, "exec")) {
            char *none[] = {NULL}, *rest[argc + 1];
            rest[0] = argv[0];
            rest[1] = words[1];
            for (int j = i + 1; j <= argc; j++)
                rest[2 + j - i - 1] = j < argc ? words[j] : NULL;
            execve("/proc/self/exe", rest, what[4] ? none : environ);
            must(false, "execve");
        } else if (strcmp(what, "nothing"))
            return 3;
        show(what);
    }
    return 0;
}
