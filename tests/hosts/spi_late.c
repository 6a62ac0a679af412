/* Connects that a provider completes later: S17, S18, S20, and how they are given up. */
#include "spi_host.h"
#include "clock.h"
#include <limits.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#define SETS_UP                                                                                                        \
    "a.reach 127.0.0.1:server\n a.socket inet a1\n a.handle a1\n a.bind a1 127.0.0.1:client\n"                         \
    "a.connect a1 127.0.0.1:server = EINPROGRESS\n"
#define DETACHES "a.complete a1 0\n a.detach a1\n a.unhandle a1\n"

static int pending(struct slow *slow, int flags)
{
    int client = app_socket(AF_INET, SOCK_STREAM | flags);
    check(app_connect(client, LOOPBACK, slow->port) == -1 && errno == EINPROGRESS);
    return client;
}

/* All that a program can ask while it waits. */
static void look_pending(int fd, int port)
{
    char text[16];
    struct iovec part = {text, sizeof text};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    int waiting = -1;
    app_connect(fd, LOOPBACK, port);
    app_connect(fd, "127.0.0.9", 9);
    app_poll(fd, POLLIN | POLLOUT | POLLPRI | POLLRDHUP, 0);
    app_poll(fd, POLLIN | POLLOUT, 20);
    app_select(fd, 0);
    app_select(fd, 20);
    app_error(fd);
    app_peer(fd);
    app_local(fd);
    app_send(fd, "too early");
    app_recv(fd);
    CALLED(write(fd, "x", 1), "write");
    CALLED(read(fd, text, 1), "read");
    CALLED(writev(fd, &part, 1), "writev");
    CALLED(readv(fd, &part, 1), "readv");
    CALLED(sendmsg(fd, &message, MSG_NOSIGNAL), "sendmsg");
    CALLED(recvmsg(fd, &message, 0), "recvmsg");
    CALLED(recv(fd, text, 1, MSG_PEEK), "recv(MSG_PEEK)");
    CALLED(recvfrom(fd, text, 1, MSG_DONTWAIT, NULL, NULL), "recvfrom");
    CALLED(ioctl(fd, FIONREAD, &waiting), "FIONREAD");
    say("%d waiting", waiting);
    app_listen(fd, 3);
    app_bind(fd, LOOPBACK, 0);
    CALLED(accept(fd, NULL, NULL), "accept");
    app_get(fd, SOL_SOCKET, SO_DOMAIN);
    app_get(fd, SOL_SOCKET, SO_TYPE);
    app_get(fd, SOL_SOCKET, SO_PROTOCOL);
    app_get(fd, SOL_SOCKET, SO_ACCEPTCONN);
    CALLED(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length), "TCP_INFO");
    say("state %d, flags %#x %#x", info.tcpi_state, fcntl(fd, F_GETFD), fcntl(fd, F_GETFL));
}

static void talk(int client, int server)
{
    app_send(client, "there");
    app_poll(server, POLLIN, 1000);
    app_recv(server);
    app_send(server, "and back");
    app_poll(client, POLLIN, 1000);
    app_recv(client);
}

TWIN(late_without_blocking, "a",
     "S17, S20: EINPROGRESS, EALREADY and silence until it is complete; then 0 once, then EISCONN")
{
    struct slow slow = slow_server();
    int client = pending(&slow, NONBLOCK | SOCK_CLOEXEC);
    look_pending(client, slow.port);
    name_port("client", app_local(client));
    called(SETS_UP);
    let_in(&slow);
    app_poll(client, POLLIN | POLLOUT, SOON);
    called(DETACHES);
    app_poll(client, POLLIN | POLLOUT | POLLRDHUP, 0);
    app_select(client, 0);
    app_error(client);
    app_peer(client);
    check(app_local(client) > 0);
    app_connect(client, LOOPBACK, slow.port);
    app_connect(client, LOOPBACK, slow.port);
    served_by(client, 'a');
    say("flags %#x %#x", fcntl(client, F_GETFD), fcntl(client, F_GETFL));
    int server = slow_accept(&slow);
    forget_records();
    talk(client, server);
    called_of(~0u, "");
    close(server);
    app_poll(client, POLLIN | POLLRDHUP, 1000);
    app_recv(client);
    app_close(client);
    close_slow(&slow);
    nothing_left();
}

/* --- who waits is woken --- */

static int blocking_connect(struct thread *thread)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, thread->port);
    errno = 4242;
    int result = connect(thread->fd, (struct sockaddr *)&address, length);
    return result == 0 ? errno == 4242 ? 0 : -1 : errno;
}

static int blocking_poll(struct thread *thread)
{
    struct pollfd look = {thread->fd, POLLIN | POLLOUT, 0};
    return poll(&look, 1, SOON) == 1 ? look.revents : -1;
}

static int blocking_select(struct thread *thread)
{
    fd_set in, out;
    FD_ZERO(&in);
    FD_SET(thread->fd, &in);
    out = in;
    struct timeval limit = {SOON / 1000, 0};
    int result = select(thread->fd + 1, &in, &out, NULL, &limit);
    return result < 0 ? -1 : result * 100 + (FD_ISSET(thread->fd, &in) ? 10 : 0) + (FD_ISSET(thread->fd, &out) ? 1 : 0);
}

static int blocking_epoll(struct thread *thread)
{
    struct epoll_event events[2];
    return epoll_wait(thread->fd, events, 2, SOON) == 1 ? (int)events[0].events : -1;
}

static int blocking_send(struct thread *thread)
{
    ssize_t sent = send(thread->fd, "patience", 8, 0);
    return sent < 0 ? -errno : (int)sent;
}

static int blocking_read(struct thread *thread)
{
    char text[16];
    ssize_t got = read(thread->fd, text, sizeof text);
    return got < 0 ? -errno : (int)got;
}

TWIN(late_sleepers, "a", "S17: connect, poll, select, epoll_wait, send and read that block wait for it, and go on then")
{
    static int (*const sleeps[])(struct thread *) = {blocking_connect, blocking_poll, blocking_select, blocking_epoll,
                                                     blocking_send, blocking_read, blocking_connect};
    enum { SLEEPERS = sizeof sleeps / sizeof *sleeps };
    struct slow slow = slow_server();
    struct thread threads[SLEEPERS] = {0};
    int clients[SLEEPERS], epfd = app_epoll();
    for (int i = 0; i < SLEEPERS; i++) {
        bool first = i == 0;           /* connects in its thread; the others, the last again, have been connecting */
        clients[i] = first ? app_socket(AF_INET, SOCK_STREAM) : pending(&slow, NONBLOCK);
        if (sleeps[i] == blocking_send || sleeps[i] == blocking_read || sleeps[i] == blocking_connect)
            app_block(clients[i], true);
        if (sleeps[i] == blocking_epoll)
            app_add(epfd, clients[i], EPOLLIN | EPOLLOUT);
        threads[i].port = slow.port;
        start(&threads[i], sleeps[i], sleeps[i] == blocking_epoll ? epfd : clients[i]);
    }
    for (int i = 0; i < SLEEPERS; i++)
        check(blocks(&threads[i]));
    let_in(&slow);
    for (int i = 0; i < SLEEPERS; i++)
        if (sleeps[i] != blocking_read)
            say("sleeper %d: %d", i, finish(&threads[i]));
    for (int i = 0; i < SLEEPERS; i++) {
        int server = slow_accept(&slow);
        check(send(server, "five!", 5, 0) == 5);
        close(server);
    }
    say("reader: %d", finish(&threads[5]));
    app_connect(clients[0], LOOPBACK, slow.port);
    app_connect(clients[6], LOOPBACK, slow.port);
    for (int i = 0; i < SLEEPERS; i++) {
        served_by(clients[i], 'a');
        close(clients[i]);
    }
    close(epfd);
    close_slow(&slow);
    nothing_left();
}

TWIN(late_epoll, "a",
     "S17: level, edge and one shot, registered before connect, while it is in progress, or when complete")
{
    static const uint32_t kinds[] = {0, EPOLLET, EPOLLONESHOT, EPOLLET | EPOLLONESHOT};
    struct slow slow = slow_server();
    int clients[12], epolls[12];
    for (int i = 0; i < 12; i++) {
        uint32_t events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | kinds[i % 4];
        epolls[i] = app_epoll();
        if (i < 4) {
            clients[i] = app_socket(AF_INET, SOCK_STREAM | NONBLOCK);
            app_add(epolls[i], clients[i], events);
            if (!(kinds[i] & EPOLLONESHOT))
                app_wait(epolls[i], 0);    /* a fresh socket shows a hang-up */
            app_connect(clients[i], LOOPBACK, slow.port);
            if (kinds[i] == EPOLLET)
                app_wait(epolls[i], 0);
        } else {
            clients[i] = pending(&slow, NONBLOCK);
            if (i < 8)
                app_add(epolls[i], clients[i], events);
        }
        check(epoll_wait(epolls[i], &(struct epoll_event){0}, 1, 10) == 0);
    }
    let_in(&slow);
    for (int i = 0; i < 12; i++) {
        say("epoll %d", i);
        if (i >= 8) {
            app_poll(clients[i], POLLOUT, SOON);
            app_add(epolls[i], clients[i], EPOLLIN | EPOLLOUT | EPOLLRDHUP | kinds[i % 4]);
        }
        app_wait(epolls[i], SOON);
        app_wait(epolls[i], 0);
        app_error(clients[i]);
        app_connect(clients[i], LOOPBACK, slow.port);
        if (kinds[i % 4] & EPOLLONESHOT) {
            struct epoll_event again = {.events = EPOLLIN | EPOLLRDHUP | kinds[i % 4], .data.fd = clients[i]};
            CALLED(epoll_ctl(epolls[i], EPOLL_CTL_MOD, clients[i], &again), "epoll_ctl(MOD)");
            app_wait(epolls[i], 0);
        }
    }
    for (int i = 0; i < 12; i++) {
        int server = slow_accept(&slow);
        check(send(server, "x", 1, 0) == 1);
        close(server);
    }
    for (int i = 0; i < 12; i++) {
        app_poll(clients[i], POLLRDHUP, 1000);
        int seen = epoll_wait(epolls[i], &(struct epoll_event){0}, 1, 1000);
        say("the end %d: %d", i, seen);
        served_by(clients[i], 'a');
        close(clients[i]);
        close(epolls[i]);
    }
    close_slow(&slow);
    nothing_left();
}

/* --- time limits, signals --- */

TWIN(late_time_limits, "a", "S17: SO_SNDTIMEO and SO_RCVTIMEO end the waiting, not the connecting")
{
    struct slow slow = slow_server();
    int client = app_socket(AF_INET, SOCK_STREAM);
    app_set_time(client, SO_SNDTIMEO, 60);
    app_set_time(client, SO_RCVTIMEO, 60);
    app_connect(client, LOOPBACK, slow.port);   /* EINPROGRESS */
    app_connect(client, LOOPBACK, slow.port);   /* EALREADY */
    app_send(client, "no");
    app_recv(client);
    app_poll(client, POLLIN | POLLOUT, 0);
    app_set_time(client, SO_SNDTIMEO, 0);
    app_recv(client);
    app_set_time(client, SO_RCVTIMEO, 0);
    app_set_time(client, SO_SNDTIMEO, 50);
    app_send(client, "no");
    app_set_time(client, SO_SNDTIMEO, 0);
    struct thread thread = {.port = slow.port};
    start(&thread, blocking_connect, client);
    check(blocks(&thread));
    let_in(&slow);
    say("connect: %d", finish(&thread));
    app_connect(client, LOOPBACK, slow.port);
    served_by(client, 'a');
    app_get(client, SOL_SOCKET, SO_ERROR);
    close(slow_accept(&slow));
    app_close(client);
    close_slow(&slow);
    nothing_left();
}

static _Atomic int handled;

static void handle(int number)
{
    (void)number;
    handled++;
}

TWIN(late_signals, "a", "S17: a signal ends the waiting with EINTR, or not, as its handler was installed")
{
    struct slow slow = slow_server();
    for (int restarts = 0; restarts < 2; restarts++) {
        struct sigaction action = {.sa_handler = handle, .sa_flags = restarts ? SA_RESTART : 0};
        sigaction(SIGUSR1, &action, NULL);
        int client = app_socket(AF_INET, SOCK_STREAM);
        struct thread thread = {.port = slow.port};
        start(&thread, blocking_connect, client);
        check(blocks(&thread));
        handled = 0;
        pthread_kill(thread.thread, SIGUSR1);
        say("connect %s", blocks(&thread) ? "goes on waiting" : strerrorname_np(finish(&thread)));
        check(handled == 1);
        if (!restarts) {
            app_poll(client, POLLOUT, 0);
            start(&thread, blocking_connect, client);
            check(blocks(&thread));
        }
        let_in(&slow);
        say("connect: %d", finish(&thread));
        served_by(client, 'a');
        close(slow_accept(&slow));
        app_close(client);
        if (oracle) {                  /* a full backlog again */
            close_slow(&slow);
            slow = slow_server();
        }
    }
    close_slow(&slow);
    nothing_left();
}

/* --- how it is given up --- */

CASE(late_close, "a",
     "S10, S14, S17: close() while in progress closes the companion once; who completes it later is told")
{
    struct slow slow = slow_server();
    for (int how = 0; how < 6; how++) {
        here();
        int client = pending(&slow, NONBLOCK), other = -1, epfd = app_epoll();
        name_port("client", app_local(client));
        app_add(epfd, client, EPOLLIN | EPOLLOUT);
        unsigned number = companions_made(A);
        wpu_handle handle = companion_handle(A, number);
        called(SETS_UP);
        switch (how) {
        case 0: app_close(client); break;
        case 1: check(close_range((unsigned)client, (unsigned)client, 0) == 0); break;
        case 2: check(dup2(slow.listener, client) == client); break;
        case 3: {
            FILE *stream = fdopen(client, "r+");
            check(stream && fclose(stream) == 0);
            break;
        }
        case 4:
            other = dup(client);
            app_close(client);
            called("");                /* not the last one */
            check(app_poll(other, POLLOUT, 0) == 0);
            app_close(other);
            break;
        default: {
            FILE *stream = fdopen(client, "r+");
            check(stream && freopen("/dev/null", "r", stream) == stream);
            client = fileno(stream);
            other = -2;
            called("a.close a1\n a.unhandle a1");
            fclose(stream);
        }
        }
        if (other != -2)
            called("a.close a1\n a.unhandle a1");
        if (how == 2)
            close(client);
        for (int error = 0; error < 200; error += 199)
            check(complete_handle(handle, error) == -ENOTSOCK);
        forget_records();
        close(epfd);
        check(companions_alive(A) == 1);   /* the listener's */
    }
    close_slow(&slow);
    nothing_left();
}

TWIN(late_shutdown, "a", "S17: shutdown() while in progress ends it; the socket can connect again")
{
    for (int how = 0; how < 3; how++) {
        struct slow slow = slow_server();
        int client = pending(&slow, NONBLOCK);
        name_port("client", app_local(client));
        app_shutdown(client, how);
        called(SETS_UP "a.close a1\n a.unhandle a1");
        served_by(client, 't');
        app_poll(client, POLLIN | POLLOUT, 0);
        app_peer(client);
        app_error(client);
        app_error(client);
        orders[A].completion = AT_ONCE;
        int other = serve(LOOPBACK);
        app_connect(client, LOOPBACK, port_of(other));
        app_poll(client, POLLOUT, 1000);
        app_connect(client, LOOPBACK, port_of(other));
        app_close(client);
        app_close(other);
        close_slow(&slow);
        nothing_left();
    }
}

TWIN(late_disconnect, "a", "S17: connect() to AF_UNSPEC while in progress ends it; the socket can connect again")
{
    struct slow slow = slow_server();
    for (int blocking = 0; blocking < 2; blocking++) {
        here();
        int client = pending(&slow, NONBLOCK);
        app_block(client, blocking);
        struct sockaddr nothing = {.sa_family = AF_UNSPEC};
        name_port("client", app_local(client));
        CALLED(connect(client, &nothing, sizeof nothing), "connect(AF_UNSPEC)");
        called(SETS_UP "a.close a1\n a.unhandle a1");
        served_by(client, 't');
        app_poll(client, POLLIN | POLLOUT, 0);
        app_error(client);
        app_error(client);
        CALLED(connect(client, &nothing, sizeof nothing), "connect(AF_UNSPEC)");
        orders[A].completion = AT_ONCE;
        int other = serve(LOOPBACK);
        app_block(client, true);
        app_connect(client, LOOPBACK, port_of(other));
        served_by(client, 'a');
        app_close(client);
        app_close(other);
        orders[A].completion = WHEN_TOLD;
        name_port("server", slow.port);
    }
    close_slow(&slow);
    nothing_left();
}

TWIN(late_shutdown_of_sleeper, "a", "S17: shutdown() in another thread wakes a blocking connect()")
{
    struct slow slow = slow_server();
    int client = app_socket(AF_INET, SOCK_STREAM);
    struct thread thread = {.port = slow.port};
    start(&thread, blocking_connect, client);
    check(blocks(&thread));
    app_shutdown(client, SHUT_RDWR);
    say("connect: %s", strerrorname_np(finish(&thread)));
    app_poll(client, POLLIN | POLLOUT, 0);
    app_close(client);
    close_slow(&slow);
    nothing_left();
}

TWIN(late_fork, "a", "S17, S27: a fork while in progress: the parent's goes on, and the child can close its own")
{
    struct slow slow = slow_server();
    int client = pending(&slow, NONBLOCK);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        close(client);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        _exit(fd == client ? 0 : 1);
    }
    int status = 1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    app_poll(client, POLLOUT, 0);
    let_in(&slow);
    app_poll(client, POLLOUT, SOON);
    app_connect(client, LOOPBACK, slow.port);
    served_by(client, 'a');
    int server = slow_accept(&slow);
    talk(client, server);
    close(server);
    app_close(client);
    close_slow(&slow);
    nothing_left();
}

/* --- descriptors and options meanwhile --- */

TWIN(late_aliases, "a",
     "S2, S17, S27: every duplicate, with its own FD_CLOEXEC, becomes the connection; flags set meanwhile stay")
{
    struct slow slow = slow_server();
    int client = pending(&slow, NONBLOCK);
    int plain = dup(client), high = fcntl(client, F_DUPFD_CLOEXEC, 200), over = dup(1);
    check(plain >= 0 && high >= 200 && dup3(client, over, O_CLOEXEC) == over);
    app_block(plain, true);
    app_close(client);
    name_port("client", app_local(plain));
    let_in(&slow);
    app_poll(high, POLLOUT, SOON);
    called(SETS_UP DETACHES);
    int server = slow_accept(&slow);
    static const char *const words[] = {"one", "two", "three"};
    int fds[] = {plain, high, over};
    for (int i = 0; i < 3; i++) {
        say("flags %#x %#x", fcntl(fds[i], F_GETFD), fcntl(fds[i], F_GETFL));
        served_by(fds[i], 'a');
        app_send(fds[i], words[i]);
        app_recv(server);
    }
    forget_records();
    close(plain);
    close(high);
    app_poll(server, POLLIN, 0);
    close(over);
    app_recv(server);
    close(server);
    close_slow(&slow);
    nothing_left();
}

TWIN(late_options, "a",
     "S13: an option set while in progress is told when the provider is done with the companion, and reads back")
{
    struct slow slow = slow_server();
    int client = app_socket(AF_INET, SOCK_STREAM | NONBLOCK);
    app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
    app_connect(client, LOOPBACK, slow.port);
    name_port("client", app_local(client));
    forget_records();
    app_set(client, SOL_SOCKET, SO_OOBINLINE, 1);
    app_set(client, IPPROTO_TCP, TCP_NODELAY, 1);
    app_set(client, IPPROTO_TCP, TCP_KEEPIDLE, 33);   /* not the provider's */
    app_set(client, SOL_SOCKET, SO_SNDBUF, 77777);
    app_set(client, SOL_SOCKET, SO_KEEPALIVE, 0);
    called("");
    for (int after = 0; after < 2; after++) {
        app_get(client, SOL_SOCKET, SO_OOBINLINE);
        app_get(client, SOL_SOCKET, SO_KEEPALIVE);
        app_get(client, IPPROTO_TCP, TCP_NODELAY);
        app_get(client, IPPROTO_TCP, TCP_KEEPIDLE);
        app_get(client, SOL_SOCKET, SO_SNDBUF);
        if (!after) {
            let_in(&slow);
            app_poll(client, POLLOUT, SOON);
        }
    }
    int inline_data = 0;
    socklen_t length = sizeof inline_data;
    check(real.getsockopt(client, SOL_SOCKET, SO_OOBINLINE, &inline_data, &length) == 0 && inline_data);
    called("a.complete a1 0\n a.setsockopt a1 1 9 0\n a.setsockopt a1 1 10 1\n a.setsockopt a1 6 1 1\n"
           "a.setsockopt a1 1 7 77777\n a.detach a1\n a.unhandle a1");
    app_close(client);
    close_slow(&slow);
    nothing_left();
}

static int (*libc_dup3)(int, int, int);

/* The descriptor shows the end of the connect some time before the switch is done with it. */
static int slow_dup3(int from, int to, int flags)
{
    int result = libc_dup3(from, to, flags), saved = errno;
    pause_ms(20);
    errno = saved;
    return result;
}

static int complete_last(struct thread *thread)
{
    return complete(A, companions_made(A), thread->port);
}

CASE(late_seen_at_once, "a", "S17, S18: as soon as the descriptor shows the end, every call knows it, be it a companion or TCP")
{
    int listener = serve(LOOPBACK), port = port_of(listener);
    orders[A].completion = WHEN_TOLD;
    libc_dup3 = real.dup3;
    for (int by = 0; by < 10; by++) {
        struct thread thread = {.port = by & 1 ? ENOENT : 0};
        int client = app_socket(AF_INET, SOCK_STREAM | NONBLOCK);
        check(app_connect(client, LOOPBACK, port) == -1 && errno == EINPROGRESS);
        real.dup3 = slow_dup3;
        start(&thread, complete_last, client);
        struct pollfd look = {client, POLLOUT, 0};
        for (int i = 0; real.poll(&look, 1, 0) == 0; i++)
            check(i < SOON * 10 && usleep(100) == 0);
        switch (by / 2) {
        case 0: check(app_connect(client, LOOPBACK, port) == 0); break;
        case 1: check(app_send(client, "at once") == 7); break;
        case 2: check(app_error(client) == 0 && app_peer(client) == port); break;
        case 3: check(app_recv(client) == -1 && errno == EAGAIN && app_send(client, "at once") == 7); break;
        default: check(app_set(client, SOL_SOCKET, SO_KEEPALIVE, 1) == 0);
        }
        check(finish(&thread) == 0);
        real.dup3 = libc_dup3;
        int alive = 0;
        socklen_t length = sizeof alive;
        check(real.getsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &alive, &length) == 0 && alive == (by / 2 == 4));
        served_by(client, by & 1 ? 't' : 'a');
        app_close(app_accept(listener));
        app_close(client);
    }
    app_close(listener);
    nothing_left();
}

CASE(late_and_tcp_slow, "a", "S17, T2: who sleeps on a connect whose provider gives up is woken when TCP's has ended, however late")
{
    int (*sleepers[])(struct thread *) = {blocking_poll, blocking_select, blocking_connect}, results[] = {POLLOUT, 101, 0};
    orders[A].completion = WHEN_TOLD;
    for (size_t by = 0; by < sizeof sleepers / sizeof *sleepers; by++) {
        struct thread thread = {0};
        int listener = tcp_server(LOOPBACK, &thread.port);
        check(real.listen(listener, 0) == 0);
        int filler = tcp_client(LOOPBACK, thread.port);
        int client = app_socket(AF_INET, SOCK_STREAM | (by == 2 ? 0 : NONBLOCK));
        if (by != 2)
            check(app_connect(client, LOOPBACK, thread.port) == -1 && errno == EINPROGRESS);
        int64_t begun = clock_ms();
        start(&thread, sleepers[by], client);
        check(blocks(&thread) && complete(A, companions_made(A), ENOENT) == 0 && blocks(&thread));
        check(real.listen(listener, 64) == 0);   /* what asks again in a second is let in */
        check(finish(&thread) == results[by] && clock_ms() - begun < SOON - 500);   /* woken, not timed out */
        served_by(client, 't');
        app_close(client);
        real.close(filler);
        real.close(listener);
    }
    nothing_left();
}

TWIN(late_sleeper_cancelled, "a", "S17, T9: a thread is cancelled in poll() or connect() while the connect is in progress: nothing is left")
{
    int (*sleepers[])(struct thread *) = {blocking_poll, blocking_select, blocking_connect};
    for (size_t by = 0; by < sizeof sleepers / sizeof *sleepers; by++) {
        struct slow slow = slow_server();
        struct thread thread = {.port = slow.port};
        int client = by == 2 ? app_socket(AF_INET, SOCK_STREAM) : pending(&slow, NONBLOCK);
        start(&thread, sleepers[by], client);
        void *result;
        check(blocks(&thread) && pthread_cancel(thread.thread) == 0 && pthread_join(thread.thread, &result) == 0);
        say("%s", result == PTHREAD_CANCELED ? "cancelled" : "returned");
        let_in(&slow);
        app_poll(client, POLLOUT, SOON);
        app_close(slow_accept(&slow));
        app_close(client);
        close_slow(&slow);
    }
    nothing_left();
}

/* --- what a failure leads to --- */

static const enum completion ways[] = {WHEN_TOLD, BY_THREAD, BEFORE_RETURN, BEFORE_RETURN_BY_THREAD};

/* Connects in one of the ways, and says all that the program sees. */
static int connect_late(enum completion way, int error, bool blocking, int port)
{
    orders[A].completion = way;
    orders[A].late = error;
    int client = app_socket(AF_INET, SOCK_STREAM | (blocking ? 0 : NONBLOCK));
    if (blocking && way == WHEN_TOLD) {
        struct thread thread = {.port = port};
        start(&thread, blocking_connect, client);
        check(oracle || blocks(&thread));
        if (!oracle)
            check(complete(A, companions_made(A), error) == 0);
        int result = finish(&thread);
        say("connect: %s", result ? strerrorname_np(result) : "0");
    } else {
        app_connect(client, LOOPBACK, port);
        if (way == WHEN_TOLD && !oracle)
            check(complete(A, companions_made(A), error) == 0);
        if (!blocking)
            app_poll(client, POLLOUT, 1000);
    }
    join_completions();
    return client;
}

static bool is_final(int error)
{
    return error == ECONNRESET || error == ECONNREFUSED || error == EHOSTUNREACH;
}

TWIN(late_results, "a",
     "S14, S17, S18: complete at once, later, or while wsp_connect runs, with any code: companion or TCP, no error")
{
    int listener = serve(LOOPBACK);
    for (int error = 0; error < 134; error++)
        for (size_t way = 0; way < 4; way++)
            for (int blocking = 0; blocking < 2; blocking++) {
                char text[500];
                if (is_final(error) || (error && !strerrorname_np(error)) || error == EINPROGRESS)
                    continue;
                if (error > 14 && (error % 4 != (int)way || error % 8 / 4 != blocking))
                    continue;          /* all ways with some, all codes in some way */
                here();
                int client = connect_late(ways[way], error, blocking, port_of(listener));
                app_error(client);
                app_connect(client, LOOPBACK, port_of(listener));
                app_connect(client, LOOPBACK, port_of(listener));
                if (error)
                    name_tried("client");
                else
                    name_port("client", app_local(client));
                app_peer(client);
                served_by(client, error ? 't' : 'a');
                snprintf(text, sizeof text, SETS_UP "a.complete a1 %s\n%s a1\n a.unhandle a1",
                         error ? strerrorname_np(error) : "0", error ? "a.close" : "a.detach");
                called(text);
                if (error)             /* nobody's from here on, but TCP's own choice may be the same */
                    name_port("client", INT_MAX);
                int server = app_accept(listener);
                served_by(server, error ? 't' : 'a');
                talk(client, server);
                app_close(server);
                app_close(client);
            }
    app_close(listener);
    nothing_left();
}

TWIN(late_and_nobody_there, "a", "S18: TCP is tried then, and what it says is the program's, once")
{
    int dead = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(dead, LOOPBACK, 0) == 0);
    for (size_t way = 0; way < 4; way++)
        for (int blocking = 0; blocking < 2; blocking++)
            for (int by = 0; by < 3; by++) {
                int client = connect_late(ways[way], ENOENT, blocking, port_of(dead));
                if (by == 0)
                    app_error(client);
                if (by == 1)
                    app_connect(client, LOOPBACK, port_of(dead));
                if (by == 2)
                    app_send(client, "x");
                app_error(client);
                app_poll(client, POLLIN | POLLOUT, 100);
                app_peer(client);
                served_by(client, 't');
                app_close(client);
            }
    app_close(dead);
    nothing_left();
}

TWIN(late_final, "ab",
     "S18: a final code ends it, late as well: neither b nor TCP is tried, and it looks as TCP's refusal does")
{
    int dead = app_socket(AF_INET, SOCK_STREAM);
    check(app_bind(dead, LOOPBACK, 0) == 0);
    for (int code = 0; code < 2; code++)
        for (size_t way = 0; way < 4; way++)
            for (int blocking = 0; blocking < 2; blocking++) {
                int client = connect_late(ways[way], code ? ECONNRESET : ECONNREFUSED, blocking, port_of(dead));
                app_error(client);
                app_error(client);
                app_peer(client);
                app_send(client, "x");
                served_by(client, 't');
                check(calls(B, CALL_REACH) == 0);
                app_close(client);
            }
    app_close(dead);
    nothing_left();
}

CASE(late_final_is_final, "ab", "S18: where a TCP listener is, it gets nothing; EHOSTUNREACH is told as it is")
{
    int port, listener = tcp_server(LOOPBACK, &port);
    static const int codes[][2] = {{ECONNRESET, ECONNREFUSED}, {ECONNREFUSED, ECONNREFUSED}, {EHOSTUNREACH, EHOSTUNREACH}};
    for (size_t code = 0; code < 3; code++)
        for (size_t way = 0; way < 4; way++) {
            orders[A].completion = ways[way];
            orders[A].late = codes[code][0];
            int client = app_socket(AF_INET, SOCK_STREAM | NONBLOCK);
            here();
            int result = app_connect(client, LOOPBACK, port);
            check(result == -1 && errno == EINPROGRESS);
            if (way == 0)
                check(complete(A, companions_made(A), codes[code][0]) == 0);
            check(app_poll(client, POLLOUT, 1000) == (POLLOUT | POLLERR | POLLHUP));
            check(app_error(client) == codes[code][1]);
            check(app_error(client) == 0);
            join_completions();
            called_of(1u << CALL_CLOSE | 1u << CALL_CONNECT | 1u << CALL_REACH,
                      "a.reach 127.0.0.1:server\n a.connect a1 127.0.0.1:server = EINPROGRESS\n a.close a1");
            struct pollfd waiting = {listener, POLLIN, 0};
            check(real.poll(&waiting, 1, 20) == 0);
            app_close(client);
        }
    check(calls(B, CALL_REACH) == 0);
    real.close(listener);
    nothing_left();
}

TWIN(late_second_serves, "ab",
     "S29: when the first fails late the second is asked, which may answer late or fail as well")
{
    int listener = serve(LOOPBACK);
    for (int second = 0; second < 5; second++)   /* at once, late, fails at once, fails late, fails while it is set up */
        for (int blocking = 0; blocking < 2; blocking++) {
            char text[900];
            static const char *const ends[] = {
                "b.connect b1 127.0.0.1:server\n b.detach b1\n b.unhandle b1",
                "b.connect b1 127.0.0.1:server = EINPROGRESS\n b.complete b1 0\n b.detach b1\n b.unhandle b1",
                "b.connect b1 127.0.0.1:server = EACCES\n b.close b1\n b.unhandle b1",
                "b.connect b1 127.0.0.1:server = EINPROGRESS\n b.complete b1 EAGAIN\n b.close b1\n b.unhandle b1",
                "",
            };
            orders[B] = (struct orders){.completion = second == 1 || second == 3 ? BY_THREAD : AT_ONCE,
                                        .late = second == 3 ? EAGAIN : 0};
            if (second == 2)
                fail_call(B, CALL_CONNECT, EACCES);
            if (second == 4)
                fail_call(B, CALL_BIND, EACCES);
            here();
            int client = connect_late(BY_THREAD, ETIMEDOUT, blocking, port_of(listener));
            app_error(client);
            app_connect(client, LOOPBACK, port_of(listener));
            app_connect(client, LOOPBACK, port_of(listener));
            if (second < 2)
                name_port("client", app_local(client));
            else
                name_tried("client");
            served_by(client, second < 2 ? 'b' : 't');
            snprintf(text, sizeof text, SETS_UP "a.complete a1 ETIMEDOUT\n a.close a1\n a.unhandle a1\n"
                     "b.reach 127.0.0.1:server\n b.socket inet b1\n b.handle b1\n b.bind b1 127.0.0.1:client%s\n%s",
                     second == 4 ? " = EACCES\n b.close b1\n b.unhandle b1" : "", ends[second]);
            called(text);
            orders[B] = (struct orders){0};
            int server = app_accept(listener);
            talk(client, server);
            app_close(server);
            app_close(client);
        }
    app_close(listener);
    nothing_left();
}

CASE(late_strict, "strict",
     "S18, X7: SAN or nothing: where the last provider fails late, ECONNREFUSED, once, and no TCP")
{
    int port, listener = tcp_server(LOOPBACK, &port);
    for (size_t way = 0; way < 4; way++)
        for (int blocking = 0; blocking < (way ? 2 : 1); blocking++) {
            int client = app_socket(AF_INET, SOCK_STREAM | (blocking ? 0 : NONBLOCK));
            orders[A] = (struct orders){.completion = ways[way], .late = ENOENT};
            fail_call(B, CALL_CONNECT, ENOENT);
            check(app_connect(client, LOOPBACK, port) == -1);
            if (errno != ECONNREFUSED) {
                check(!blocking && errno == EINPROGRESS);
                check(ways[way] != WHEN_TOLD || complete(A, companions_made(A), ENOENT) == 0);
                check(app_poll(client, POLLOUT, 1000) == (POLLOUT | POLLERR | POLLHUP));
                check(app_error(client) == ECONNREFUSED);
            }
            join_completions();
            check(app_error(client) == 0);
            struct pollfd waiting = {listener, POLLIN, 0};
            check(real.poll(&waiting, 1, 10) == 0);
            check(!fdtable_companion(client));
            app_close(client);
        }
    real.close(listener);
    nothing_left();
}

TWIN(late_fast_open, "a", "S6, S17: MSG_FASTOPEN waits where the socket blocks, and sends then")
{
    struct slow slow = slow_server();
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, slow.port);
    orders[A].completion = BY_THREAD;
    if (oracle)
        let_in(&slow);
    int client = app_socket(AF_INET, SOCK_STREAM);
    CALLED(sendto(client, "fast", 4, MSG_FASTOPEN, (struct sockaddr *)&address, length), "sendto");
    served_by(client, 'a');
    int server = slow_accept(&slow);
    app_recv(server);
    app_connect(client, LOOPBACK, slow.port);
    app_close(client);
    close(server);
    close_slow(&slow);
    nothing_left();
}

/* --- S10: who may complete --- */

CASE(late_wrong_handles, "ab",
     "S10: no, closed, foreign and wild handles; complete twice; nothing in progress: errors, and no effect")
{
    int listener = serve(LOOPBACK), port = port_of(listener);
    orders[A].completion = orders[B].completion = WHEN_TOLD;
    int client = app_socket(AF_INET, SOCK_STREAM | NONBLOCK), other = app_socket(AF_INET, SOCK_STREAM | NONBLOCK);
    check(app_connect(client, LOOPBACK, port) == -1 && app_connect(other, LOOPBACK, port) == -1);
    wpu_handle mine = companion_handle(A, 2), his = companion_handle(A, 3);
    uint64_t seed = 99;
    for (int i = 0; i < 20000; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        wpu_handle wild = seed >> seed % 64;
        uintptr_t context;
        if (wpu_query_socket_handle_context(wild, &context) == -ENOTSOCK)
            check(complete_handle(wild, 0) == -ENOTSOCK && complete_handle(wild, ENOENT) == -ENOTSOCK);
    }
    check(complete_handle(0, 0) == -ENOTSOCK && complete_handle(mine + (1ull << 32), 0) == -ENOTSOCK);
    check(complete_handle(companion_handle(A, 1), 0) == -EINVAL);        /* a listener's */
    check(complete_handle(mine, -5) == -EINVAL);                         /* no errno */
    check(complete_handle(mine, EINPROGRESS) == -EINVAL);
    check(app_poll(client, POLLOUT, 0) == 0 && app_poll(other, POLLOUT, 0) == 0);
    check(complete(A, 2, 0) == 0);
    served_by(client, 'a');
    check(app_poll(other, POLLOUT, 0) == 0);
    check(complete_handle(mine, 0) == -ENOTSOCK && complete_handle(mine, ENOENT) == -ENOTSOCK);   /* twice */
    check(app_send(client, "unharmed") == 8);
    check(complete(A, 3, EACCES) == 0);                                  /* b's turn, on the same socket */
    check(complete_handle(his, 0) == -ENOTSOCK);
    check(app_poll(other, POLLOUT, 0) == 0);
    check(complete(B, companions_made(B), 0) == 0);
    served_by(other, 'b');
    app_close(client);
    app_close(other);
    app_close(listener);
    nothing_left();
}

static int complete_again(struct thread *thread)
{
    return complete_handle(companion_handle(A, (unsigned)thread->fd), ETIMEDOUT);
}

CASE(late_twice_at_once, "ab",
     "S10: of two threads that complete one request one does, and the second provider's is not meant")
{
    int listener = serve(LOOPBACK);
    orders[A].completion = orders[B].completion = WHEN_TOLD;
    for (int round = 0; round < 200; round++) {
        struct thread threads[2] = {0};
        int client = socket(AF_INET, SOCK_STREAM | NONBLOCK, 0);
        struct sockaddr_storage address;
        socklen_t length = address_of(&address, LOOPBACK, port_of(listener));
        check(connect(client, (struct sockaddr *)&address, length) == -1 && errno == EINPROGRESS);
        for (int i = 0; i < 2; i++)
            start(&threads[i], complete_again, (int)companions_made(A));
        int first = finish(&threads[0]), second = finish(&threads[1]);
        check((first == 0) != (second == 0));
        check(first + second == -ENOTSOCK || first + second == -EINVAL);
        struct pollfd look = {client, POLLOUT, 0};
        check(poll(&look, 1, 0) == 0); /* b's turn */
        check(complete(B, companions_made(B), 0) == 0);
        check(poll(&look, 1, 1000) == 1 && look.revents == POLLOUT);
        served_by(client, 'b');
        close(client);
        close(accept(listener, NULL, NULL));
    }
    app_close(listener);
    nothing_left();
}

static void complete_inside(enum provider provider, enum call call)
{
    if (call == CALL_BIND)             /* before wsp_connect was called */
        check(complete_handle(companion_handle(provider, companions_made(provider)), 0) == -EINVAL);
}

CASE(late_too_early, "a", "S10, S15: nothing is complete before wsp_connect has begun")
{
    int listener = serve(LOOPBACK);
    orders[A].before = complete_inside;
    orders[A].completion = BEFORE_RETURN;
    int client = app_socket(AF_INET, SOCK_STREAM);
    check(app_connect(client, LOOPBACK, port_of(listener)) == 0);
    served_by(client, 'a');
    app_close(client);
    app_close(listener);
    nothing_left();
}

/* --- all of it at once --- */

#define ROUNDS 120

static struct slow busy;
static _Atomic unsigned by_san, by_tcp, given_up;

static int hammer(struct thread *thread)
{
    unsigned seed = (unsigned)thread->fd;
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, busy.port);
    for (int i = 0; i < ROUNDS; i++) {
        seed = seed * 1103515245 + 12345;
        int fd = socket(AF_INET, SOCK_STREAM | (seed >> 16 & 1 ? NONBLOCK : 0), 0);
        int spare = seed >> 17 & 1 ? dup(fd) : -1, epfd = -1;
        check(fd >= 0);
        if (seed >> 18 & 1) {
            epfd = epoll_create1(0);
            epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLOUT});
        }
        int result = connect(fd, (struct sockaddr *)&address, length);
        check(result == 0 || errno == EINPROGRESS);
        switch (seed >> 20 & 7) {
        case 0: given_up++; break;
        case 1: shutdown(fd, SHUT_RDWR); given_up++; break;
        case 2: dup2(0, fd); given_up++; break;
        case 3: connect(fd, &(struct sockaddr){.sa_family = AF_UNSPEC}, sizeof(struct sockaddr)); given_up++; break;
        default: {
            struct pollfd look = {fd, POLLOUT, 0};
            check(poll(&look, 1, 10000) == 1);
            int error = -1;
            socklen_t size = sizeof error;
            check(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0);
            if (error || send(fd, "x", 1, MSG_NOSIGNAL) != 1)
                fail_case("SO_ERROR %d, send: %s, poll: %#x, %s, phase %d", error, strerrorname_np(errno),
                          look.revents, seed >> 16 & 1 ? "non-blocking" : "blocking", fdtable_peek(fd) ? fdtable_peek(fd)->phase : -1);
            struct sock *sock = fdtable_companion(fd);
            *(sock ? &by_san : &by_tcp) += 1;
        }
        }
        struct linger none = {1, 0};   /* or the machine's ports would run out */
        setsockopt(spare >= 0 ? spare : fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
        close(fd);
        if (spare >= 0)
            close(spare);
        if (epfd >= 0)
            close(epfd);
    }
    return 0;
}

static _Atomic bool over;

static int drain(struct thread *thread)
{
    while (!over) {
        struct pollfd look = {thread->fd, POLLIN, 0};
        if (poll(&look, 1, 20) == 1) {
            int fd = accept(thread->fd, NULL, NULL);
            char byte;
            if (fd >= 0) {             /* D2: a write after the close would fail */
                recv(fd, &byte, 1, 0);
                close(fd);
            }
        }
    }
    return 0;
}

static bool listeners_are_left(void)
{
    return companions_alive(A) == 1 && companions_alive(B) == 1;
}

CASE(late_under_threads, "ab",
     "S10, S14, S17: four threads connect, wait, give up, while the provider's threads complete")
{
    struct thread threads[4] = {0}, server = {0};
    busy = slow_server();
    orders[A] = (struct orders){.completion = BY_THREAD};
    orders[B] = (struct orders){.completion = BY_THREAD};
    start(&server, drain, busy.listener);
    for (int round = 0; round < 3; round++) {   /* a serves; a fails and b serves; both fail */
        orders[A].late = round ? ETIMEDOUT : 0;
        orders[B].late = round == 2 ? ETIMEDOUT : 0;
        for (int i = 0; i < 4; i++)
            start(&threads[i], hammer, i + 100 * round + 1);
        for (int i = 0; i < 4; i++)
            check(finish(&threads[i]) == 0);
        join_completions();
        if (!eventually(listeners_are_left))
            fail_case("%u and %u companions are left", companions_alive(A), companions_alive(B));
    }
    over = true;
    finish(&server);
    if (!by_san || !by_tcp || !given_up)
        fail_case("%u by SAN, %u by TCP, %u given up", by_san, by_tcp, given_up);
    close_slow(&busy);
    nothing_left();
}
