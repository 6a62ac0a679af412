/* Preloaded beside the switch: makes a listener and a connection in a constructor, before main, and another in a
 * destructor. What came out is appended to the file named by EARLY_OUTPUT: the moment and a word. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void join(const char *moment)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}}, own;
    socklen_t length = sizeof at, size = sizeof own;
    char line[128], buffer[8] = "";
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0), accepted = -1, type = 0;
    const char *path = getenv("EARLY_OUTPUT"), *word = "fails";
    if (bind(listener, (struct sockaddr *)&at, length) == 0 && listen(listener, 5) == 0 &&
        getsockname(listener, (struct sockaddr *)&at, &length) == 0 &&
        connect(client, (struct sockaddr *)&at, length) == 0 && (accepted = accept(listener, NULL, NULL)) >= 0 &&
        write(client, "early", 5) == 5 && read(accepted, buffer, sizeof buffer) == 5 && strcmp(buffer, "early") == 0 &&
        getpeername(accepted, (struct sockaddr *)&own, &size) == 0 && own.sin_family == AF_INET) {
        socklen_t room = sizeof type;
        getsockopt(client, SOL_SOCKET, SO_DOMAIN, &type, &room);
        word = type == AF_INET ? "works" : "shows itself";
    }
    int out = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    if (out >= 0) {
        int count = snprintf(line, sizeof line, "%s %s\n", moment, word);
        if (write(out, line, (size_t)count) != count)
            _exit(99);
        close(out);
    }
    close(accepted);
    close(client);
    close(listener);
}

__attribute__((constructor(101))) static void begin(void)
{
    join("constructor");
}

__attribute__((destructor(101))) static void end(void)
{
    join("destructor");
}
