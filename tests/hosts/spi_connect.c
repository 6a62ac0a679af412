/* Connecting at once: what the program sees of it, what a failure leads to, and that success is final: S17 to S20, S29. */
#include "spi_host.h"
#include <sys/un.h>

#define CONNECTS (1u << CALL_CONNECT)

/* --- S17, S20 --- */

TWIN(at_once_without_blocking, "a",
     "S17, S20: EINPROGRESS, then 0 once, then EISCONN, and no provider sees the later calls")
{
    int listener = serve(LOOPBACK);
    for (int looks = 0; looks < 2; looks++) {
        int client = app_socket(AF_INET, SOCK_STREAM | NONBLOCK), epfd = app_epoll();
        app_add(epfd, client, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
        app_wait(epfd, 0);
        here();
        app_connect(client, LOOPBACK, port_of(listener));
        served_by(client, 'a');
        called_of(CONNECTS, "a.connect a1 127.0.0.1:server");
        if (looks) {
            app_poll(client, POLLIN | POLLOUT, 1000);
            app_select(client, 1000);
            app_wait(epfd, 1000);
            app_error(client);
        }
        app_connect(client, LOOPBACK, port_of(listener));
        app_connect(client, LOOPBACK, port_of(listener));
        app_connect(client, LOOPBACK, port_of(listener));
        int server = app_accept(listener);
        here();
        app_connect(server, LOOPBACK, port_of(listener));
        app_send(client, "works");
        app_recv(server);
        called_of(~0u, "");
        close(epfd);
        app_close(server);
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

TWIN(at_once_with_blocking, "a", "S17, S20: a blocking connect() is done when it returns")
{
    int listener = serve(LOOPBACK), client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    here();
    app_connect(client, LOOPBACK, port_of(listener));
    app_block(client, false);
    app_connect(client, LOOPBACK, port_of(listener));
    app_connect(client, "127.0.0.9", 9);
    called_of(~0u, "");
    app_poll(client, POLLIN | POLLOUT, 0);
    app_close(client);
    app_close(listener);
    nothing_left();
}

/* --- S18 --- */

static bool final(int error)
{
    return error == ECONNRESET || error == ECONNREFUSED || error == EHOSTUNREACH;
}

TWIN(every_error_at_once, "a",
     "S14, S18, T12: with any code but three the same socket goes on by TCP; wsp_close_socket once")
{
    int listener = serve(LOOPBACK), dead = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(dead, LOOPBACK, 0) == 0);
    int dead_port = port_of(dead);
    for (int error = 1; error < 134; error++) {
        char text[300];
        if (final(error) || !strerrorname_np(error) || error == EINPROGRESS)
            continue;
        fail_call(A, CALL_CONNECT, error);
        for (int nonblocking = 0; nonblocking < 2; nonblocking++) {
            int client = app_socket(AF_INET, SOCK_STREAM | (nonblocking ? NONBLOCK : 0));
            here();
            app_connect(client, LOOPBACK, port_of(listener));
            name_tried("client");
            snprintf(text, sizeof text, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n"
                     "a.bind a1 127.0.0.1:client\n a.connect a1 127.0.0.1:server = %s\n a.close a1\n a.unhandle a1",
                     strerrorname_np(error));
            called(text);
            served_by(client, 't');
            app_poll(client, POLLOUT, 1000);
            app_error(client);
            app_connect(client, LOOPBACK, port_of(listener));
            app_connect(client, LOOPBACK, port_of(listener));
            app_close(app_accept(listener));
            app_close(client);
        }
        int client = app_socket(AF_INET, SOCK_STREAM);   /* and where TCP fails, it is TCP's errno */
        app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
        int again = dup(client), epfd = app_epoll();
        app_add(epfd, again, EPOLLIN);
        check(app_connect(client, LOOPBACK, dead_port) == -1 && errno == ECONNREFUSED);
        app_error(client);
        app_wait(epfd, 0);
        app_get(client, SOL_SOCKET, SO_KEEPALIVE);
        check(app_bind(again, "127.0.0.2", 0) == 0);   /* no companion has left it bound */
        check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
        app_close(app_accept(listener));
        close(epfd);
        app_close(again);
        app_close(client);
    }
    app_close(dead);
    app_close(listener);
    nothing_left();
}

CASE(final_at_once, "ab",
     "S18: after one of the three final codes neither another provider nor TCP is tried; TCP's errno")
{
    static const int codes[][2] = {{ECONNRESET, ECONNREFUSED}, {ECONNREFUSED, ECONNREFUSED}, {EHOSTUNREACH, EHOSTUNREACH}};
    int port, listener = tcp_server(LOOPBACK, &port);   /* it would take a connection by TCP */
    for (size_t i = 0; i < 3; i++)
        for (int nonblocking = 0; nonblocking < 2; nonblocking++) {
            char text[300];
            unsigned asked = calls(B, CALL_REACH);
            fail_call(A, CALL_CONNECT, codes[i][0]);
            int client = app_socket(AF_INET, SOCK_STREAM | (nonblocking ? NONBLOCK : 0));
            here();
            check(app_connect(client, LOOPBACK, port) == -1 && errno == (nonblocking ? EINPROGRESS : codes[i][1]));
            check(!nonblocking || app_poll(client, POLLOUT, 1000) == (POLLOUT | POLLERR | POLLHUP));
            check(!nonblocking || app_error(client) == codes[i][1]);
            snprintf(text, sizeof text, "a.connect a1 127.0.0.1:server = %s\n a.close a1", strerrorname_np(codes[i][0]));
            called_of(CONNECTS | 1u << CALL_CLOSE, text);
            check(calls(B, CALL_REACH) == asked);
            struct pollfd waiting = {listener, POLLIN, 0};
            check(real.poll(&waiting, 1, 20) == 0);
            check(app_peer(client) == -1 && errno == ENOTCONN);
            fail_call(A, CALL_CONNECT, ENOENT);   /* the socket can be used again */
            app_block(client, true);
            check(app_connect(client, LOOPBACK, port) == 0);
            served_by(client, 't');
            app_close(client);
            real.close(real.accept(listener, NULL, NULL));
            check(companions_alive(A) + companions_alive(B) == 0);
        }
    real.close(listener);
    nothing_left();
}

TWIN(final_like_tcp, "a", "S18: ECONNRESET and ECONNREFUSED look like TCP's refusal")
{
    int dead = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(dead, LOOPBACK, 0) == 0);
    for (int turn = 0; turn < 8; turn++) {
        fail_call(A, CALL_CONNECT, turn & 1 ? ECONNRESET : ECONNREFUSED);
        int client = app_socket(AF_INET, SOCK_STREAM | (turn & 2 ? NONBLOCK : 0));
        app_connect(client, LOOPBACK, port_of(dead));
        if (turn & 2)
            app_poll(client, POLLOUT, 1000);
        if (turn & 4)
            app_error(client);
        app_peer(client);
        if (!(turn & 2))
            app_connect(client, LOOPBACK, port_of(dead));
        app_close(client);
        served_by(dead, 't');
    }
    app_close(dead);
    nothing_left();
}

static int (*libc_connect)(int, const struct sockaddr *, socklen_t);
static int refusal, refused;

static int refuse_streams(int fd, const struct sockaddr *address, socklen_t length)
{
    int type = 0;
    socklen_t size = sizeof type;
    if (address->sa_family != AF_UNIX || real.getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 || type != SOCK_STREAM)
        return libc_connect(fd, address, length);
    refused++;
    errno = refusal;
    return -1;
}

TWIN(unix_is_never_final, "unix", "S18: whatever AF_UNIX says, a connection that TCP would make is made by TCP")
{
    static const int codes[] = {ECONNRESET, ECONNREFUSED, EHOSTUNREACH, EAGAIN};
    int listener = serve(LOOPBACK);
    libc_connect = real.connect;
    real.connect = refuse_streams;
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        refusal = codes[i];
        refused = 0;
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
        check(oracle || refused);
        check(!fdtable_companion(client));
        app_close(app_accept(listener));
        app_close(client);
    }
    app_close(listener);
}

/* --- S19 --- */

TWIN(dies_with_data_unread, "a",
     "S19: a peer that dies with data unread: ECONNRESET once, then the end; nobody tries TCP")
{
    for (int by = 0; by < 4; by++) {
        struct pair pair = make_pair(LOOPBACK);
        here();
        app_send(pair.client, "never read");
        app_close(pair.server);
        app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 1000);
        if (by == 1)
            app_send(pair.client, "more");
        if (by == 2)
            app_error(pair.client);
        if (by != 3)
            app_recv(pair.client);
        app_recv(pair.client);
        app_error(pair.client);
        app_send(pair.client, "and more");
        app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 1000);
        app_connect(pair.client, LOOPBACK, port_of(pair.listener));
        called_of(~0u, "");
        served_by(pair.client, 'a');
        app_close(pair.client);
        app_close(pair.listener);
    }
    nothing_left();
}

TWIN(dies_with_all_read, "a", "S19: a peer that dies with all data read: the end, then EPIPE for who goes on to write")
{
    struct pair pair = make_pair(LOOPBACK);
    here();
    app_send(pair.client, "read");
    app_recv(pair.server);
    app_send(pair.server, "last");
    app_close(pair.server);
    app_recv(pair.client);
    app_recv(pair.client);
    app_recv(pair.client);
    app_poll(pair.client, POLLIN | POLLRDHUP, 1000);
    app_error(pair.client);
    send(pair.client, "x", 1, MSG_NOSIGNAL);   /* D2: TCP takes the first one */
    pause_ms(20);
    check(send(pair.client, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
    called_of(~0u, "");
    served_by(pair.client, 'a');
    app_close(pair.client);
    app_close(pair.listener);
    nothing_left();
}

/* --- S29 --- */

static const struct {
    enum call call;
    bool handle;
    const char *calls;
} stages[] = {
    {CALL_REACH, false, "a.reach 127.0.0.1:server = -1"},
    {CALL_SOCKET, false, "a.reach 127.0.0.1:server\n a.socket inet a1 = EPERM"},
    {CALL_SOCKET, true, "a.reach 127.0.0.1:server\n a.socket inet a1 = EPERM\n a.handle a1\n a.unhandle a1"},
    {CALL_BIND, false, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client = EPERM\n"
                       "a.close a1\n a.unhandle a1"},
    {CALL_SETSOCKOPT, false, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"
                             "a.setsockopt a1 1 9 1 = EPERM\n a.close a1\n a.unhandle a1"},
    {CALL_CONNECT, false, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"
                          "a.setsockopt a1 1 9 1\n a.connect a1 127.0.0.1:server = EPERM\n a.close a1\n a.unhandle a1"},
    {CALL_DETACH, false, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"
                         "a.setsockopt a1 1 9 1\n a.connect a1 127.0.0.1:server\n a.detach a1 = EPERM\n a.close a1\n"
                         "a.unhandle a1"},
};

TWIN(second_serves, "ab",
     "S14, S29: whatever the first provider fails at, it is closed, and the second is asked from the beginning")
{
    int listener = serve(LOOPBACK);
    for (size_t i = 0; i < sizeof stages / sizeof *stages; i++)
        for (int worse = 0; worse < 2; worse++) {
            char text[900];
            orders[A].takes_handle = stages[i].handle;
            fail_call(A, stages[i].call, EPERM);
            fail_call(B, CALL_CONNECT, worse ? EACCES : 0);
            int client = app_socket(AF_INET, SOCK_STREAM);
            app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
            here();
            check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
            if (worse)
                name_tried("client");
            else
                name_port("client", app_local(client));
            snprintf(text, sizeof text, "%s\n b.reach 127.0.0.1:server\n b.socket inet b1\n b.handle b1\n"
                     "b.bind b1 127.0.0.1:client\n b.setsockopt b1 1 9 1\n b.connect b1 127.0.0.1:server%s", stages[i].calls,
                     worse ? " = EACCES\n b.close b1\n b.unhandle b1" : "\n b.detach b1\n b.unhandle b1");
            called(text);
            served_by(client, worse ? 't' : 'b');
            if (worse)
                stayed_because(client, REASON_PORT_PRIVILEGE);
            orders[A] = orders[B] = (struct orders){0};
            fail_call(A, CALL_ACCEPT, ECONNABORTED);   /* where wsp_detach failed, a's fabric has a connection */
            int server = app_accept(listener);
            app_send(client, "by the second");
            app_recv(server);
            orders[A] = (struct orders){0};
            app_close(server);
            app_close(client);
            check(oracle || (companions_alive(A) == 1 && companions_alive(B) == 1));
        }
    app_close(listener);
    nothing_left();
}

TWIN(order_of_policy, "ba", "S29: the policy's order is the order of asking")
{
    int listener = serve(LOOPBACK);
    called("b.socket inet b1\n b.handle b1\n b.bind b1 127.0.0.1:server\n b.listen b1 16\n"
           "a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:server\n a.listen a1 16");
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    served_by(client, 'b');
    check(calls(A, CALL_REACH) == 0);
    app_close(client);
    app_close(listener);
    nothing_left();
}
