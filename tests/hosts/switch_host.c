/* The switch linked into a program, to be built with sanitizers: switch_host WHAT. It is the hooks themselves that the
 * program's socket calls reach. provider_unix.c is included, because its names are parsed by static functions. */
#include "interposer/native/provider_unix.c"

#include <arpa/inet.h>
#include <assert.h>
#include <dirent.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define check(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static _Thread_local uint64_t seed = 88172645463325252u;

static uint64_t next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static void run_threads(int count, void *(*body)(void *))
{
    pthread_t threads[16];
    for (int i = 0; i < count; i++)
        check(pthread_create(&threads[i], NULL, body, (void *)(uintptr_t)(i + 1)) == 0);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
}

/* --- pool --- */

struct thing {
    struct pool_item item;
    _Atomic uint32_t owner;
    char room[100];
};

POOL(things, struct thing);

static void *take_and_give(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    struct thing *held[40] = {0};
    seed += me * 7919;
    for (int round = 0; round < 60000; round++) {
        unsigned place = next_random() % 40;
        if (held[place]) {
            check(atomic_exchange(&held[place]->owner, 0) == me);
            pool_give(&things, held[place]);
            held[place] = NULL;
        } else {
            held[place] = pool_take(&things);
            check(held[place]);
            check(atomic_exchange(&held[place]->owner, me) == 0);   /* nobody else has it */
            check(pool_at(&things, held[place]->item.index) == held[place]);
        }
    }
    for (int i = 0; i < 40; i++)
        if (held[i]) {
            atomic_store(&held[i]->owner, 0);
            pool_give(&things, held[i]);
        }
    return NULL;
}

static void test_pool(void)
{
    run_threads(4, take_and_give);
    check(atomic_load(&things.used) <= 4 * 40);   /* items were used again */
    check(!pool_at(&things, 1u << 30));
    check(!pool_at(&things, POOL_CHUNK * POOL_CHUNKS));
    check(!pool_at(&things, POOL_CHUNK * 100));
}

/* --- handles --- */

static void test_handles(void)
{
    uintptr_t context = 0;
    wpu_handle first = wpu_create_socket_handle(&provider_unix, 7, 99);
    check(first);
    check(wpu_query_socket_handle_context(first, &context) == 0 && context == 99);
    check(wpu_close_socket_handle(first) == 0);
    check(wpu_close_socket_handle(first) == -ENOTSOCK);
    check(wpu_query_socket_handle_context(first, &context) == -ENOTSOCK);
    wpu_handle second = wpu_create_socket_handle(&provider_unix, 8, 100);
    check(second != first && (uint32_t)second == (uint32_t)first);   /* the same place, another generation */
    check(wpu_query_socket_handle_context(first, &context) == -ENOTSOCK);
    check(wpu_query_socket_handle_context(second, &context) == 0 && context == 100);
    check(wpu_create_socket_handle(&provider_unix, 9, 0) == 0);
    for (int i = 0; i < 2000000; i++) {
        wpu_handle foreign = next_random() >> next_random() % 64;
        if (foreign != second) {
            check(wpu_query_socket_handle_context(foreign, &context) == -ENOTSOCK);
            check(wpu_close_socket_handle(foreign) == -ENOTSOCK);
        }
    }
    check(wpu_close_socket_handle(second) == 0);
}

static _Atomic uint64_t shared_handle;

static void *race_for_handles(void *argument)
{
    static _Atomic int closed, made;
    seed += (uintptr_t)argument * 104729;
    for (int i = 0; i < 20000; i++) {
        wpu_handle fresh = wpu_create_socket_handle(&provider_unix, i, (uintptr_t)argument);
        check(fresh);
        atomic_fetch_add(&made, 1);
        wpu_handle old = atomic_exchange(&shared_handle, fresh), again = old;
        uintptr_t context;
        wpu_query_socket_handle_context(again, &context);
        if (old && wpu_close_socket_handle(old) == 0)
            atomic_fetch_add(&closed, 1);
        check(!again || wpu_close_socket_handle(again) == -ENOTSOCK);
    }
    check(atomic_load(&closed) <= atomic_load(&made));
    return NULL;
}

/* --- names --- */

static struct endpoint random_endpoint(void)
{
    struct endpoint ep = {0};
    for (int i = 0; i < 16; i++)
        ep.ip[i] = (uint8_t)(next_random() & (next_random() % 3 ? 255 : 0));
    if (next_random() & 1)
        memcpy(ep.ip, "\0\0\0\0\0\0\0\0\0\0\xff\xff", 12);
    else if (next_random() % 4 == 0) {
        memcpy(ep.ip, "\xfe\x80", 2);
        ep.scope = (uint32_t)next_random() >> next_random() % 32;
    }
    if (next_random() % 8 == 0)
        endpoint_set_wildcard(&ep, next_random() & 1);
    ep.port = (uint16_t)(next_random() >> next_random() % 60);
    return ep;
}

/* Looks at a name of exactly `length` bytes: what follows may not be touched. */
static char parse_exactly(const void *bytes, socklen_t length, struct endpoint *first, struct endpoint *second)
{
    struct sockaddr_un *place = malloc(sizeof *place);
    memset(place, 'A', sizeof *place);
    memcpy(place, bytes, length);
    ASAN_POISON_MEMORY_REGION((char *)place + length, sizeof *place - length);
    char kind = parse_name(place, length, first, second);
    ASAN_UNPOISON_MEMORY_REGION(place, sizeof *place);
    free(place);
    return kind;
}

static void test_names(void)
{
    struct sockaddr_un name;
    struct endpoint first, second;
    for (int round = 0; round < 200000; round++) {
        struct endpoint from = random_endpoint(), to = random_endpoint();
        bool dual = next_random() & 1;
        unsigned slot = next_random() % SLOTS;
        bool connection = next_random() & 1;
        socklen_t length = connection ? connection_name(&name, &from, &to) : listener_name(&name, &from, dual, slot);
        check(length <= sizeof name);
        char kind = parse_exactly(&name, length, &first, &second);
        check(kind == (connection ? 'C' : dual ? 'D' : 'L'));
        check(endpoint_equal(&first, &from) && first.scope == from.scope);
        check(!connection || endpoint_equal(&second, &to));
        char *bytes = (char *)&name;
        for (int change = (int)(next_random() % 4); change >= 0 && length; change--)
            switch (next_random() % 4) {
            case 0: bytes[next_random() % length] = (char)next_random(); break;
            case 1: length = next_random() % (length + 1); break;
            case 2: bytes[2 + next_random() % (length > 2 ? length - 2 : 1)] = "0129af:/.%\0L"[next_random() % 12]; break;
            default:
                if (length < sizeof name)
                    bytes[length++] = "0129af:/.%"[next_random() % 10];
            }
        if (parse_exactly(&name, length, &first, &second)) {   /* what is taken is spelt as we spell it */
            struct sockaddr_un again;
            kind = parse_exactly(&name, length, &first, &second);
            socklen_t size = kind == 'C' ? connection_name(&again, &first, &second)
                                         : listener_name(&again, &first, kind == 'D', 0);
            if (kind == 'C' && (size != length || memcmp(&again, &name, size) != 0)) {
                fprintf(stderr, "%.*s is taken for %.*s\n", (int)length - 3, name.sun_path + 1, (int)size - 3,
                        again.sun_path + 1);
                exit(1);
            }
        }
    }
    check(parse_exactly(&name, 0, &first, &second) == 0);
    check(parse_exactly(&name, 2, &first, &second) == 0);
}

static void test_endpoints(void)
{
    for (int round = 0; round < 300000; round++) {
        struct endpoint ep = random_endpoint(), back;
        char text[64], kernel[64], small[64];
        size_t length = endpoint_text(&ep, text, sizeof text);
        check(length < sizeof text && strlen(text) == length);
        size_t room = next_random() % sizeof small;
        char *place = malloc(room ? room : 1);
        check(endpoint_text(&ep, place, room) <= length);
        free(place);
        struct sockaddr_storage address;
        socklen_t size = sizeof address;
        int family = endpoint_is_v4(&ep) && next_random() & 1 ? AF_INET : AF_INET6;
        endpoint_to_sockaddr(&ep, family, (struct sockaddr *)&address, &size);
        check(endpoint_from_sockaddr(&back, (struct sockaddr *)&address, size));
        check(endpoint_equal(&ep, &back));
        char *exact = malloc(size);
        memcpy(exact, &address, size);
        socklen_t cut = next_random() % (size + 1);
        char *less = malloc(cut ? cut : 1);
        memcpy(less, exact, cut);
        endpoint_from_sockaddr(&back, (struct sockaddr *)(void *)less, cut);
        free(exact);
        free(less);
        if (!endpoint_is_v4(&ep) && !ep.scope) {
            char bracketed[80];
            inet_ntop(AF_INET6, ep.ip, kernel, sizeof kernel);
            snprintf(bracketed, sizeof bracketed, "[%s]:%u", kernel, ep.port);
            check(strchr(kernel, '.') || strcmp(bracketed, text) == 0);
        }
    }
}

/* --- the whole, under threads --- */

static struct sockaddr_in server_at;
static int server_fd;
static _Atomic bool stop, served;
static _Atomic int clients_served, connected;
static _Atomic int common[16];         /* descriptors that all threads use and close under each other's hands */

#ifdef __SANITIZE_THREAD__
#define OWN_PLACES 1                   /* each thread its own, so that a race found is not the program's own */
#else
#define OWN_PLACES 0
#endif

static void *serve(void *argument)
{
    (void)argument;
    while (!served) {
        struct pollfd wait = {server_fd, POLLIN, 0};
        if (poll(&wait, 1, 50) <= 0)
            continue;
        int fd = accept(server_fd, NULL, NULL);
        if (fd < 0)
            continue;
        char c;
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        getpeername(fd, (struct sockaddr *)&peer, &length);
        wait.fd = fd;
        if (poll(&wait, 1, 30) > 0 && recv(fd, &c, 1, MSG_DONTWAIT) == 1)   /* some never say a word */
            send(fd, &c, 1, MSG_NOSIGNAL);
        clients_served++;
        close(fd);
    }
    return NULL;
}

static void use(int fd)
{
    struct sockaddr_storage name;
    socklen_t length = sizeof name;
    int on = 1;
    char c;
    switch (next_random() % 12) {
    case 0: getsockname(fd, (struct sockaddr *)&name, &length); break;
    case 1: getpeername(fd, (struct sockaddr *)&name, &length); break;
    case 2: setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); break;
    case 3: length = sizeof on; getsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &on, &length); break;
    case 4: send(fd, "x", 1, MSG_NOSIGNAL | MSG_DONTWAIT); break;
    case 5: recv(fd, &c, 1, MSG_DONTWAIT); break;
    case 6: shutdown(fd, (int)(next_random() % 3)); break;
    case 7: connect(fd, (struct sockaddr *)&server_at, sizeof server_at); break;
    case 8: listen(fd, 4); break;
    case 9: fcntl(fd, F_SETFL, O_NONBLOCK); break;
    case 10: {
        struct pollfd wait = {fd, POLLIN | POLLOUT, 0};
        poll(&wait, 1, 0);
        break;
    }
    default: {
        int epfd = epoll_create1(0);
        struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT};
        epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event);
        epoll_wait(epfd, &event, 1, 0);
        if (OWN_PLACES)                /* else the number stands in a record, and may be another thread's soon */
            epoll_ctl(epfd, EPOLL_CTL_DEL, fd, NULL);
        close(epfd);
    }
    }
}

static void *hammer(void *argument)
{
    seed += (uintptr_t)argument * 15485863;
    while (!stop) {
        unsigned place = OWN_PLACES ? 2 * (unsigned)(uintptr_t)argument + next_random() % 2 : next_random() % 4;
        switch (next_random() % 5) {
        case 0: {                      /* a whole connection of our own */
            char c = '?';
            int fd = socket(AF_INET, SOCK_STREAM, 0), copy = dup(fd);
            if (connect(fd, (struct sockaddr *)&server_at, sizeof server_at) == 0 && send(copy, &c, 1, MSG_NOSIGNAL) == 1 &&
                recv(fd, &c, 1, 0) == 1)
                connected++;
            close(fd);
            close(copy);
            break;
        }
        case 1: {
            int old = atomic_exchange(&common[place], socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
            if (old > 2)
                close(old);
            break;
        }
        case 2: {
            int fd = common[place];
            if (fd > 2) {
                int copy = dup(fd);
                if (copy >= 0)
                    close(copy);
            }
            break;
        }
        default:
            if (common[place] > 2)
                use(common[place]);
        }
    }
    return NULL;
}

static int open_descriptors(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void prepare_server(void)
{
    socklen_t length = sizeof server_at;
    server_at = (struct sockaddr_in){AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    server_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    check(bind(server_fd, (struct sockaddr *)&server_at, length) == 0 && listen(server_fd, 64) == 0);
    check(getsockname(server_fd, (struct sockaddr *)&server_at, &length) == 0);
}

static void *timer(void *seconds)
{
    usleep((unsigned)(uintptr_t)seconds);
    stop = true;
    return NULL;
}

static void test_stress(void)
{
    pthread_t clock, threads[6];
    prepare_server();
    pthread_create(&threads[0], NULL, serve, NULL);
    pthread_create(&threads[1], NULL, serve, NULL);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    check(connect(fd, (struct sockaddr *)&server_at, sizeof server_at) == 0);
    check(fdtable_companion(fd));      /* it is the switch that is under test */
    close(fd);
    usleep(100000);
    int before = open_descriptors();
    pthread_create(&clock, NULL, timer, (void *)(uintptr_t)3000000);
    for (int i = 2; i < 6; i++)
        pthread_create(&threads[i], NULL, hammer, (void *)(uintptr_t)i);
    pthread_join(clock, NULL);
    for (int i = 2; i < 6; i++)
        pthread_join(threads[i], NULL);
    served = true;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 16; i++)
        if (common[i] > 2)
            close(common[i]);
    check(connected > 100);
    int after = open_descriptors();
    if (after > before + 4) {
        fprintf(stderr, "%d descriptors before, %d after\n", before, after);
        exit(1);
    }
}

/* Forks under threads: each child makes a connection, uses its table, and leaves. */
static void test_forks(void)
{
    pthread_t threads[4], clock;
    prepare_server();
    pthread_create(&threads[0], NULL, serve, NULL);
    pthread_create(&threads[1], NULL, serve, NULL);
    pthread_create(&threads[2], NULL, hammer, (void *)2);
    pthread_create(&threads[3], NULL, hammer, (void *)3);
    pthread_create(&clock, NULL, timer, (void *)(uintptr_t)2000000);
    int children = 0;
    while (!stop) {
        pid_t child = fork();
        if (child == 0) {
            alarm(10);
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            char c = '?';
            bool good = connect(fd, (struct sockaddr *)&server_at, sizeof server_at) == 0 && send(fd, &c, 1, 0) == 1 &&
                        recv(fd, &c, 1, 0) == 1;
            close(fd);
            _exit(good ? 0 : 1);
        }
        int status = 1;
        check(child > 0 && waitpid(child, &status, 0) == child);
        check(status == 0);
        children++;
    }
    pthread_join(clock, NULL);
    pthread_join(threads[2], NULL);
    pthread_join(threads[3], NULL);
    served = true;
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    check(children > 10);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "pool") == 0)
        test_pool();
    else if (strcmp(what, "handles") == 0) {
        test_handles();
        run_threads(4, race_for_handles);
    } else if (strcmp(what, "names") == 0)
        test_names();
    else if (strcmp(what, "endpoints") == 0)
        test_endpoints();
    else if (strcmp(what, "stress") == 0)
        test_stress();
    else if (strcmp(what, "forks") == 0)
        test_forks();
    else
        return 64;
    return 0;
}
