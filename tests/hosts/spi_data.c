/* Established connections: names, sharing, closing, and providers that move the data themselves: S26 to S28, S30. */
#include "spi_host.h"
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

/* --- S26 --- */

TWIN(names, "ab", "S26: getsockname and getpeername in the family of the socket, whole, cut, and with a wrong length")
{
    static const struct {
        const char *listens, *connects;
    } rows[] = {{LOOPBACK, LOOPBACK}, {"::1", "::1"}, {"::", LOOPBACK}, {"::", "::1"}, {"::", "::ffff:127.0.0.1"},
                {EVERYWHERE, "127.0.0.8"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int listener = serve(rows[i].listens);
        int client = app_socket(strchr(rows[i].connects, ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
        app_local(client);
        app_peer(client);
        check(app_connect(client, rows[i].connects, port_of(listener)) == 0);
        name_port("client", app_local(client));
        int server = app_accept(listener);
        served_by(server, 'a');
        int fds[] = {listener, client, server};
        forget_records();
        for (int j = 0; j < 3; j++) {
            app_local(fds[j]);
            app_peer(fds[j]);
            for (socklen_t room = 0; room < 40; room += 6) {
                struct sockaddr_storage address;
                socklen_t length = room;
                memset(&address, 0x55, sizeof address);
                CALLED(getsockname(fds[j], (struct sockaddr *)&address, &length), "getsockname, room for %u", room);
                say("%u bytes; family %#x, and behind %#x", length, address.ss_family, ((unsigned char *)&address)[room]);
            }
            socklen_t wrong = (socklen_t)-1;
            struct sockaddr_storage address;
            CALLED(getpeername(fds[j], (struct sockaddr *)&address, &wrong), "getpeername, -1");
            CALLED(getsockname(fds[j], NULL, &wrong), "getsockname, NULL");
            CALLED(getsockname(fds[j], (struct sockaddr *)&address, NULL), "getsockname, NULL length");
        }
        called_of(~0u, "");
        app_close(client);
        app_close(server);
        app_close(listener);
    }
    nothing_left();
}

/* --- S27 --- */

static void exchange(int one, int other, const char *words)
{
    app_send(one, words);
    app_poll(other, POLLIN, 1000);
    app_recv(other);
}

TWIN(duplicates, "a", "S2, S27: duplicates are the connection, in order, until the last is closed; no provider is told")
{
    for (int moves = 0; moves < 2; moves++) {
        orders[A].moves = moves;
        struct pair pair = make_pair(LOOPBACK);
        here();
        int one = dup(pair.client), two = fcntl(pair.client, F_DUPFD_CLOEXEC, 100), three = dup2(pair.client, 300);
        check(one >= 0 && two >= 100 && three == 300);
        exchange(pair.client, pair.server, "1");
        exchange(one, pair.server, "2");
        app_close(pair.client);
        exchange(two, pair.server, "3");
        exchange(pair.server, three, "4");
        served_by(three, 'a');
        app_local(three);
        app_close(one);
        app_close(two);
        app_poll(pair.server, POLLIN, 0);
        check(!calls(A, CALL_RELEASE));
        app_close(three);
        app_poll(pair.server, POLLIN, 1000);
        app_recv(pair.server);
        called_of(~(1u << CALL_RELEASE), "");
        check(oracle || calls(A, CALL_RELEASE) == (unsigned)moves);
        app_close(pair.server);
        app_close(pair.listener);
        nothing_left();
    }
}

TWIN(forked, "a", "S27, S28: a connection and its listener in a child: each process uses and closes its own")
{
    struct pair pair = make_pair(LOOPBACK);
    fflush(stdout);
    here();
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        close(pair.listener);          /* the parent's goes on */
        bool good = send(pair.client, "from the child", 14, 0) == 14;
        _exit(good ? 0 : 1);           /* and what it sent arrives */
    }
    int status = 1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    app_recv(pair.server);
    app_poll(pair.server, POLLIN, 0);
    exchange(pair.client, pair.server, "from the parent");
    called_of(~0u, "");
    int client = app_socket(AF_INET, SOCK_STREAM);   /* made after the fork */
    check(app_connect(client, LOOPBACK, port_of(pair.listener)) == 0);
    served_by(client, 'a');
    int server = app_accept(pair.listener);
    served_by(server, 'a');
    app_close(client);
    app_close(server);
    close_pair(&pair);
    nothing_left();
}

TWIN(forked_to_accept, "a", "S22, S27: children of a prefork server accept their share from the companion too")
{
    int listener = serve(LOOPBACK), port = port_of(listener);
    fflush(stdout);
    pid_t children[2];
    for (int i = 0; i < 2; i++)
        if ((children[i] = fork()) == 0) {
            alarm(20);
            for (int served = 0;; served++) {
                int fd = accept(listener, NULL, NULL);
                char word = '?';
                if (fd < 0 || recv(fd, &word, 1, 0) != 1)
                    _exit(100);
                if (word == 'q')
                    _exit(served);
                send(fd, &word, 1, 0);
                close(fd);
            }
        }
    int total = 0;
    for (int i = 0; i < 22; i++) {
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(app_connect(client, LOOPBACK, port) == 0);
        served_by(client, 'a');
        app_send(client, i < 20 ? "w" : "q");
        if (i < 20)
            app_recv(client);
        app_close(client);
        if (i >= 20) {
            int status;
            check(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) < 100);
            total += WEXITSTATUS(status);
        }
    }
    check(total == 20);
    app_close(listener);
    nothing_left();
}

TWIN(passed, "a", "S27: a connection that was passed by SCM_RIGHTS is the same, and closes with the last descriptor")
{
    struct pair pair = make_pair(LOOPBACK);
    int channel[2];
    check(socketpair(AF_UNIX, SOCK_DGRAM, 0, channel) == 0);
    char control[CMSG_SPACE(sizeof(int))] = "";
    char byte = 'x';
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(header), &pair.client, sizeof(int));
    check(sendmsg(channel[0], &message, 0) == 1);
    app_close(pair.client);
    app_poll(pair.server, POLLIN, 0);
    check(recvmsg(channel[1], &message, 0) == 1);
    int passed;
    memcpy(&passed, CMSG_DATA(header), sizeof(int));
    exchange(passed, pair.server, "passed");
    exchange(pair.server, passed, "and back");
    close(passed);
    app_recv(pair.server);
    close(channel[0]);
    close(channel[1]);
    app_close(pair.server);
    app_close(pair.listener);
    nothing_left();
}

/* --- S28 --- */

#define LARGE 400000

static int read_to_the_end(struct thread *thread)
{
    static char block[16384];
    unsigned sum = 0;
    int total = 0;
    for (;;) {
        ssize_t got = recv(thread->fd, block, sizeof block, 0);
        if (got < 0)
            return -errno;
        if (got == 0)
            return total + (int)(sum % 1000);
        for (ssize_t i = 0; i < got; i++)
            sum += (unsigned char)block[i];
        total += (int)got;
    }
}

TWIN(graceful, "a", "S28: all that was written before close(), shutdown(SHUT_WR) or exit arrives, then the end")
{
    static char large[LARGE];
    for (int i = 0; i < LARGE; i++)
        large[i] = (char)(i * 7);
    for (int moves = 0; moves < 2; moves++)
        for (int how = 0; how < 3; how++) {
            orders[A].moves = moves;
            struct pair pair = make_pair(LOOPBACK);
            struct thread reader = {0};
            here();
            start(&reader, read_to_the_end, pair.server);
            fflush(stdout);
            pid_t child = how == 2 ? fork() : 0;
            if (child == 0) {
                ssize_t done = 0;
                while (done < LARGE) {
                    ssize_t sent = send(pair.client, large + done, (size_t)(LARGE - done), MSG_NOSIGNAL);
                    check(sent > 0);
                    done += sent;
                }
                if (how == 2)
                    _exit(0);
            }
            if (how == 1)
                app_shutdown(pair.client, SHUT_WR);
            else
                app_close(pair.client);
            say("read %d", finish(&reader));
            int status = 0;
            check(how < 2 || (waitpid(child, &status, 0) == child && status == 0));
            if (how == 1) {            /* the other direction is open */
                exchange(pair.server, pair.client, "half closed");
                app_send(pair.client, "no more");
                app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 0);
                app_close(pair.client);
            }
            app_close(pair.server);
            app_close(pair.listener);
            nothing_left();
        }
}

TWIN(abortive, "a", "S28: an abortive close is a reset for the peer, once")
{
    struct pair pair = make_pair(LOOPBACK);
    struct linger none = {1, 0};
    app_send(pair.server, "never read");
    check(setsockopt(pair.client, SOL_SOCKET, SO_LINGER, &none, sizeof none) == 0);
    app_close(pair.client);
    app_recv(pair.server);
    app_recv(pair.server);
    app_error(pair.server);
    app_send(pair.server, "to nobody");
    app_close(pair.server);
    app_close(pair.listener);
    nothing_left();
}

/* --- S30 --- */

/* Every call that sends or receives, in turn. */
static void all_calls(int from, int to)
{
    char text[64] = "";
    struct iovec parts[2] = {{"one", 3}, {"two", 3}}, rooms[2] = {{text, 2}, {text + 2, 20}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2}, room = {.msg_iov = rooms, .msg_iovlen = 2};
    struct mmsghdr many[2] = {{.msg_hdr = message}, {.msg_hdr = message}}, several[2] = {{.msg_hdr = room}, {.msg_hdr = room}};
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, "127.0.0.9", 9);
#define SENDS(call)                                                                                                    \
    memset(text, 0, sizeof text);                                                                                      \
    CALLED(call, #call);                                                                                               \
    app_poll(to, POLLIN | POLLOUT, 1000)
#define RECEIVES(call)                                                                                                 \
    CALLED(call, #call);                                                                                               \
    say("\"%s\"", text)
    SENDS(write(from, "written", 7));
    RECEIVES(read(to, text, 3));
    RECEIVES(read(to, text, sizeof text));
    SENDS(send(from, "sent", 4, MSG_NOSIGNAL));
    RECEIVES(recv(to, text, 2, MSG_PEEK));
    RECEIVES(recv(to, text, sizeof text, 0));
    SENDS(sendto(from, "sent to", 7, 0, (struct sockaddr *)&address, length));
    RECEIVES(recvfrom(to, text, sizeof text, 0, (struct sockaddr *)&address, &length));
    SENDS(writev(from, parts, 2));
    RECEIVES(readv(to, rooms, 2));
    SENDS(sendmsg(from, &message, 0));
    RECEIVES(recvmsg(to, &room, 0));
    SENDS(sendmmsg(from, many, 2, 0));
    RECEIVES(recvmmsg(to, several, 1, 0, NULL));
    SENDS(send(from, "thrown away", 11, 0));
    CALLED(recv(to, NULL, 7, MSG_TRUNC), "recv(MSG_TRUNC)");
    RECEIVES(recv(to, text, sizeof text, 0));
    SENDS(send(from, "all of it", 9, 0));
    RECEIVES(recv(to, text, 9, MSG_WAITALL));
    RECEIVES(recv(to, text, 1, MSG_DONTWAIT));
    int waiting = -1;
    SENDS(send(from, "counted", 7, 0));
    CALLED(ioctl(to, FIONREAD, &waiting), "FIONREAD");
    say("%d", waiting);
    RECEIVES(read(to, text, sizeof text));
}

/* S30: a provider that moves data itself, and one that answers EOPNOTSUPP. */
CASE(movers_move, "a",
     "S30: all data goes through the provider's mover where it has one; asked before wsp_detach, at both ends")
{
    orders[A].moves = true;
    int listener = serve(LOOPBACK), client = app_socket(AF_INET, SOCK_STREAM);
    here();
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    name_port("client", app_local(client));
    int server = app_accept(listener);
    called_of(1u << CALL_CONNECT | 1u << CALL_ACCEPT | 1u << CALL_TRANSFER | 1u << CALL_DETACH,
              "a.connect a1 127.0.0.1:server\n a.transfer a1\n a.detach a1\n"
              "a.accept a-0 a2 127.0.0.1:server 127.0.0.1:client\n a.transfer a2\n a.detach a2");
    check(movers_alive(A) == 2);
    all_calls(client, server);
    unsigned sends = calls(A, CALL_SEND), receives = calls(A, CALL_RECEIVE);
    uint64_t out = moved_out(A);
    check(sends == 10 && receives == 13 && out == 7 + 4 + 7 + 6 + 6 + 12 + 11 + 9 + 7);
    all_calls(server, client);
    check(calls(A, CALL_SEND) == 2 * sends && calls(A, CALL_RECEIVE) == 2 * receives && moved_out(A) == 2 * out);
    here();
    int copy = dup(client);
    close(client);
    check(calls(A, CALL_RELEASE) == 0);
    close(copy);
    called("a.release a-1");
    close(server);
    called("a.release a-0");
    close(listener);
    nothing_left();
}

TWIN(movers_look_alike, "a", "S16, S30: with a mover the program sees what it sees without")
{
    for (int moves = 0; moves < 3; moves++) {
        orders[A].moves = moves == 1;
        fail_call(A, CALL_TRANSFER, moves == 2 ? ENOMEM : 0);
        struct pair pair = make_pair(LOOPBACK);
        check(oracle || movers_alive(A) == (moves == 1 ? 2 : 0));
        all_calls(pair.client, pair.server);
        all_calls(pair.server, pair.client);
        check(oracle || (moves == 1) == (moved_out(A) > 0 && calls(A, CALL_SEND) > 0) || moves == 2);
        app_shutdown(pair.client, SHUT_RD);
        app_recv(pair.client);
        app_shutdown(pair.client, SHUT_WR);
        app_send(pair.client, "x");
        app_recv(pair.server);
        app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 1000);
        close_pair(&pair);
        nothing_left();
    }
}

TWIN(movers_die, "a", "S19, S30: the errors of a mover's connection are TCP's, once")
{
    orders[A].moves = true;
    for (int by = 0; by < 3; by++) {
        struct pair pair = make_pair(LOOPBACK);
        app_send(pair.client, "never read");
        app_close(pair.server);
        app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 1000);
        if (by == 1)
            app_send(pair.client, "more");
        if (by == 2)
            app_error(pair.client);
        if (by == 0)
            app_recv(pair.client);
        app_recv(pair.client);
        app_send(pair.client, "and more");
        app_error(pair.client);
        app_close(pair.client);
        app_close(pair.listener);
        nothing_left();
    }
}

TWIN(movers_late, "a", "S17, S30: a connect that is completed later gets its mover then; who waited to send uses it")
{
    orders[A].moves = true;
    orders[A].completion = BY_THREAD;
    struct pair pair = make_pair(LOOPBACK);
    join_completions();
    check(oracle || movers_alive(A) == 2);
    exchange(pair.client, pair.server, "late");
    exchange(pair.server, pair.client, "and back");
    check(oracle || (calls(A, CALL_SEND) == 2 && calls(A, CALL_RECEIVE) == 2));
    struct sockaddr nothing = {.sa_family = AF_UNSPEC};
    CALLED(connect(pair.client, &nothing, sizeof nothing), "connect(AF_UNSPEC)");
    check(oracle || calls(A, CALL_RELEASE) == 1);
    check(recv(pair.server, &(char){0}, 1, 0) <= 0);   /* D3: the end instead of a reset */
    close_pair(&pair);
    nothing_left();
}

CASE(movers_without_descriptor, "ab",
     "S14, S30: a mover is closed where wsp_detach fails then, and the next provider serves")
{
    orders[A].moves = orders[B].moves = true;
    int listener = serve(LOOPBACK), client = app_socket(AF_INET, SOCK_STREAM);
    fail_call(A, CALL_DETACH, EMFILE);
    here();
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    called_of(1u << CALL_TRANSFER | 1u << CALL_DETACH | 1u << CALL_RELEASE | 1u << CALL_CLOSE,
              "a.transfer a1\n a.detach a1 = EMFILE\n a.release a1\n a.close a1\n b.transfer b1\n b.detach b1");
    served_by(client, 'b');
    check(movers_alive(A) == 0 && movers_alive(B) == 1);
    fail_call(A, CALL_ACCEPT, ECONNABORTED);   /* a's fabric was connected */
    int server = app_accept(listener);
    served_by(server, 'b');
    exchange(client, server, "by b");
    check(calls(B, CALL_SEND) == 1 && calls(B, CALL_RECEIVE) == 1 && calls(A, CALL_SEND) == 0);
    app_close(client);
    app_close(server);
    app_close(listener);
    nothing_left();
}

TWIN(movers_forked, "a", "S27, S30: in a child the mover goes on; each process closes its own once")
{
    orders[A].moves = true;
    struct pair pair = make_pair(LOOPBACK);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        bool good = send(pair.client, "from the child", 14, 0) == 14;
        close(pair.client);
        close(pair.server);
        _exit(good && (oracle || calls(A, CALL_RELEASE) == 2) ? 0 : 1);
    }
    int status = 1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    app_recv(pair.server);
    exchange(pair.client, pair.server, "from the parent");
    close_pair(&pair);
    check(oracle || calls(A, CALL_RELEASE) == 2);
    nothing_left();
}
