/* awkward_standard PORT: started without descriptors 0, 1 and 2, so that its sockets get these numbers; nobody else may
 * write to them. Exits with 0, or with the number of the step that failed. */
#include "awkward.h"

static int silent(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN;
}

static int passes(int from, int to)
{
    char byte = 0;
    return write(from, "x", 1) == 1 && read(to, &byte, 1) == 1 && byte == 'x' && silent(to);
}

int main(int argc, char **argv)
{
    int own_port = 0, port = argc > 1 ? atoi(argv[1]) : 0;
    alarm(30);
    int listener = listener_at(&own_port);
    if (listener != 0)
        return 10;
    struct sockaddr_in at = {AF_INET, htons((uint16_t)own_port), {htonl(INADDR_LOOPBACK)}, {0}};
    int client = socket(AF_INET, SOCK_STREAM, 0);
    if (client != 1 || connect(client, (struct sockaddr *)&at, sizeof at) < 0)
        return 11;
    int accepted = accept(listener, NULL, NULL);
    if (accepted != 2 || carrier(client) != 'U' || carrier(accepted) != 'U')
        return 12;
    if (!silent(client) || !silent(accepted) || !passes(client, accepted) || !passes(accepted, client))
        return 13;
    if (talk(port) != 'U' || !silent(client) || !silent(accepted))   /* one more decision */
        return 14;
    return 0;
}
