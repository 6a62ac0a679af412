/* Listening and accepting: S21 to S25. */
#include "spi_host.h"
#include <sys/resource.h>

#define LISTENS(letter, backlog)                                                                                       \
    letter ".socket inet " letter "1\n " letter ".handle " letter "1\n " letter ".bind " letter "1 127.0.0.1:server\n " \
    letter ".listen " letter "1 " backlog "\n"

static int watched;
static unsigned seen_listening;

static void look_whether_listening(enum provider provider, enum call call)
{
    int listens = 0;
    socklen_t length = sizeof listens;
    (void)provider;
    if (call < CALL_SOCKET || call == CALL_SUPPORTS)
        return;
    check(real.getsockopt(watched, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0 && listens);
    seen_listening++;
}

TWIN(tcp_listens_first, "ab",
     "S15, S21: TCP listens before a provider is asked anything; then one companion for each, in order")
{
    orders[A].before = orders[B].before = look_whether_listening;
    watched = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(watched, LOOPBACK, 0) == 0);
    name_port("server", port_of(watched));
    check(app_listen(watched, 11) == 0);
    called(LISTENS("a", "11") LISTENS("b", "11"));
    check(oracle || seen_listening >= 6);
    app_listen(watched, 22);           /* again: the same companions */
    called("");
    orders[A].before = orders[B].before = NULL;
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(watched)) == 0);
    served_by(client, 'a');
    app_close(client);
    app_close(watched);
    nothing_left();
}

TWIN(tcp_refuses_to_listen, "ab", "S21: where TCP's listen fails nobody else is asked, and the program has TCP's error")
{
    int first = app_socket(AF_INET, SOCK_STREAM), second = app_socket(AF_INET, SOCK_STREAM);
    app_set(first, SOL_SOCKET, SO_REUSEADDR, 1);
    app_set(second, SOL_SOCKET, SO_REUSEADDR, 1);
    check(app_bind(first, LOOPBACK, 0) == 0 && app_bind(second, LOOPBACK, port_of(first)) == 0);
    check(app_listen(first, 3) == 0);
    forget_records();
    app_listen(second, 3);
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(first)) == 0);
    forget_records();
    app_listen(client, 3);
    called_of(~0u, "");
    app_close(first);
    app_listen(second, 3);             /* now it can */
    served_by(second, 'a');
    app_close(second);
    app_close(client);
    nothing_left();
}

/* Connects to a listener by a provider, or by TCP. */
static int client_by(char letter, int port)
{
    fail_call(A, CALL_CONNECT, letter == 'a' ? 0 : ENOENT);
    fail_call(B, CALL_CONNECT, letter == 't' ? ENOENT : 0);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, port);
    check(connect(client, (struct sockaddr *)&address, length) == 0);
    served_by(client, letter);
    return client;
}

static int blocking_accept(struct thread *thread)
{
    int fd = accept(thread->fd, NULL, NULL);
    return fd < 0 ? -errno : fd;
}

TWIN(ready_for_all, "ab", "S21, S22: poll, select, epoll and accept find a connection whichever way it came")
{
    static const uint32_t kinds[] = {0, EPOLLET, EPOLLONESHOT, EPOLLEXCLUSIVE};
    int listener = serve(LOOPBACK), port = port_of(listener), epolls[4];
    for (int i = 0; i < 4; i++) {
        epolls[i] = app_epoll();
        check(app_add(epolls[i], listener, EPOLLIN | kinds[i]) == 0);
    }
    for (int turn = 0; turn < 6; turn++) {
        bool blocking = turn >= 3;
        char side = "abt"[turn % 3];
        app_block(listener, blocking);
        struct thread thread = {0};
        app_poll(listener, POLLIN | POLLOUT, 0);
        app_select(listener, 0);
        for (int i = 0; i < 4; i++)
            app_wait(epolls[i], 0);
        if (!blocking)
            app_accept(listener);      /* EAGAIN */
        int client = client_by(side, port);
        app_poll(listener, POLLIN | POLLOUT, 1000);
        app_select(listener, 1000);
        for (int i = 0; i < 4; i++) {
            app_wait(epolls[i], 1000);
            if (kinds[i] == EPOLLET)
                app_wait(epolls[i], 0);
            struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = listener};
            if (kinds[i] == EPOLLONESHOT)
                CALLED(epoll_ctl(epolls[i], EPOLL_CTL_MOD, listener, &again), "epoll_ctl(MOD)");
        }
        int server = app_accept4(listener, SOCK_NONBLOCK);
        served_by(server, side);
        app_close(server);
        if (blocking) {
            start(&thread, blocking_accept, listener);
            check(blocks(&thread));
            int another = client_by(side, port);
            server = finish(&thread);
            check(server >= 0);
            served_by(server, side);
            close(another);
            close(server);
        }
        for (int i = 0; i < 4; i++)    /* what is left over from the second */
            epoll_wait(epolls[i], &(struct epoll_event){0}, 1, 0);
        struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = listener};
        epoll_ctl(epolls[2], EPOLL_CTL_MOD, listener, &again);
        close(client);
    }
    for (int i = 0; i < 4; i++)
        close(epolls[i]);
    app_close(listener);
    nothing_left();
}

CASE(fair_to_all, "ab",
     "S21: clients of two providers and of TCP wait at one listener: none of the three has to wait for the others")
{
    enum { EACH = 40 };
    int clients[3 * EACH], listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, 0);
    check(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 200) == 0);
    for (int i = 0; i < 3 * EACH; i++)
        clients[i] = client_by("abt"[i % 3], port_of(listener));
    int counts[3] = {0}, since[3] = {0};
    for (int i = 0; i < 3 * EACH; i++) {
        int server = accept(listener, NULL, NULL);
        check(server >= 0);
        struct sock *sock = fdtable_companion(server);
        int side = !sock ? 2 : sock->companions[0].provider->id == ID_B;
        counts[side]++;
        for (int other = 0; other < 3; other++) {
            since[other] = other == side || counts[other] == EACH ? 0 : since[other] + 1;
            check(since[other] <= 16); /* two runs of eight */
        }
        close(server);
    }
    check(counts[0] == EACH && counts[1] == EACH && counts[2] == EACH);
    for (int i = 0; i < 3 * EACH; i++)
        close(clients[i]);
    close(listener);
    nothing_left();
}

/* --- S22 --- */

static void look_at_options(int fd)
{
    static const struct {
        int level, name;
    } options[] = {{SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_OOBINLINE}, {SOL_SOCKET, SO_REUSEADDR}, {SOL_SOCKET, SO_RCVLOWAT},
                   {SOL_SOCKET, SO_PRIORITY}, {IPPROTO_TCP, TCP_NODELAY}, {IPPROTO_TCP, TCP_KEEPIDLE}, {IPPROTO_TCP, TCP_KEEPCNT},
                   {IPPROTO_TCP, TCP_USER_TIMEOUT}, {IPPROTO_TCP, TCP_LINGER2}, {IPPROTO_IP, IP_TOS}, {IPPROTO_IP, IP_TTL},
                   {SOL_SOCKET, SO_ACCEPTCONN}};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        app_get(fd, options[i].level, options[i].name);
    struct timeval time = {0};
    struct linger linger = {0};
    socklen_t length = sizeof time;
    check(getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, &length) == 0);
    say("SO_RCVTIMEO %ld s", (long)time.tv_sec);
    length = sizeof linger;
    check(getsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, &length) == 0);
    say("SO_LINGER %d %d, flags %#x %#x", linger.l_onoff, linger.l_linger, fcntl(fd, F_GETFD), fcntl(fd, F_GETFL));
}

TWIN(inherited_options, "a", "S13, S22: an accepted connection has the options that it would have from TCP's listener")
{
    int listener = app_socket(AF_INET, SOCK_STREAM | NONBLOCK | SOCK_CLOEXEC);
    struct linger linger = {1, 9};
    app_set(listener, SOL_SOCKET, SO_KEEPALIVE, 1);
    app_set(listener, SOL_SOCKET, SO_PRIORITY, 3);
    app_set(listener, IPPROTO_TCP, TCP_NODELAY, 1);
    app_set(listener, IPPROTO_TCP, TCP_KEEPIDLE, 41);
    app_set_time(listener, SO_RCVTIMEO, 7000);
    check(app_bind(listener, LOOPBACK, 0) == 0);
    name_port("server", port_of(listener));
    app_set(listener, IPPROTO_IP, IP_TOS, 0x10);
    check(app_listen(listener, 9) == 0);
    CALLED(setsockopt(listener, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), "SO_LINGER");   /* after listen() */
    app_set(listener, SOL_SOCKET, SO_OOBINLINE, 1);
    app_set(listener, IPPROTO_TCP, TCP_KEEPCNT, 5);
    for (int four = 0; four < 3; four++) {
        int client = app_socket(AF_INET, SOCK_STREAM);
        here();
        check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
        int port = app_local(client);
        here();
        name_port("client", port);
        app_poll(listener, POLLIN, 1000);
        int server = four ? app_accept4(listener, four == 1 ? SOCK_CLOEXEC : SOCK_NONBLOCK) : app_accept(listener);
        static const char *const words[] = {"", " cloexec", " nonblocking"};
        char text[600];
        snprintf(text, sizeof text, "a.accept a-%d%s a1 127.0.0.1:server 127.0.0.1:client\n a.handle a1\n"
                 "a.setsockopt a1 1 9 1\n a.setsockopt a1 6 1 1\n a.setsockopt a1 1 20 7 0 0 0\n a.setsockopt a1 1 13 1 9\n a.setsockopt a1 1 10 1\n"
                 "a.detach a1\n a.unhandle a1", 1 + 2 * four, words[four]);
        called(text);
        look_at_options(server);
        app_close(server);
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

TWIN(accepted_is_a_connection, "a",
     "S16, S20, S22: what accept() gave is connected, and cannot listen, bind, accept or connect")
{
    struct pair pair = make_pair(LOOPBACK);
    here();
    app_local(pair.server);
    app_peer(pair.server);
    app_listen(pair.server, 4);
    app_bind(pair.server, LOOPBACK, 0);
    app_connect(pair.server, LOOPBACK, port_of(pair.listener));
    app_accept(pair.server);
    app_accept4(pair.listener, 0x12345);
    app_poll(pair.server, POLLIN | POLLOUT, 0);
    called_of(~0u, "");
    close_pair(&pair);
    nothing_left();
}

CASE(accept_fails, "ab",
     "S14, S16, S22: a failing wsp_accept takes nothing with it: no handle, no descriptor; others are accepted")
{
    static const struct {
        enum call call;
        bool handle;
        const char *calls;
    } rows[] = {
        {CALL_ACCEPT, false, "a.accept a-%d = %s"},
        {CALL_ACCEPT, true, "a.accept a-%d a1 127.0.0.1:server 127.0.0.1:client = %s\n a.handle a1\n a.unhandle a1"},
        {CALL_HANDLE, false, "a.accept a-%d a1 127.0.0.1:server 127.0.0.1:client = %s\n a.handle a1 = 0"},
        {CALL_DETACH, false, "a.accept a-%d a1 127.0.0.1:server 127.0.0.1:client\n a.handle a1\n a.detach a1 = %s\n"
                             "a.close a1\n a.unhandle a1"},
    };
    static const int errors[] = {ECONNABORTED, EMFILE, ENFILE, ENOMEM, ENOBUFS, EIO, EPIPE, EINTR, ENOENT,
                                 EOPNOTSUPP, ETIMEDOUT};
    int listener = serve(LOOPBACK), port = port_of(listener);
    app_block(listener, false);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (size_t j = 0; j < sizeof errors / sizeof *errors; j++) {
            char text[400];
            int client = client_by('a', port);
            orders[A].takes_handle = rows[i].handle;
            fail_call(A, rows[i].call, errors[j]);
            here();
            name_port("client", app_local(client));
            int first = (int)companions_made(A);
            check(app_accept(listener) == -1);
            bool short_of = errors[j] == EMFILE || errors[j] == ENFILE || errors[j] == ENOMEM || errors[j] == ENOBUFS;
            if (errno != EAGAIN && (!short_of || errno != errors[j]))   /* no error that TCP's accept() does not know */
                fail_case("%s became %s", strerrorname_np(errors[j]), strerrorname_np(errno));
            snprintf(text, sizeof text, rows[i].calls, first - 1, strerrorname_np(errors[j]));
            called_of(~QUESTIONS, text);
            check(recv(client, text, 1, 0) <= 0);   /* the fabric turned it away */
            close(client);
            orders[A] = (struct orders){0};
            for (const char *side = "abt"; *side; side++) {
                int good = client_by(*side, port);
                app_poll(listener, POLLIN, 1000);
                int server = app_accept(listener);
                served_by(server, *side);
                close(good);
                app_close(server);
            }
        }
    app_close(listener);
    nothing_left();
}

/* --- S23 --- */

CASE(full_backlog, "a", "S23: who finds the SAN's backlog full goes by TCP, and nobody is lost")
{
    enum { CLIENTS = 12 };
    int clients[CLIENTS], by_san = 0, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, 0);
    check(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 7) == 0);
    name_port("server", port_of(listener));
    int port = port_of(listener);
    for (int i = 0; i < CLIENTS; i++) {
        length = address_of(&address, LOOPBACK, port);
        clients[i] = socket(AF_INET, SOCK_STREAM, 0);
        check(connect(clients[i], (struct sockaddr *)&address, length) == 0);
        char name = (char)('A' + i);
        check(send(clients[i], &name, 1, 0) == 1);
        bool san = fdtable_companion(clients[i]);
        if (!san)
            stayed_because(clients[i], REASON_BACKLOG_FULL);
        by_san += san;
    }
    check(by_san == 8);                /* the kernel takes one more than it was told */
    char seen[CLIENTS + 1] = "";
    for (int i = 0; i < CLIENTS; i++) {
        char name;
        int server = accept(listener, NULL, NULL);
        check(server >= 0 && recv(server, &name, 1, 0) == 1 && name >= 'A' && name < 'A' + CLIENTS);
        seen[name - 'A']++;
        close(server);
    }
    for (int i = 0; i < CLIENTS; i++) {
        check(seen[i] == 1);
        close(clients[i]);
    }
    close(listener);
    nothing_left();
}

TWIN(closed_with_clients, "a",
     "S23: clients that wait at a listener are reset when it is closed or shut down, and new ones refused")
{
    for (int how = 0; how < 3; how++) {
        int listener = serve(LOOPBACK), port = port_of(listener), waiting[3];
        for (int i = 0; i < 3; i++) {
            waiting[i] = app_socket(AF_INET, SOCK_STREAM);
            check(app_connect(waiting[i], LOOPBACK, port) == 0);
            served_by(waiting[i], 'a');
        }
        app_send(waiting[1], "hello");
        if (how == 0)
            app_close(listener);
        else
            app_shutdown(listener, how == 1 ? SHUT_RD : SHUT_RDWR);
        for (int i = 0; i < 3; i++) {
            if (how == 0) {
                app_poll(waiting[i], POLLIN | POLLRDHUP, 1000);
                app_recv(waiting[i]);
            } else {                   /* D3: who has sent nothing may see the end instead of a reset */
                struct pollfd look = {waiting[i], POLLIN, 0};
                check(poll(&look, 1, 1000) == 1 && look.revents & POLLIN);
                check(recv(waiting[i], &(char){0}, 1, 0) <= 0);
            }
            app_recv(waiting[i]);
            app_close(waiting[i]);
        }
        int late = app_socket(AF_INET, SOCK_STREAM);
        app_connect(late, LOOPBACK, port);
        app_close(late);
        if (how) {
            app_poll(listener, POLLIN | POLLOUT, 0);
            app_accept(listener);
            app_listen(listener, 4);   /* and again: with a new companion */
            served_by(listener, 'a');
            struct sock *sock = fdtable_peek(listener);
            check(oracle || (sock && sock->ncompanions == 1 && companions_alive(A) == 1));
            late = app_socket(AF_INET, SOCK_STREAM);
            check(app_connect(late, LOOPBACK, port_of(listener)) == 0);
            served_by(late, 'a');
            app_close(app_accept(listener));
            app_close(late);
            app_close(listener);
        }
        nothing_left();
    }
}

TWIN(shut_down_and_connected, "a",
     "S14, S23: a listener that is shut down and connects: the old companion is closed once")
{
    static const enum completion ways[] = {AT_ONCE, BEFORE_RETURN, BY_THREAD};
    int other = serve("127.0.0.2"), port = port_of(other);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        here();
        int fd = app_socket(AF_INET, SOCK_STREAM);
        name_port("own", bind_somewhere(fd, LOOPBACK));
        check(app_listen(fd, 3) == 0);
        app_shutdown(fd, SHUT_RDWR);
        orders[A].completion = ways[i];
        check(app_connect(fd, "127.0.0.2", port) == 0);
        join_completions();
        called_of(1u << CALL_SOCKET | 1u << CALL_CLOSE | 1u << CALL_BIND,
                  "a.socket inet a1\n a.bind a1 127.0.0.1:own\n a.close a1\n a.socket inet a2\n a.bind a2 127.0.0.1:own");
        served_by(fd, 'a');
        app_local(fd);
        app_close(fd);
        check(companions_alive(A) == !oracle);
        app_close(app_accept(other));
    }
    app_close(other);
    nothing_left();
}

TWIN(closed_while_accepting, "a", "S23: shutdown() wakes the thread that waits in accept(), with TCP's error")
{
    int listener = serve(LOOPBACK);
    struct thread thread = {0};
    start(&thread, blocking_accept, listener);
    check(blocks(&thread));
    app_shutdown(listener, SHUT_RDWR);
    say("accept: %s", strerrorname_np(-finish(&thread)));
    app_close(listener);
    nothing_left();
}

CASE(handed_on, "ab",
     "S23: a listener that goes to another program before any accept() has silent companions, and new ones at the next")
{
    char *const nothing[] = {NULL};
    for (int cloexec = 0; cloexec < 2; cloexec++)
        for (int served = 0; served < 2; served++) {
            here();
            int listener = socket(AF_INET, SOCK_STREAM | (cloexec ? SOCK_CLOEXEC : 0), 0);
            struct sockaddr_storage address;
            socklen_t length = address_of(&address, LOOPBACK, 0);
            check(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 9) == 0);
            name_port("server", port_of(listener));
            length = address_of(&address, LOOPBACK, port_of(listener));
            for (int i = 0; i <= served; i++) {
                bool first = i < served, kept = first || cloexec || served;
                int client = socket(AF_INET, SOCK_STREAM, 0);
                if (!first) {
                    app_poll(listener, POLLIN, 0);
                    forget_records();
                    check(execve("/proc/nonexistent", nothing, nothing) == -1);
                    called_of(1u << CALL_SILENCE, kept ? "" : "a.silence a1\n b.silence b1");
                }
                check(connect(client, (struct sockaddr *)&address, length) == 0);
                served_by(client, kept ? 'a' : 't');
                int server = accept(listener, NULL, NULL);
                check(server >= 0);
                served_by(listener, 'a');
                close(client);
                close(server);
            }
            close(listener);
            nothing_left();
        }
}

CASE(retired_by_option, "a",
     "S13, S23, X9: an option that needs TCP retires a listener's companions; who waits is still served")
{
    int listener = serve(LOOPBACK), client = app_socket(AF_INET, SOCK_STREAM), late = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    here();
    check(app_set(listener, IPPROTO_IP, IP_MINTTL, 1) == 0);
    called("a.silence a-1");
    check(app_connect(late, LOOPBACK, port_of(listener)) == 0);
    served_by(late, 't');
    int first = app_accept(listener), second = app_accept(listener);
    check(first >= 0 && second >= 0);
    served_by(first, 'a');
    served_by(second, 't');
    app_block(listener, false);
    check(app_accept(listener) == -1 && errno == EAGAIN);
    served_by(listener, 't');
    stayed_because(listener, REASON_OPTION);
    app_close(first);
    app_close(second);
    app_close(client);
    app_close(late);
    app_close(listener);
    nothing_left();
}

/* --- S24 --- */

TWIN(second_listens, "ab",
     "S24, S29: where one provider cannot listen the others do; where none can, it is TCP's alone")
{
    for (int fails = 0; fails < 4; fails++) {
        fail_call(A, CALL_LISTEN, fails & 1 ? EADDRINUSE : 0);
        fail_call(B, CALL_LISTEN, fails & 2 ? EMFILE : 0);
        here();
        int listener = serve(LOOPBACK);
        char text[600];
        snprintf(text, sizeof text, "a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:server\n a.listen a1 16%s\n"
                 "b.socket inet b1\n b.handle b1\n b.bind b1 127.0.0.1:server\n b.listen b1 16%s",
                 fails & 1 ? " = EADDRINUSE\n a.close a1\n a.unhandle a1" : "",
                 fails & 2 ? " = EMFILE\n b.close b1\n b.unhandle b1" : "");
        called(text);
        served_by(listener, "abat"[fails]);
        if (fails == 3)
            stayed_because(listener, REASON_NO_DESCRIPTOR);
        orders[A] = orders[B] = (struct orders){0};
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
        served_by(client, "abat"[fails]);
        int server = app_accept(listener);
        app_close(server);
        app_close(client);
        app_close(listener);
        nothing_left();
    }
}

/* --- S25 --- */

static bool only_four(const struct subnet *subnet)
{
    return endpoint_is_v4(&subnet->address);
}

static bool nowhere(const struct subnet *subnet)
{
    (void)subnet;
    return false;
}

CASE(served_subnets, "ab", "S25: a provider is asked for the subnets that it says are its own, and for no others")
{
    orders[A].serves = only_four;
    int six = serve("::1");
    called("b.socket inet6 b1\n b.handle b1\n b.bind b1 [::1]:server\n b.listen b1 16 v6only");
    served_by(six, 'b');
    int four = serve(LOOPBACK);
    served_by(four, 'a');
    for (int i = 0; i < 2; i++) {
        int client = app_socket(i ? AF_INET : AF_INET6, SOCK_STREAM);
        check(app_connect(client, i ? LOOPBACK : "::1", port_of(i ? four : six)) == 0);
        served_by(client, i ? 'a' : 'b');
        app_close(client);
        app_close(app_accept(i ? four : six));
    }
    unsigned before = calls(A, CALL_SERVES);
    for (int i = 0; i < 20; i++) {
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(app_connect(client, LOOPBACK, port_of(four)) == 0);
        app_close(client);
        app_close(app_accept(four));
    }
    check(calls(A, CALL_SERVES) - before < 20);   /* the table remembers */
    app_close(six);
    app_close(four);
    nothing_left();
}

TWIN(served_nowhere, "a", "S7, S25: where no subnet is its own, a provider is asked nothing else, and TCP serves")
{
    orders[A].serves = nowhere;
    struct pair pair = make_pair(LOOPBACK);
    called_of(~QUESTIONS & ~(1u << CALL_REACH), "");
    served_by(pair.listener, 't');
    served_by(pair.client, 't');
    stayed_because(pair.listener, REASON_NOT_SERVED);
    stayed_because(pair.client, REASON_NOT_SERVED);
    close_pair(&pair);
    nothing_left();
}
