/* Tells each client with one letter what carries its connection, by the kernel's word at this end. Prints its port, and
 * serves until it is killed. */
#include "awkward.h"

int main(void)
{
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_ANY)}, {0}};
    socklen_t length = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&at, length) < 0 || listen(listener, 4096) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0)
        return 1;
    SAY("%d\n", ntohs(at.sin_port));
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            continue;
        char letter = carrier(fd);
        send(fd, &letter, 1, MSG_NOSIGNAL);
        close(fd);
    }
}
