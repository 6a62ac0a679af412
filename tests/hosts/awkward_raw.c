/* awkward_raw PORT: a program that has libc and makes its socket calls without it. Prints the port at which it serves one
 * client, what carried its own connection to PORT, and what carried the client's. */
#include "awkward.h"

int main(int argc, char **argv)
{
    struct sockaddr_in own = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}}, at = own;
    socklen_t length = sizeof at;
    alarm(30);
    int listener = (int)past_libc(SYS_socket, AF_INET, SOCK_STREAM, 0, 0, 0);
    if (past_libc(SYS_bind, listener, (long)&own, length, 0, 0) < 0 || past_libc(SYS_listen, listener, 5, 0, 0, 0) < 0 ||
        past_libc(SYS_getsockname, listener, (long)&own, (long)&length, 0, 0) < 0)
        return 11;
    SAY("%d\n", ntohs(own.sin_port));
    int fd = (int)past_libc(SYS_socket, AF_INET, SOCK_STREAM, 0, 0, 0);
    at.sin_port = htons((uint16_t)atoi(argc > 1 ? argv[1] : "0"));
    if (past_libc(SYS_connect, fd, (long)&at, length, 0, 0) < 0)
        return 10;
    SAY("%c\n", letter_from(fd));
    past_libc(SYS_close, fd, 0, 0, 0, 0);
    fd = (int)past_libc(SYS_accept4, listener, 0, 0, 0, 0);
    char letter = carrier(fd);
    past_libc(SYS_write, fd, (long)&letter, 1, 0, 0);
    SAY("%c\n", letter);
    return 0;
}
