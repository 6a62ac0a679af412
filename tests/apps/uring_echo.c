/* uring_echo serve PORT: echoes what its clients say; all but its listen() goes through liburing. uring_echo say PORT:
 * connects through the ring, says a megabyte and ends with 0 if it all came back. uring_echo libc PORT: the same, but
 * the ring comes after a connect() of libc's. */
#include <arpa/inet.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE (1 << 20)
enum { ACCEPT, RECEIVE, SEND };

struct client {
    int fd;
    char text[16384];
};

static struct io_uring ring;
static char said[SIZE], heard[SIZE];

static int result_of(void)
{
    struct io_uring_cqe *entry;
    if (io_uring_submit_and_wait(&ring, 1) < 0 || io_uring_peek_cqe(&ring, &entry) < 0)
        exit(3);
    int result = entry->res;
    io_uring_cqe_seen(&ring, entry);
    return result;
}

static void ask(int what, struct client *client, size_t size)
{
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    if (what == RECEIVE)
        io_uring_prep_recv(entry, client->fd, client->text, sizeof client->text, 0);
    else
        io_uring_prep_send(entry, client->fd, client->text, size, MSG_WAITALL);
    io_uring_sqe_set_data64(entry, (uint64_t)(uintptr_t)client | (uint64_t)what);
}

static int serve(int listener)
{
    struct io_uring_sqe *first = io_uring_get_sqe(&ring);
    io_uring_prep_multishot_accept(first, listener, NULL, NULL, 0);
    io_uring_sqe_set_data64(first, ACCEPT);
    for (;;) {
        struct io_uring_cqe *entry;
        if (io_uring_submit_and_wait(&ring, 1) < 0 || io_uring_peek_cqe(&ring, &entry) < 0)
            return 4;
        struct client *client = (struct client *)(uintptr_t)(entry->user_data & ~(uint64_t)3);
        int what = entry->user_data & 3, result = entry->res;
        io_uring_cqe_seen(&ring, entry);
        if (what == ACCEPT && result >= 0) {
            client = calloc(1, sizeof *client);
            client->fd = result;
            ask(RECEIVE, client, 0);
        } else if (what == ACCEPT) {
            return 5;
        } else if (result <= 0) {
            close(client->fd);
            free(client);
        } else {
            ask(what == RECEIVE ? SEND : RECEIVE, client, (size_t)result);
        }
    }
}

static int say(int fd)
{
    size_t out = 0, in = 0;
    memset(said, 'x', SIZE);
    while (in < SIZE) {
        struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
        if (out == in) {
            io_uring_prep_send(entry, fd, said + out, out + 16384 < SIZE ? 16384 : SIZE - out, MSG_WAITALL);
            int result = result_of();
            if (result <= 0)
                return 6;
            out += (size_t)result;
        } else {
            io_uring_prep_recv(entry, fd, heard + in, out - in, 0);
            int result = result_of();
            if (result <= 0)
                return 7;
            in += (size_t)result;
        }
    }
    return memcmp(said, heard, SIZE) ? 8 : 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_in at = {AF_INET, htons((uint16_t)atoi(argc > 2 ? argv[2] : "0")), {htonl(INADDR_LOOPBACK)}, {0}};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    alarm(60);
    if (strcmp(argv[1], "serve") == 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 64) < 0 || io_uring_queue_init(64, &ring, 0) < 0)
            return 2;
        return serve(fd);
    }
    if (strcmp(argv[1], "libc") == 0) {
        if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0 || io_uring_queue_init(8, &ring, 0) < 0)
            return 2;
    } else {
        if (io_uring_queue_init(8, &ring, 0) < 0)
            return 2;
        io_uring_prep_connect(io_uring_get_sqe(&ring), fd, (struct sockaddr *)&at, sizeof at);
        if (result_of() < 0)
            return 9;
    }
    return say(fd);
}
