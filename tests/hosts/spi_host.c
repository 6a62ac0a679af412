/* What all cases share, and main(). */
#include "spi_host.h"
#include <limits.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <stdarg.h>

#ifdef __SANITIZE_THREAD__
/* It does not know the call that takes this lock before a fork. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "mutex:engine_after_fork_parent\n";
}
#endif

bool oracle;
static struct test_case *cases;

void add_case(struct test_case *test_case)
{
    test_case->next = cases;
    cases = test_case;
}

void fail_at(const char *file, int line, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    fflush(stdout);
    _exit(1);
}

/* --- names --- */

struct port_name {
    const char *name;
    int port;
};

static struct port_name ports[64];
static int nports;

void name_port(const char *name, int port)
{
    int place = 0;
    while (place < nports && strcmp(ports[place].name, name) != 0)
        place++;
    if (place == 64 || port <= 0)
        fail_case("no port to name");
    for (int i = 0; i < nports; i++)
        if (ports[i].port == port && strcmp(ports[i].name, "client") == 0)
            ports[i].port = INT_MAX;   /* of a connection that is over */
    ports[place] = (struct port_name){name, port};
    nports += place == nports;
}

void name_tried(const char *name)
{
    int port = INT_MAX;                /* nobody's, where nothing was tried */
    const char *last = NULL;
    for (const char *at = recorded(1u << CALL_BIND); (at = strchr(at, '<')); at++)
        last = at;
    if (last)
        sscanf(last, "<%d>", &port);
    name_port(name, port);
}

static const char *port_text(int port, char text[16])
{
    for (int i = nports - 1; i >= 0; i--)
        if (ports[i].port == port)
            return ports[i].name;
    snprintf(text, 16, port ? "?" : "0");
    return text;
}

/* Both runs have the same number of descriptors open, but not the same numbers: the switch has its own. */
static int descriptors[1024], ndescriptors;

static int fd_name(int fd)
{
    if (fd < 0)
        return fd;
    for (int i = ndescriptors - 1; i >= 0; i--)
        if (descriptors[i] == fd)
            return i + 1;
    if (ndescriptors == 1024)
        fail_case("too many descriptors");
    descriptors[ndescriptors++] = fd;
    return ndescriptors;
}

static void forget_fd(int fd)
{
    for (int i = 0; i < ndescriptors; i++)
        if (descriptors[i] == fd)
            descriptors[i] = -1;
}

void say(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    putchar('\n');
}

void say_result(long result, const char *format, ...)
{
    va_list list;
    int error = errno;
    if (result >= 0 && error != 4242) {
        fprintf(stderr, "errno became %s on success of ", strerrorname_np(error));
        va_start(list, format);
        vfprintf(stderr, format, list);
        fail_case(" ");
    }
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    if (result < 0)
        printf(" = %s\n", strerrorname_np(error));
    else
        printf(" = %ld\n", result);
    errno = error;
}

/* --- calls --- */

socklen_t address_of(struct sockaddr_storage *address, const char *ip, int port)
{
    *address = (struct sockaddr_storage){0};
    struct sockaddr_in *v4 = (struct sockaddr_in *)address;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;
    if (strchr(ip, ':')) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)port);
        check(inet_pton(AF_INET6, ip, &v6->sin6_addr) == 1);
        return sizeof *v6;
    }
    v4->sin_family = AF_INET;
    v4->sin_port = htons((uint16_t)port);
    check(inet_pton(AF_INET, ip, &v4->sin_addr) == 1);
    return sizeof *v4;
}

static const char *address_text(const struct sockaddr_storage *address, socklen_t length, char text[100])
{
    char plain[64], digits[16];
    struct endpoint ep;
    if (!endpoint_from_sockaddr(&ep, (const struct sockaddr *)address, length)) {
        snprintf(text, 100, "family %d, %u bytes", address->ss_family, length);
        return text;
    }
    endpoint_text(&ep, plain, sizeof plain);
    *strrchr(plain, ':') = 0;
    snprintf(text, 100, "%s:%s %s", plain, port_text(ep.port, digits), address->ss_family == AF_INET6 ? "inet6" : "inet");
    return text;
}

int app_socket(int family, int type)
{
    errno = 4242;
    int fd = socket(family, type, 0), error = errno;
    int number = fd_name(fd);
    errno = error;
    say_result(number, "socket(%d, %#x)", family, type);
    return fd;
}

int app_bind(int fd, const char *ip, int port)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, ip, port);
    char text[16];
    return CALLED(bind(fd, (struct sockaddr *)&address, length), "bind(%d, %s:%s)", fd_name(fd), ip, port_text(port, text));
}

int bind_somewhere(int fd, const char *ip)
{
    static int port = 20000;
    struct sockaddr_storage address;
    socklen_t length;
    do {
        check(++port < 30000);
        length = address_of(&address, ip, port);
    } while (bind(fd, (struct sockaddr *)&address, length) < 0);
    return port;
}

int app_listen(int fd, int backlog)
{
    return CALLED(listen(fd, backlog), "listen(%d, %d)", fd_name(fd), backlog);
}

int app_connect(int fd, const char *ip, int port)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, ip, port);
    char text[16];
    return CALLED(connect(fd, (struct sockaddr *)&address, length), "connect(%d, %s:%s)", fd_name(fd), ip,
                  port_text(port, text));
}

static int accepted(int fd, int flags, bool four)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    char text[100];
    errno = 4242;
    int got = four ? accept4(fd, (struct sockaddr *)&address, &length, flags)
                   : accept(fd, (struct sockaddr *)&address, &length);
    int error = errno, number = fd_name(got);
    errno = error;
    say_result(number, "accept(%d, %#x)%s%s", fd_name(fd), flags, got < 0 ? "" : " from ",
               got < 0 ? "" : address_text(&address, length, text));
    errno = error;
    return got;
}

int app_accept(int fd)
{
    return accepted(fd, 0, false);
}

int app_accept4(int fd, int flags)
{
    return accepted(fd, flags, true);
}

int app_close(int fd)
{
    int result = CALLED(close(fd), "close(%d)", fd_name(fd));
    forget_fd(fd);
    return result;
}

int app_shutdown(int fd, int how)
{
    return CALLED(shutdown(fd, how), "shutdown(%d, %d)", fd_name(fd), how);
}

ssize_t app_send_flags(int fd, const char *text, int flags)
{
    return CALLED(send(fd, text, strlen(text), flags), "send(%d, \"%s\", %#x)", fd_name(fd), text, flags);
}

ssize_t app_send(int fd, const char *text)
{
    return app_send_flags(fd, text, MSG_NOSIGNAL);
}

ssize_t app_recv(int fd)
{
    char text[256] = "";
    errno = 4242;
    ssize_t got = recv(fd, text, sizeof text - 1, 0);
    int error = errno;
    say_result(got, "recv(%d) \"%s\"", fd_name(fd), text);
    errno = error;
    return got;
}

static int said_name(int fd, bool peer)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    char text[100];
    errno = 4242;
    int result = (peer ? getpeername : getsockname)(fd, (struct sockaddr *)&address, &length), error = errno;
    say_result(result, "%s(%d)%s%s", peer ? "getpeername" : "getsockname", fd_name(fd), result < 0 ? "" : " ",
               result < 0 ? "" : address_text(&address, length, text));
    errno = error;
    return result < 0 ? result : ntohs(((struct sockaddr_in *)&address)->sin_port);
}

int app_local(int fd)
{
    return said_name(fd, false);
}

int app_peer(int fd)
{
    return said_name(fd, true);
}

int app_set(int fd, int level, int name, int value)
{
    return CALLED(setsockopt(fd, level, name, &value, sizeof value), "setsockopt(%d, %d, %d, %d)", fd_name(fd), level, name,
                  value);
}

int app_set_time(int fd, int name, int milliseconds)
{
    struct timeval time = {milliseconds / 1000, milliseconds % 1000 * 1000};
    return CALLED(setsockopt(fd, SOL_SOCKET, name, &time, sizeof time), "setsockopt(%d, %d, %d, %d ms)", fd_name(fd),
                  SOL_SOCKET, name, milliseconds);
}

int app_get(int fd, int level, int name)
{
    int value = -1;
    socklen_t length = sizeof value;
    errno = 4242;
    int result = getsockopt(fd, level, name, &value, &length), error = errno;
    say_result(result, "getsockopt(%d, %d, %d) %d", fd_name(fd), level, name, value);
    errno = error;
    return result < 0 ? result : value;
}

int app_error(int fd)
{
    int error = app_get(fd, SOL_SOCKET, SO_ERROR);
    return error;
}

static int said_events(const char *call, int fd, unsigned events)
{
    static const struct {
        unsigned bit;
        const char *name;
    } names[] = {{EPOLLIN, "IN"},   {EPOLLPRI, "PRI"}, {EPOLLOUT, "OUT"},
                 {EPOLLERR, "ERR"}, {EPOLLHUP, "HUP"}, {EPOLLRDHUP, "RDHUP"}};
    char text[64] = "";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (events & names[i].bit) {
            strcat(text, " ");
            strcat(text, names[i].name);
        }
    say("%s(%d)%s", call, fd_name(fd), *text ? text : " nothing");
    return (int)events;
}

int app_poll(int fd, short events, int timeout)
{
    struct pollfd look = {fd, events, 0};
    errno = 4242;
    int result = poll(&look, 1, timeout);
    if (result < 0)
        fail_case("poll: %s", strerrorname_np(errno));
    check(errno == 4242 && result == (look.revents != 0));
    return said_events("poll", fd, (unsigned)look.revents);
}

int app_select(int fd, int timeout)
{
    fd_set in, out, except;
    FD_ZERO(&in);
    FD_SET(fd, &in);
    except = out = in;
    struct timeval limit = {timeout / 1000, timeout % 1000 * 1000};
    int result = select(fd + 1, &in, &out, &except, &limit);
    check(result >= 0);
    int bits = (FD_ISSET(fd, &in) ? 1 : 0) | (FD_ISSET(fd, &out) ? 2 : 0) | (FD_ISSET(fd, &except) ? 4 : 0);
    check(result == __builtin_popcount((unsigned)bits));
    say("select(%d) %d", fd_name(fd), bits);
    return bits;
}

int app_epoll(void)
{
    int epfd = epoll_create1(EPOLL_CLOEXEC);
    check(epfd >= 0);
    return epfd;
}

int app_add(int epfd, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    return CALLED(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event), "epoll_ctl(ADD, %d, %#x)", fd_name(fd), events);
}

int app_wait(int epfd, int timeout)
{
    struct epoll_event events[4];
    int count = epoll_wait(epfd, events, 4, timeout);
    if (count <= 0) {
        check(count == 0);
        say("epoll_wait nothing");
        return 0;
    }
    if (count != 1)
        fail_case("%d events for one descriptor", count);
    return said_events("epoll_wait", events[0].data.fd, events[0].events);
}

void app_block(int fd, bool blocking)
{
    int flags = fcntl(fd, F_GETFL);
    check(flags >= 0 && fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK) == 0);
}

int port_of(int fd)
{
    struct sockaddr_in6 address;
    socklen_t length = sizeof address;
    check(real.getsockname(fd, (struct sockaddr *)&address, &length) == 0);
    return ntohs(address.sin6_port);
}

int serve(const char *ip)
{
    int fd = app_socket(strchr(ip, ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
    check(app_bind(fd, ip, 0) == 0);
    name_port("server", port_of(fd));
    check(app_listen(fd, 16) == 0);
    return fd;
}

static const char *reachable(const char *ip)
{
    return strcmp(ip, EVERYWHERE) == 0 ? LOOPBACK : strcmp(ip, "::") == 0 ? "::1" : ip;
}

struct pair make_pair(const char *ip)
{
    struct pair pair;
    pair.listener = serve(ip);
    pair.client = app_socket(strchr(ip, ':') ? AF_INET6 : AF_INET, SOCK_STREAM);
    check(app_connect(pair.client, reachable(ip), port_of(pair.listener)) == 0);
    struct sockaddr_storage local;
    socklen_t length = sizeof local;
    check(getsockname(pair.client, (struct sockaddr *)&local, &length) == 0);
    name_port("client", ntohs(((struct sockaddr_in *)&local)->sin_port));
    pair.server = app_accept(pair.listener);
    check(pair.server >= 0);
    return pair;
}

void close_pair(struct pair *pair)
{
    app_close(pair->client);
    app_close(pair->server);
    app_close(pair->listener);
}

/* --- not interposed --- */

int tcp_server(const char *ip, int *port)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, ip, 0);
    int fd = real.socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(fd >= 0 && real.bind(fd, (struct sockaddr *)&address, length) == 0 && real.listen(fd, 16) == 0);
    *port = port_of(fd);
    name_port("server", *port);
    return fd;
}

int tcp_client(const char *ip, int port)
{
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, ip, port);
    int fd = real.socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (real.connect(fd, (struct sockaddr *)&address, length) == 0)
        return fd;
    int error = errno;
    real.close(fd);
    return -error;
}

struct slow slow_server(void)
{
    struct slow slow = {.filler = -1};
    struct sockaddr_storage address;
    socklen_t length = address_of(&address, LOOPBACK, 0);
    slow.listener = socket(AF_INET, SOCK_STREAM, 0);
    check(slow.listener >= 0 && bind(slow.listener, (struct sockaddr *)&address, length) == 0);
    check(listen(slow.listener, oracle ? 0 : 64) == 0);
    slow.port = port_of(slow.listener);
    name_port("server", slow.port);
    if (oracle)
        check((slow.filler = tcp_client(LOOPBACK, slow.port)) >= 0);
    orders[A].completion = WHEN_TOLD;
    here();
    return slow;
}

void let_in(struct slow *slow)
{
    if (oracle)
        check(real.listen(slow->listener, 64) == 0);
    else
        check(complete_all(A, 0));
}

int slow_accept(struct slow *slow)
{
    if (slow->filler >= 0) {
        check(real.close(real.accept(slow->listener, NULL, NULL)) == 0);
        real.close(slow->filler);
        slow->filler = -1;
    }
    int fd = accept(slow->listener, NULL, NULL);
    check(fd >= 0);
    return fd;
}

void close_slow(struct slow *slow)
{
    if (slow->filler >= 0)
        real.close(slow->filler);
    close(slow->listener);
}

/* --- what came of it --- */

static unsigned first[PROVIDERS];

void here(void)
{
    nports = nports && strcmp(ports[0].name, "server") == 0;   /* others may be some other socket's by chance */
    for (int provider = A; provider < PROVIDERS; provider++)
        first[provider] = companions_made(provider);
    forget_records();
}

void called_at(const char *file, int line, unsigned kinds, const char *lines)
{
    static char seen[1 << 16], wanted[1 << 14];
    const char *from = recorded(kinds);
    char *to = seen, text[16];
    while (*from && to < seen + sizeof seen - 64) {
        if (*from == '<') {
            int port = (int)strtol(from + 1, (char **)&from, 10);
            const char *name = port_text(port, text);
            if (strcmp(name, "?") == 0)
                to += sprintf(to, "%d", port);
            else
                to = stpcpy(to, name);
            from++;
        } else if (*from == '{') {     /* a companion: its number counts from here() */
            unsigned number = (unsigned)strtol(from + 2, NULL, 10), provider = from[1] == 'b';
            to += number > first[provider] ? sprintf(to, "%c%u", from[1], number - first[provider])
                                           : sprintf(to, "%c-%u", from[1], first[provider] - number);
            from = strchr(from, '}') + 1;
        } else {
            *to++ = *from++;
        }
    }
    *to = 0;
    /* Lines may be indented, and end in the last one. */
    to = wanted;
    for (const char *at = oracle ? "" : lines; *at;) {
        while (*at == ' ' || *at == '\n')
            at++;
        size_t size = strcspn(at, "\n");
        if (size) {
            memcpy(to, at, size);
            to += size;
            *to++ = '\n';
        }
        at += size;
    }
    *to = 0;
    if (strcmp(seen, wanted) != 0)
        fail_at(file, line, "the calls were\n%sinstead of\n%s", seen, wanted);
    forget_records();
}

void served_by_at(const char *file, int line, int fd, char letter)
{
    char seen = 't';
    struct sock *sock = fdtable_peek(fd);
    int domain = 0;
    socklen_t length = sizeof domain;
    if (real.getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) < 0)
        fail_at(file, line, "descriptor %d is no socket", fd);
    if (sock && (sock_phase(sock) == SOCK_LISTENING || sock_phase(sock) == SOCK_CONNECTED))
        seen = sock->companions[0].provider->id == ID_A ? 'a' : sock->companions[0].provider->id == ID_B ? 'b' : '?';
    if (sock && sock_phase(sock) != SOCK_LISTENING && (domain == AF_UNIX) != (seen != 't'))
        fail_at(file, line, "the kernel has family %d under the descriptor that is served by %c", domain, seen);
    if (seen != (oracle ? 't' : letter))
        fail_at(file, line, "served by %c instead of %c, reason %d", seen, letter, sock ? sock->reason : -1);
}

void stayed_because_at(const char *file, int line, int fd, int reason)
{
    struct sock *sock = fdtable_peek(fd);
    if (!oracle && (!sock || sock->reason != reason))
        fail_at(file, line, "the reason is %d instead of %d", sock ? sock->reason : -1, reason);
}

/* Sockets that are open, the program's own included. */
static int open_sockets(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    for (struct dirent *entry; (entry = readdir(directory));) {
        char path[300], link[64];
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        ssize_t length = readlink(path, link, sizeof link);
        int domain = 0;
        socklen_t size = sizeof domain;
        count += length > 7 && memcmp(link, "socket:", 7) == 0 &&
                 real.getsockopt(atoi(entry->d_name), SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain != AF_NETLINK;
    }
    closedir(directory);
    return count;
}

void nothing_left_at(const char *file, int line)
{
    join_completions();
    for (int provider = A; provider < PROVIDERS; provider++) {
        if (companions_alive(provider))
            fail_at(file, line, "%u companions of %c are left", companions_alive(provider), "ab"[provider]);
        if (movers_alive(provider))
            fail_at(file, line, "%u movers of %c are left", movers_alive(provider), "ab"[provider]);
        for (unsigned number = 1; number <= companions_made(provider); number++) {
            uintptr_t context;
            if (companion_handle(provider, number) &&
                wpu_query_socket_handle_context(companion_handle(provider, number), &context) != -ENOTSOCK)
                fail_at(file, line, "the handle of %c%u still works", "ab"[provider], number);
        }
    }
    if (open_sockets())
        fail_at(file, line, "%d sockets are left", open_sockets());
}

void fail_nth_call(enum provider provider, enum call call, int error, unsigned n)
{
    orders[provider].error[call] = error;
    orders[provider].only[call] = n;
}

void fail_call(enum provider provider, enum call call, int error)
{
    fail_nth_call(provider, call, error, 0);
}

/* --- threads --- */

static void *run_thread(void *argument)
{
    struct thread *thread = argument;
    thread->id = gettid();
    thread->result = thread->run(thread);
    thread->done = true;
    return NULL;
}

void start(struct thread *thread, int (*run)(struct thread *), int fd)
{
    thread->run = run;
    thread->fd = fd;
    thread->id = 0;
    thread->done = false;
    check(pthread_create(&thread->thread, NULL, run_thread, thread) == 0);
}

void pause_ms(int milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* Has it slept for three looks in a row? */
static bool sleeps(const struct thread *thread)
{
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", thread->id);
    for (int looks = 0; looks < 3; looks++) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t got = fd < 0 ? 0 : real.read(fd, line, sizeof line - 1);
        real.close(fd);
        const char *state = got > 0 ? strrchr(line, ')') : NULL;
        if (!state || state[2] != 'S')
            return false;
        pause_ms(5);
    }
    return true;
}

bool blocks(struct thread *thread)
{
    for (int i = 0; i < 5000 && !thread->done && !(thread->id && sleeps(thread)); i++)
        pause_ms(1);
    pause_ms(10);
    return !thread->done;
}

int finish(struct thread *thread)
{
    for (int i = 0; i < 10000 && !thread->done; i++)
        pause_ms(1);
    if (!thread->done)
        fail_case("a call hangs");
    pthread_join(thread->thread, NULL);
    return thread->result;
}

bool eventually(bool (*holds)(void))
{
    for (int i = 0; i < 5000; i++) {
        if (holds())
            return true;
        pause_ms(1);
    }
    return false;
}

int main(int argc, char **argv)
{
    for (struct test_case *each = cases; argc > 1 && each; each = each->next)
        if (strcmp(each->name, argv[1]) == 0) {
            oracle = argc > 2;
            alarm(30);
            each->run();
            fflush(stdout);
            join_completions();
            return 0;
        }
    return 64;
}
