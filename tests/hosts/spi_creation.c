/* From socket() to a companion that is set up: S1 to S16. */
#include "spi_host.h"

#define LISTENING_AT(ip, words)                                                                                        \
    "a.socket inet a1\n"                                                                                               \
    "a.handle a1\n"                                                                                                    \
    "a.bind a1 " ip ":server\n"                                                                                        \
    "a.listen a1 " words "\n"

/* S3: what the switch keeps for a socket shows in nothing that the program sees. */
TWIN(nothing_at_socket, "a", "S1, S2, S3: socket() is the kernel's, and its number stays for the socket's life")
{
    int fd = app_socket(AF_INET, SOCK_STREAM), six = app_socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC);
    called_of(~0u, "");
    served_by(fd, 't');
    served_by(six, 't');
    check(oracle || (fdtable_peek(fd) && fdtable_peek(six) && fdtable_peek(fd) != fdtable_peek(six)));
    struct pair pair = make_pair(LOOPBACK);
    int before = app_local(pair.client);
    served_by(pair.client, 'a');
    check(fcntl(pair.client, F_GETFD) == 0 && fcntl(six, F_GETFD) == FD_CLOEXEC);
    check(app_send(pair.client, "on that number") == 14);
    app_recv(pair.server);
    check(app_local(pair.client) == before);
    close_pair(&pair);
    app_close(fd);
    app_close(six);
    nothing_left();
}

TWIN(nothing_at_bind, "a",
     "S4, S6: bind() is TCP's alone, to an address or to the wildcard, taken or not of this machine")
{
    static const char *const places[] = {LOOPBACK, EVERYWHERE, "127.0.0.9", "::", "::1", "192.0.2.1", "::ffff:127.0.0.1"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int fd = app_socket(strchr(places[i], ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
        app_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
        if (app_bind(fd, places[i], 0) == 0) {
            int other = app_socket(strchr(places[i], ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
            name_port("taken", port_of(fd));
            app_local(fd);
            app_bind(fd, places[i], 0);
            app_bind(other, places[i], port_of(fd));
            app_close(other);
        }
        served_by(fd, 't');
        app_close(fd);
    }
    called_of(~0u, "");
    nothing_left();
}

TWIN(wildcard_takes_all, "ab", "S5, S21, S29: a listener on the wildcard takes clients of TCP and of each provider")
{
    static const char *const places[] = {EVERYWHERE, "::"};
    for (size_t i = 0; i < 2; i++) {
        here();
        int listener = serve(places[i]), port = port_of(listener);
        if (i == 0)
            called("a.socket inet a1\n a.handle a1\n a.bind a1 0.0.0.0:server\n a.listen a1 16\n"
                   "b.socket inet b1\n b.handle b1\n b.bind b1 0.0.0.0:server\n b.listen b1 16");
        else
            called("a.socket inet6 a1\n a.handle a1\n a.bind a1 [::]:server\n a.listen a1 16\n"
                   "b.socket inet6 b1\n b.handle b1\n b.bind b1 [::]:server\n b.listen b1 16");
        static const char *const targets[] = {LOOPBACK, "127.0.0.5", "::1", "::ffff:127.0.0.1"};
        for (size_t j = 0; j < (i ? 4 : 2); j++)
            for (int via = 0; via < 3; via++) {
                int family = strchr(targets[j], ':') ? AF_INET6 : AF_INET;
                fail_call(A, CALL_CONNECT, via > 0 ? ENOENT : 0);
                fail_call(B, CALL_CONNECT, via > 1 ? ENOENT : 0);
                int client = app_socket(family, SOCK_STREAM);
                check(app_connect(client, targets[j], port) == 0);
                served_by(client, "abt"[via]);
                int server = app_accept(listener);
                served_by(server, "abt"[via]);
                app_send(client, "hello");
                app_recv(server);
                app_peer(client);
                app_local(server);
                app_close(server);
                app_close(client);
            }
        app_close(listener);
    }
    nothing_left();
}

/* --- S6: when it is decided --- */

/* S9: the exchange of handles stands in the record, in its place among the calls. */
TWIN(decided_at_connect, "a", "S6, S9, S11, S15: one connection, call by call: nothing before listen and connect")
{
    int listener = app_socket(AF_INET, SOCK_STREAM);
    app_set(listener, SOL_SOCKET, SO_REUSEADDR, 1);
    app_bind(listener, LOOPBACK, 0);
    name_port("server", port_of(listener));
    called_of(~0u, "");
    app_listen(listener, 7);
    called(LISTENING_AT(LOOPBACK, "7"));
    served_by(listener, 'a');
    int client = app_socket(AF_INET, SOCK_STREAM);
    app_set(client, IPPROTO_TCP, TCP_NODELAY, 1);
    called_of(~0u, "");
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    name_port("client", app_local(client));
    called("a.reach 127.0.0.1:server\n"
           "a.socket inet a2\n"
           "a.handle a2\n"
           "a.bind a2 127.0.0.1:client\n"
           "a.setsockopt a2 6 1 1\n"
           "a.connect a2 127.0.0.1:server\n"
           "a.detach a2\n"
           "a.unhandle a2\n");
    int server = app_accept4(listener, SOCK_NONBLOCK | SOCK_CLOEXEC);
    called("a.accept a1 nonblocking cloexec a3 127.0.0.1:server 127.0.0.1:client\n"
           "a.handle a3\n"
           "a.detach a3\n"
           "a.unhandle a3\n");
    check(fcntl(server, F_GETFD) == FD_CLOEXEC && fcntl(server, F_GETFL) & O_NONBLOCK);
    app_send(client, "data");
    app_poll(server, POLLIN, 1000);
    app_recv(server);
    app_recv(server);
    app_close(client);
    app_poll(server, POLLIN, 1000);
    app_recv(server);
    app_close(server);
    called_of(~0u, "");
    app_close(listener);
    called("a.close a1\n a.unhandle a1");
    nothing_left();
}

static ssize_t fast_open(int fd, int port, bool message)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, port);
    struct iovec text = {"fast", 4};
    struct msghdr header = {.msg_name = &address, .msg_namelen = length, .msg_iov = &text, .msg_iovlen = 1};
    return message ? CALLED(sendmsg(fd, &header, MSG_FASTOPEN), "sendmsg(MSG_FASTOPEN)")
                   : CALLED(sendto(fd, "fast", 4, MSG_FASTOPEN, (struct sockaddr *)&address, length), "sendto(MSG_FASTOPEN)");
}

TWIN(decided_at_fast_open, "a", "S6: sendto() and sendmsg() with MSG_FASTOPEN connect, and decide")
{
    int listener = serve(LOOPBACK);
    for (int message = 0; message < 2; message++) {
        here();
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(fast_open(client, port_of(listener), message) == 4);
        name_port("client", app_local(client));
        called("a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"
               "a.connect a1 127.0.0.1:server\n a.detach a1\n a.unhandle a1");
        served_by(client, 'a');
        int server = app_accept(listener);
        app_recv(server);
        fast_open(client, port_of(listener), message);
        app_close(server);
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

TWIN(decided_for_each_connection, "addresses", "S6, S29: one program, three destinations, three ways")
{
    int listener = serve(EVERYWHERE), port = port_of(listener);
    static const char *const targets[] = {LOOPBACK, "127.0.0.2", "127.0.0.3", LOOPBACK};
    for (size_t i = 0; i < 4; i++) {
        int client = app_socket(AF_INET, SOCK_STREAM);
        check(app_connect(client, targets[i], port) == 0);
        served_by(client, "abta"[i]);
        int server = app_accept(listener);
        served_by(server, "abta"[i]);
        app_close(server);
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

TWIN(listener_by_policy, "connects", "S6, S7: a listener that policy leaves to TCP is asked about nothing")
{
    int listener = serve(LOOPBACK);
    called_of(~0u, "");
    stayed_because(listener, REASON_POLICY_TCP);
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    served_by(client, 't');
    stayed_because(client, REASON_NO_COMPANION);
    int server = app_accept(listener);
    app_send(client, "plain");
    app_recv(server);
    app_close(server);
    app_close(client);
    app_close(listener);
    nothing_left();
}

/* --- S8 --- */

CASE(never_asked, "a",
     "S8: raw, datagram, multicast and local sockets, other protocols of streams: no provider is asked")
{
    static const struct {
        int family, type, protocol;
    } kinds[] = {
        {AF_INET, SOCK_DGRAM, 0},       {AF_INET6, SOCK_DGRAM, IPPROTO_UDP}, {AF_INET, SOCK_RAW, IPPROTO_ICMP},
        {AF_INET, SOCK_RAW, IPPROTO_TCP}, {AF_INET6, SOCK_RAW, IPPROTO_ICMPV6}, {AF_INET, SOCK_STREAM, IPPROTO_SCTP},
        {AF_INET, SOCK_STREAM, 262},    {AF_INET6, SOCK_STREAM, 262},        {AF_INET, SOCK_SEQPACKET, IPPROTO_SCTP},
        {AF_UNIX, SOCK_STREAM, 0},      {AF_UNIX, SOCK_DGRAM, 0},            {AF_NETLINK, SOCK_RAW, 0},
        {AF_PACKET, SOCK_RAW, 0},
    };
    int opened = 0;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        int fd = socket(kinds[i].family, kinds[i].type | SOCK_NONBLOCK, kinds[i].protocol);
        if (fd < 0)                    /* this kernel or user has no such socket */
            continue;
        opened++;
        check(!fdtable_peek(fd));
        struct sockaddr_storage address;
        bool six = kinds[i].family == AF_INET6;
        socklen_t length = address_of(&address, six ? "::1" : LOOPBACK, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
        if (kinds[i].family == AF_INET || six) {
            if (kinds[i].type == SOCK_DGRAM) {
                struct ip_mreqn group = {.imr_multiaddr = {htonl(0xe0000001)}, .imr_address = {htonl(0x7f000001)}};
                setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group);
            }
            bind(fd, (struct sockaddr *)&address, length);
            listen(fd, 4);
            accept(fd, NULL, NULL);
            address_of(&address, six ? "::1" : LOOPBACK, 9);
            connect(fd, (struct sockaddr *)&address, length);
            sendto(fd, "x", 1, MSG_FASTOPEN | MSG_NOSIGNAL, (struct sockaddr *)&address, length);
        } else {
            listen(fd, 4);
        }
        close(fd);
    }
    check(opened >= 4);
    called_of(~0u, "");
    nothing_left();
}

/* --- S9, S10 --- */

static wpu_handle seen_handle;
static unsigned looks;

static void look_at_handles(enum provider provider, enum call call)
{
    unsigned number = companions_made(provider);
    uintptr_t context = 0;
    if (call != CALL_BIND && call != CALL_SETSOCKOPT && call != CALL_CONNECT && call != CALL_LISTEN && call != CALL_DETACH)
        return;
    wpu_handle handle = companion_handle(provider, number);
    check(handle && handle != seen_handle);
    check(wpu_query_socket_handle_context(handle, &context) == 0);
    check(context && context == companion_context(provider, number));
    looks++;
}

CASE(handles_work, "a", "S9, S10: from wsp_socket to wsp_detach the handle leads back to what the switch gave")
{
    orders[A].before = look_at_handles;
    int listener = serve(LOOPBACK);
    check(looks == 2);
    seen_handle = companion_handle(A, 1);
    int client = app_socket(AF_INET, SOCK_STREAM);
    app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    check(looks == 6);
    int server = app_accept(listener);
    check(looks == 7);
    uintptr_t context;
    check(wpu_query_socket_handle_context(companion_handle(A, 1), &context) == 0);   /* the listener is still set up */
    check(wpu_query_socket_handle_context(companion_handle(A, 2), &context) == -ENOTSOCK);
    check(wpu_query_socket_handle_context(companion_handle(A, 3), &context) == -ENOTSOCK);
    app_close(server);
    app_close(client);
    app_close(listener);
    nothing_left();
}

/* --- S11, S12 --- */

static int parked_port(int fd, char ip[64])
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    struct endpoint ep;
    struct sock *sock = fdtable_peek(fd);
    check(sock && real.getsockname(sock->shadow, (struct sockaddr *)&address, &length) == 0);
    check(endpoint_from_sockaddr(&ep, (struct sockaddr *)&address, length));
    endpoint_text(&ep, ip, 64);
    *strrchr(ip, ':') = 0;
    return ep.port;
}

struct local {
    const char *bound;                 /* NULL: not bound */
    int family;
    bool port;                         /* a port is chosen */
    const char *target, *remote, *companion;   /* where it connects; that and the local address, as the provider has it */
    int option;                        /* IP_BIND_ADDRESS_NO_PORT is set */
};

static const struct local locals[] = {
    {NULL, AF_INET, false, "127.0.0.1", "127.0.0.1", "127.0.0.1", 0},
    {NULL, AF_INET, false, "127.0.0.7", "127.0.0.7", "127.0.0.1", 0},
    {NULL, AF_INET6, false, "::1", "[::1]", "[::1]", 0},
    {NULL, AF_INET6, false, "::ffff:127.0.0.1", "127.0.0.1", "127.0.0.1", 0},
    {"0.0.0.0", AF_INET, false, "127.0.0.1", "127.0.0.1", "127.0.0.1", 0},
    {"0.0.0.0", AF_INET, true, "127.0.0.1", "127.0.0.1", "127.0.0.1", 0},
    {"0.0.0.0", AF_INET, false, "127.0.0.1", "127.0.0.1", "127.0.0.1", 1},
    {"::", AF_INET6, false, "::1", "[::1]", "[::1]", 0},
    {"::", AF_INET6, true, "::1", "[::1]", "[::1]", 0},
    {"::", AF_INET6, true, "::ffff:127.0.0.1", "127.0.0.1", "127.0.0.1", 0},
    {"127.0.0.3", AF_INET, false, "127.0.0.1", "127.0.0.1", "127.0.0.3", 0},
    {"127.0.0.3", AF_INET, true, "127.0.0.1", "127.0.0.1", "127.0.0.3", 0},
    {"127.0.0.3", AF_INET, false, "127.0.0.1", "127.0.0.1", "127.0.0.3", 1},
    {"::1", AF_INET6, true, "::1", "[::1]", "[::1]", 0},
    {"::ffff:127.0.0.4", AF_INET6, true, "::ffff:127.0.0.1", "127.0.0.1", "127.0.0.4", 0},
};

TWIN(local_addresses, "a",
     "S11, S12, S26: wsp_bind has a concrete address and the TCP socket's port, however it was bound")
{
    int listener = serve("::"), port = port_of(listener);
    for (size_t i = 0; i < sizeof locals / sizeof *locals; i++) {
        const struct local *row = &locals[i];
        char text[200], parked[64];
        here();
        int client = app_socket(row->family, SOCK_STREAM);
        if (row->option)
            check(app_set(client, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1) == 0);
        if (row->bound && row->port)
            bind_somewhere(client, row->bound);
        else if (row->bound)
            check(app_bind(client, row->bound, 0) == 0);
        check(app_connect(client, row->target, port) == 0);
        int own = app_local(client);
        check(own > 0);
        name_port("client", own);
        served_by(client, 'a');
        if (!oracle)
            check(parked_port(client, parked) == own);   /* the real socket holds the same port */
        snprintf(text, sizeof text, "a.reach %s:server\n a.bind a1 %s:client\n a.connect a1 %s:server", row->remote,
                 row->companion, row->remote);
        called_of(1u << CALL_REACH | 1u << CALL_BIND | 1u << CALL_CONNECT, text);
        int server = app_accept(listener);
        app_local(server);
        app_peer(server);
        app_peer(client);
        app_close(server);
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

CASE(source_of_the_provider, "a",
     "S12: an unbound socket gets the address that the provider names, and a real port there")
{
    char parked[64];
    int listener = serve(LOOPBACK);
    orders[A].source = "127.0.0.77";
    here();
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    name_port("client", app_local(client));
    check(parked_port(client, parked) == app_local(client) && strcmp(parked, "127.0.0.77") == 0);
    called_of(1u << CALL_BIND, "a.bind a1 127.0.0.77:client");
    int bound = app_socket(AF_INET, SOCK_STREAM);   /* but the program's own choice counts */
    check(app_bind(bound, "127.0.0.8", 0) == 0);
    name_port("bound", port_of(bound));
    check(app_connect(bound, LOOPBACK, port_of(listener)) == 0);
    called_of(1u << CALL_BIND, "a.bind a2 127.0.0.8:bound");
    app_close(client);
    app_close(bound);
    app_close(listener);
    nothing_left();
}

TWIN(listener_addresses, "a",
     "S11, S12: a listener's wildcard stays one, with the real port; an address is given as it is")
{
    static const struct {
        const char *ip;
        int v6only;
        const char *bind, *listen;
    } rows[] = {
        {LOOPBACK, 0, "inet a1\n a.handle a1\n a.bind a1 127.0.0.1:server", "a.listen a1 5"},
        {"127.0.0.9", 0, "inet a1\n a.handle a1\n a.bind a1 127.0.0.9:server", "a.listen a1 5"},
        {EVERYWHERE, 0, "inet a1\n a.handle a1\n a.bind a1 0.0.0.0:server", "a.listen a1 5"},
        {"::1", 0, "inet6 a1\n a.handle a1\n a.bind a1 [::1]:server", "a.listen a1 5 v6only"},
        {"::", 0, "inet6 a1\n a.handle a1\n a.bind a1 [::]:server", "a.listen a1 5"},
        {"::", 1, "inet6 a1\n a.handle a1\n a.bind a1 [::]:server", "a.listen a1 5 v6only"},
        {"::ffff:127.0.0.1", 0, "inet6 a1\n a.handle a1\n a.bind a1 127.0.0.1:server", "a.listen a1 5"},
        {NULL, 0, "inet a1\n a.handle a1\n a.bind a1 0.0.0.0:server", "a.listen a1 5"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[300];
        here();
        int fd = app_socket(rows[i].ip && strchr(rows[i].ip, ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
        if (rows[i].v6only)
            app_set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
        if (rows[i].ip)
            check(app_bind(fd, rows[i].ip, 0) == 0);
        check(app_listen(fd, 5) == 0);
        name_port("server", port_of(fd));
        app_local(fd);
        snprintf(text, sizeof text, "a.socket %s\n %s", rows[i].bind, rows[i].listen);
        called(text);
        app_close(fd);
        called("a.close a1\n a.unhandle a1");
    }
    nothing_left();
}

/* --- S13 --- */

TWIN(options_before, "a", "S13: each option set before is told once, right after wsp_bind, if the provider has it")
{
    int listener = serve(LOOPBACK);
    struct linger linger = {1, 7};
    here();
    int client = app_socket(AF_INET, SOCK_STREAM);
    app_set(client, SOL_SOCKET, SO_SNDBUF, 30000);
    app_set(client, SOL_SOCKET, SO_REUSEADDR, 1);                 /* not the provider's */
    app_set(client, IPPROTO_TCP, TCP_NODELAY, 1);
    app_set(client, IPPROTO_IP, IP_TOS, 16);
    app_set(client, SOL_SOCKET, SO_SNDBUF, 40000);                /* again: the last value, once */
    check(app_bind(client, LOOPBACK, 0) == 0);
    app_set_time(client, SO_SNDTIMEO, 1500);
    CALLED(setsockopt(client, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), "SO_LINGER");
    app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
    app_set(client, IPPROTO_TCP, TCP_KEEPIDLE, 50);
    app_set(client, SOL_SOCKET, 9999, 1);                         /* no option: not recorded */
    app_set(client, IPPROTO_TCP, TCP_KEEPCNT, 0);                 /* a wrong value */
    called_of(~0u, "");
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    name_port("client", app_local(client));
    called_of(~QUESTIONS | 1u << CALL_SUPPORTS,
              "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"
              "a.supports 1 7\n a.setsockopt a1 1 7 40000\n"
              "a.supports 1 2\n"
              "a.supports 6 1\n a.setsockopt a1 6 1 1\n"
              "a.supports 0 1\n"
              "a.supports 1 21\n a.setsockopt a1 1 21 1 0 500000 0\n"
              "a.supports 1 13\n a.setsockopt a1 1 13 1 7\n"
              "a.supports 1 9\n a.setsockopt a1 1 9 1\n"
              "a.supports 6 4\n"
              "a.connect a1 127.0.0.1:server\n a.detach a1\n a.unhandle a1");
    app_get(client, SOL_SOCKET, SO_REUSEADDR);
    app_get(client, SOL_SOCKET, SO_KEEPALIVE);
    app_get(client, IPPROTO_TCP, TCP_NODELAY);
    app_get(client, IPPROTO_TCP, TCP_KEEPIDLE);
    app_get(client, IPPROTO_IP, IP_TOS);
    app_get(client, SOL_SOCKET, SO_SNDBUF);
    int alive = 0;
    socklen_t length = sizeof alive;
    check(real.getsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &alive, &length) == 0 && alive);   /* the companion has it */
    app_close(client);
    app_close(listener);
    nothing_left();
}

TWIN(options_of_listener, "a", "S13: the same for a listener; later ones go to its companion as well")
{
    int fd = app_socket(AF_INET, SOCK_STREAM);
    app_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    app_set(fd, SOL_SOCKET, SO_RCVBUF, 50000);
    check(app_bind(fd, LOOPBACK, 0) == 0);
    name_port("server", port_of(fd));
    app_set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    check(app_listen(fd, 9) == 0);
    called("a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:server\n a.setsockopt a1 1 8 50000\n"
           "a.setsockopt a1 6 1 1\n a.listen a1 9");
    app_set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    app_set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 77);
    app_set(fd, SOL_SOCKET, SO_RCVBUF, 60000);
    app_set(fd, IPPROTO_TCP, TCP_KEEPCNT, 0);                     /* a wrong value is told to nobody */
    called("a.setsockopt a1 1 9 1\n a.setsockopt a1 1 8 60000");
    app_close(fd);
    nothing_left();
}

TWIN(options_after, "a", "S13: what is set on a connection later is on its companion, if that has it, and reads back")
{
    struct pair pair = make_pair(LOOPBACK);
    struct linger linger = {1, 3};
    app_set(pair.client, SOL_SOCKET, SO_KEEPALIVE, 1);
    app_set(pair.server, SOL_SOCKET, SO_OOBINLINE, 1);
    app_set(pair.client, IPPROTO_TCP, TCP_NODELAY, 1);
    app_set(pair.client, IPPROTO_IP, IP_TOS, 8);
    app_set_time(pair.client, SO_RCVTIMEO, 2500);
    CALLED(setsockopt(pair.client, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), "SO_LINGER");
    for (int i = 0; i < 2; i++) {
        int fd = i ? pair.server : pair.client;
        app_get(fd, SOL_SOCKET, SO_KEEPALIVE);
        app_get(fd, SOL_SOCKET, SO_OOBINLINE);
        app_get(fd, IPPROTO_TCP, TCP_NODELAY);
        app_get(fd, IPPROTO_IP, IP_TOS);
    }
    struct linger seen = {0};
    socklen_t length = sizeof seen;
    check(real.getsockopt(pair.client, SOL_SOCKET, SO_LINGER, &seen, &length) == 0 && seen.l_onoff && seen.l_linger == 3);
    close_pair(&pair);
    nothing_left();
}

CASE(options_of_second, "ab", "S13, S29: each provider is told all options that it has itself")
{
    int listener = serve(LOOPBACK);
    fail_call(A, CALL_SETSOCKOPT, ENOPROTOOPT);
    int client = app_socket(AF_INET, SOCK_STREAM);
    app_set(client, SOL_SOCKET, SO_SNDBUF, 30000);
    app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
    here();
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    called_of(1u << CALL_SETSOCKOPT, 
              "a.setsockopt a1 1 7 30000 = ENOPROTOOPT\n b.setsockopt b1 1 7 30000\n b.setsockopt b1 1 9 1");
    served_by(client, 'b');
    app_close(client);
    app_close(listener);
    nothing_left();
}

/* --- S14, S15, S24 --- */

struct failure {
    enum call call;
    unsigned nth;                      /* 0: each */
    bool takes_handle;
    const char *calls;
};

static const int errors[] = {EPERM, ENOMEM, EMFILE, ENFILE, ENOBUFS, EACCES, EAGAIN, EINVAL, EIO, EADDRINUSE, ENETUNREACH,
                             ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT, EINTR, ENOTSOCK, EOPNOTSUPP};

#define SET_UP "a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:own\n"
#define OPTIONS "a.setsockopt a1 1 7 30000\n a.setsockopt a1 1 9 1\n"
#define CLOSED "a.close a1\n a.unhandle a1"

static const struct failure connecting[] = {
    {CALL_SOCKET, 0, false, "a.reach 127.0.0.1:server\n a.socket inet a1 = %s"},
    {CALL_SOCKET, 0, true, "a.reach 127.0.0.1:server\n a.socket inet a1 = %s\n a.handle a1\n a.unhandle a1"},
    {CALL_HANDLE, 0, false, "a.reach 127.0.0.1:server\n a.socket inet a1 = %s\n a.handle a1 = 0"},
    {CALL_BIND, 0, false, "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:own = %s\n"
                          CLOSED},
    {CALL_SETSOCKOPT, 1, false, "a.reach 127.0.0.1:server\n" SET_UP "a.setsockopt a1 1 7 30000 = %s\n " CLOSED},
    {CALL_SETSOCKOPT, 2, false, "a.reach 127.0.0.1:server\n" SET_UP "a.setsockopt a1 1 7 30000\n a.setsockopt a1 1 9 1 = %s\n"
                                CLOSED},
    {CALL_POLL_FD, 0, false, "a.reach 127.0.0.1:server\n" SET_UP OPTIONS CLOSED},
};

static const struct failure listening[] = {
    {CALL_SOCKET, 0, false, "a.socket inet a1 = %s"},
    {CALL_SOCKET, 0, true, "a.socket inet a1 = %s\n a.handle a1\n a.unhandle a1"},
    {CALL_HANDLE, 0, false, "a.socket inet a1 = %s\n a.handle a1 = 0"},
    {CALL_BIND, 0, false, "a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:own = %s\n " CLOSED},
    {CALL_SETSOCKOPT, 1, false, SET_UP "a.setsockopt a1 1 7 30000 = %s\n " CLOSED},
    {CALL_SETSOCKOPT, 2, false, SET_UP "a.setsockopt a1 1 7 30000\n a.setsockopt a1 1 9 1 = %s\n " CLOSED},
    {CALL_POLL_FD, 0, false, SET_UP OPTIONS CLOSED},
    {CALL_LISTEN, 0, false, SET_UP OPTIONS "a.listen a1 16 = %s\n" CLOSED},
    {CALL_LISTEN, 0, true, SET_UP OPTIONS "a.listen a1 16 = %s\n" CLOSED},
};

static int reason_for(int error)
{
    switch (error) {
    case EAGAIN: return REASON_BACKLOG_FULL;
    case EPERM: return REASON_STRANGER;
    case EACCES: return REASON_PORT_PRIVILEGE;
    case EADDRINUSE: return REASON_NAME_TAKEN;
    case EMFILE:
    case ENFILE: return REASON_NO_DESCRIPTOR;
    case ENOMEM:
    case ENOBUFS: return REASON_NO_MEMORY;
    default: return REASON_PROVIDER_FAILED;
    }
}

static void order(const struct failure *row, int error)
{
    orders[A] = (struct orders){.takes_handle = row->takes_handle, .keeps_listening = row->takes_handle};
    fail_nth_call(A, row->call, error, row->nth ? calls(A, row->call) + row->nth : 0);
}

static void set_two(int fd)
{
    app_set(fd, SOL_SOCKET, SO_SNDBUF, 30000);
    app_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    app_set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
}

TWIN(failing_to_connect, "a",
     "S7, S9, S14, S15, T12: whatever fails while it is set up, with whatever code, TCP serves; closed once")
{
    int listener = serve(LOOPBACK);
    for (size_t i = 0; i < sizeof connecting / sizeof *connecting; i++)
        for (size_t j = 0; j < sizeof errors / sizeof *errors; j++) {
            char text[600];
            order(&connecting[i], errors[j]);
            int client = app_socket(AF_INET, SOCK_STREAM);
            set_two(client);
            here();
            check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
            name_tried("own");
            snprintf(text, sizeof text, connecting[i].calls, strerrorname_np(errors[j]));
            called(text);
            served_by(client, 't');
            stayed_because(client, reason_for(errors[j]));
            orders[A] = (struct orders){0};
            int server = app_accept(listener);
            served_by(server, 't');
            app_send(client, "by TCP");
            app_recv(server);
            app_error(client);
            app_connect(client, LOOPBACK, port_of(listener));
            check(companions_alive(A) == !oracle);
            app_close(server);
            app_close(client);
            here();
        }
    app_close(listener);
    nothing_left();
}

TWIN(failing_to_listen, "a", "S7, S14, S24, T12: the same for a listener, wsp_listen included; it says why")
{
    for (size_t i = 0; i < sizeof listening / sizeof *listening; i++)
        for (size_t j = 0; j < sizeof errors / sizeof *errors; j++) {
            char text[600];
            order(&listening[i], errors[j]);
            int listener = app_socket(AF_INET, SOCK_STREAM);
            set_two(listener);
            check(app_bind(listener, LOOPBACK, 0) == 0);
            here();
            name_port("own", port_of(listener));
            check(app_listen(listener, 16) == 0);
            snprintf(text, sizeof text, listening[i].calls, strerrorname_np(errors[j]));
            called(text);
            served_by(listener, 't');
            stayed_because(listener, reason_for(errors[j]));
            check(!(fcntl(listener, F_GETFL) & O_NONBLOCK));
            orders[A] = (struct orders){0};
            int client = tcp_client(LOOPBACK, port_of(listener));
            check(client >= 0);
            int server = app_accept(listener);
            check(real.send(client, "by TCP", 6, 0) == 6);
            app_recv(server);
            app_close(server);
            app_close(listener);
            real.close(client);
            nothing_left();
            here();
        }
}

TWIN(failing_to_close, "a", "S14: what a provider says at the end changes nothing for the program")
{
    fail_call(A, CALL_CLOSE, EIO);
    int listener = serve(LOOPBACK), client = app_socket(AF_INET, SOCK_STREAM);
    fail_nth_call(A, CALL_CONNECT, ENOENT, 1);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    name_port("own", app_local(client));
    called_of(1u << CALL_CONNECT | 1u << CALL_CLOSE, "a.connect a2 127.0.0.1:server = ENOENT\n a.close a2 = EIO");
    app_shutdown(listener, SHUT_RDWR);
    check(app_listen(listener, 4) == 0);
    called_of(1u << CALL_CLOSE, "a.close a1 = EIO");
    app_close(client);
    app_close(listener);
    nothing_left();
}

CASE(strict_failures, "strict",
     "S14, X7: where the policy wants SAN or nothing, a failure of the last provider is the program's")
{
    int listener = serve(LOOPBACK);
    for (size_t i = 0; i < sizeof connecting / sizeof *connecting; i++) {
        order(&connecting[i], ENOMEM);
        orders[B] = orders[A];
        orders[B].only[connecting[i].call] = 0;
        int client = app_socket(AF_INET, SOCK_STREAM);
        set_two(client);
        here();
        check(app_connect(client, LOOPBACK, port_of(listener)) == -1 && errno == ECONNREFUSED);
        orders[A] = orders[B] = (struct orders){0};
        check(companions_alive(A) == 1 && companions_alive(B) == 1);   /* the listener's */
        check(app_connect(client, LOOPBACK, port_of(listener)) == 0);   /* the socket is as it was */
        served_by(client, 'a');
        app_close(client);
        app_close(app_accept(listener));
    }
    app_close(listener);
    nothing_left();
    fail_call(A, CALL_LISTEN, EADDRINUSE);
    fail_call(B, CALL_BIND, ENOMEM);
    int fd = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(fd, LOOPBACK, 0) == 0);
    check(app_listen(fd, 3) == -1 && errno == EADDRNOTAVAIL);
    app_close(fd);
    nothing_left();
}

/* --- S16 --- */

static void look(int fd)
{
    static const struct {
        int level, name;
    } options[] = {{SOL_SOCKET, SO_DOMAIN},    {SOL_SOCKET, SO_TYPE},     {SOL_SOCKET, SO_PROTOCOL}, {SOL_SOCKET, SO_ACCEPTCONN},
                   {SOL_SOCKET, SO_ERROR},     {SOL_SOCKET, SO_REUSEADDR}, {SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_BROADCAST},
                   {SOL_SOCKET, SO_REUSEPORT}, {SOL_SOCKET, SO_PRIORITY}, {SOL_SOCKET, SO_RCVLOWAT}, {SOL_SOCKET, SO_OOBINLINE},
                   {IPPROTO_TCP, TCP_NODELAY}, {IPPROTO_TCP, TCP_CORK},   {IPPROTO_TCP, TCP_KEEPIDLE}, {IPPROTO_TCP, TCP_SYNCNT},
                   {IPPROTO_TCP, TCP_LINGER2}, {IPPROTO_IP, IP_TOS},      {IPPROTO_IP, IP_TTL}};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        app_get(fd, options[i].level, options[i].name);
    say("flags %#x %#x", fcntl(fd, F_GETFD), fcntl(fd, F_GETFL));
    app_local(fd);
    app_peer(fd);
}

TWIN(invisible, "ab", "S16: nothing that the program can ask shows that there are companions")
{
    int none = app_socket(AF_INET, SOCK_STREAM);
    struct pair pair = make_pair(LOOPBACK);
    look(none);
    look(pair.listener);
    look(pair.client);
    look(pair.server);
    app_poll(pair.listener, POLLIN | POLLOUT, 0);
    app_poll(pair.client, POLLIN | POLLOUT | POLLRDHUP, 0);
    app_poll(pair.server, POLLIN | POLLOUT | POLLRDHUP, 0);
    app_send(pair.client, "seen");
    app_poll(pair.server, POLLIN | POLLOUT | POLLRDHUP, 1000);
    app_recv(pair.server);
    app_close(pair.client);
    app_poll(pair.server, POLLIN | POLLOUT | POLLRDHUP, 1000);
    app_recv(pair.server);
    app_error(pair.server);
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    check(getsockopt(pair.listener, IPPROTO_TCP, TCP_INFO, &info, &length) == 0);
    say("tcpi_state %d", info.tcpi_state);
    app_close(none);
    app_close(pair.server);
    app_close(pair.listener);
    nothing_left();
}
