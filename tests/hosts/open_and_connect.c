/* Makes a connection to itself, then opens each file of its arguments: they must get the lowest free numbers, as if
 * nobody else were in the process. Exits with 0 when they do. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int free_numbers[3], count = 0;
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            free_numbers[count++] = fd;
    for (int i = 0; i < count && i + 1 < argc; i++)
        if (open(argv[i + 1], O_RDWR | O_CREAT | O_TRUNC, 0644) != free_numbers[i])
            return 10 + i;
    struct sockaddr_in at = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    if (listener != 3 || client != 4)
        return 20;
    if (bind(listener, (struct sockaddr *)&at, length) < 0 || listen(listener, 5) < 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) < 0 || connect(client, (struct sockaddr *)&at, length) < 0)
        return 21;
    int accepted = accept(listener, NULL, NULL);
    if (accepted != 5 || write(client, "x", 1) != 1)
        return 22;
    char c;
    return read(accepted, &c, 1) == 1 && socket(AF_INET, SOCK_STREAM, 0) == 6 ? 0 : 23;
}
