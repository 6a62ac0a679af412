/* Preloaded beside the switch: makes each call, a listener and a connection in a constructor, in a handler of atexit(),
 * in a destructor, and in a thread that goes on from the constructor to the destructor's end. What came out is appended
 * to the file named by EARLY_OUTPUT: the moment and a word. */
#include "each_call.h"
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

static const char *path;
static _Atomic unsigned long rounds;
static _Atomic(const char *) thread_word = "works";

static const char *join(void)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}}, own;
    socklen_t length = sizeof at, size = sizeof own;
    char buffer[8] = "";
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    int client = socket(AF_INET, SOCK_STREAM, 0), accepted = -1, type = 0;
    const char *word = "fails";
    if (bind(listener, (struct sockaddr *)&at, length) == 0 && listen(listener, 5) == 0 &&
        getsockname(listener, (struct sockaddr *)&at, &length) == 0 &&
        connect(client, (struct sockaddr *)&at, length) == 0 && (accepted = accept(listener, NULL, NULL)) >= 0 &&
        write(client, "early", 5) == 5 && read(accepted, buffer, sizeof buffer) == 5 && strcmp(buffer, "early") == 0 &&
        getpeername(accepted, (struct sockaddr *)&own, &size) == 0 && own.sin_family == AF_INET) {
        socklen_t room = sizeof type;
        getsockopt(client, SOL_SOCKET, SO_DOMAIN, &type, &room);
        word = type == AF_INET ? "works" : "shows itself";
    }
    close(accepted);
    close(client);
    close(listener);
    return word;
}

static void say(const char *moment, const char *word)
{
    char line[128];
    int out = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (out >= 0) {
        int count = snprintf(line, sizeof line, "%s %s\n", moment, word);
        if (write(out, line, (size_t)count) != count)
            _exit(99);
        close(out);
    }
}

static void make_calls(const char *moment)
{
    const char *bad = each_bad();
    say(moment, bad ? bad : join());
}

static void *go_on(void *unused)
{
    for (;; rounds++) {
        const char *word = join();
        if (strcmp(word, "works") != 0)
            thread_word = word;
    }
    return unused;
}

static void at_exit(void)
{
    make_calls("atexit");
}

__attribute__((constructor(101))) static void begin(void)
{
    pthread_t thread;
    if (!(path = getenv("EARLY_OUTPUT")))
        return;
    unsetenv("EARLY_OUTPUT");          /* the calls start other programs, which load this library as well */
    make_calls("constructor");
    atexit(at_exit);
    if (pthread_create(&thread, NULL, go_on, NULL) != 0)
        _exit(98);
}

__attribute__((destructor(101))) static void end(void)
{
    if (!path)
        return;
    make_calls("destructor");
    unsigned long enough = rounds + 20;
    for (int tries = 0; tries < 1000 && rounds < enough; tries++)
        nanosleep(&(struct timespec){0, 10000000}, NULL);
    say("thread", rounds < enough ? "hangs" : thread_word);
}
