/* Owns the records, the companions and the threads of the test providers. One lock, held for table accesses only. A
 * child of fork has a copy of everything, and the fabric in common. */
#include "provider_test.h"
#include "interposer/native/netinfo.h"
#include "interposer/native/real.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#define COMPANIONS 32768
#define RECORD_SIZE (1 << 15)
#define QUEUE 1024

struct companion_of_test {
    enum { UNUSED, MADE, BOUND, CONNECTING, CONNECTED, LISTENING, SILENT, GONE } state;
    int fd;
    int family;
    wpu_handle handle;
    uintptr_t context;
    struct endpoint local, remote;
    bool moving;
};

struct orders orders[PROVIDERS];
static struct companion_of_test companions[PROVIDERS][COMPANIONS];
static unsigned made[PROVIDERS];
static _Atomic unsigned counts[PROVIDERS][CALLS], failed[PROVIDERS][CALLS];
static _Atomic uint64_t bytes_out[PROVIDERS], bytes_in[PROVIDERS];
static _Atomic int movers[PROVIDERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int fabric;                     /* the process that made it: its id is part of all names */

extern const struct san_provider provider_a, provider_b;

static void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    _exit(1);
}

/* --- records --- */

struct record {
    uint8_t call;
    uint16_t length;
    char text[120];
};

static struct record *records;
static size_t nrecords;

static const char *const names[CALLS] = {
    "serves", "reach", "socket", "bind", "supports", "setsockopt", "listen", "connect", "accept", "silence", "close",
    "poll_fd", "detach", "transfer", "send", "receive", "release", "handle", "context", "unhandle", "complete",
};

/* The place of the record, for what is to be added to it. */
static size_t record(enum provider provider, enum call call, const char *format, ...) __attribute__((format(printf, 3, 4)));

static size_t record(enum provider provider, enum call call, const char *format, ...)
{
    va_list list;
    pthread_mutex_lock(&lock);
    if (!records)
        records = calloc(RECORD_SIZE, sizeof *records);
    if (nrecords == RECORD_SIZE)
        nrecords = 0;                  /* only cases that do not look at them make so many */
    size_t place = nrecords++;
    struct record *entry = &records[place];
    entry->call = (uint8_t)call;
    int length = snprintf(entry->text, sizeof entry->text, "%c.%s", "ab"[provider], names[call]);
    va_start(list, format);
    length += vsnprintf(entry->text + length, sizeof entry->text - (size_t)length, format, list);
    va_end(list);
    entry->length = (uint16_t)length;
    pthread_mutex_unlock(&lock);
    return place;
}

static void add(size_t place, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void add(size_t place, const char *format, ...)
{
    va_list list;
    pthread_mutex_lock(&lock);
    struct record *entry = &records[place];
    va_start(list, format);
    entry->length = (uint16_t)(entry->length + vsnprintf(entry->text + entry->length,
                                                         sizeof entry->text - entry->length, format, list));
    va_end(list);
    pthread_mutex_unlock(&lock);
}

/* What a call ended in. */
static int ended(size_t place, int error)
{
    if (error)
        add(place, " = %s", strerrorname_np(-error));
    return error;
}

const char *recorded(unsigned kinds)
{
    static char text[1 << 16];
    size_t length = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < nrecords && length < sizeof text - sizeof records->text - 2; i++)
        if (kinds >> records[i].call & 1)
            length += (size_t)sprintf(text + length, "%s\n", records[i].text);
    text[length] = 0;
    pthread_mutex_unlock(&lock);
    return text;
}

void forget_records(void)
{
    pthread_mutex_lock(&lock);
    nrecords = 0;
    pthread_mutex_unlock(&lock);
}

unsigned calls(enum provider provider, enum call call)
{
    return counts[provider][call];
}

unsigned failures(enum provider provider, enum call call)
{
    return failed[provider][call];
}

/* Ports stand in <>, so that a case can put names in their place. */
static const char *text_of(const struct endpoint *ep, char text[80])
{
    char plain[64];
    endpoint_text(ep, plain, sizeof plain);
    char *colon = strrchr(plain, ':');
    snprintf(text, 80, "%.*s:<%u>", (int)(colon - plain), plain, ep->port);
    return text;
}

/* Every call from the switch begins here: it is counted, and told to the case. True: it is to fail. */
static bool begins(enum provider provider, enum call call)
{
    unsigned number = ++counts[provider][call];
    const struct orders *told = &orders[provider];
    if (told->before)
        told->before(provider, call);
    if (!told->error[call] || (told->only[call] && told->only[call] != number))
        return false;
    ++failed[provider][call];
    return true;
}

static int ordered(enum provider provider, enum call call)
{
    errno = EIO;                       /* a failure may have left anything there */
    return -orders[provider].error[call];
}

/* --- companions --- */

/* Any value is a descriptor, and no pointer; the first is 0. */
static wsp_descriptor descriptor_of(unsigned number)
{
    return number == 1 ? 0 : number == 2 ? (wsp_descriptor)-1 : 0xdeadbeef00000000u + 3 * number;
}

static unsigned number_of(enum provider provider, wsp_descriptor descriptor, const char *who)
{
    unsigned number = descriptor == 0 ? 1 : descriptor == (wsp_descriptor)-1 ? 2
                                          : (unsigned)((descriptor - 0xdeadbeef00000000u) / 3);
    pthread_mutex_lock(&lock);
    bool known = number >= 1 && number <= made[provider] && descriptor_of(number) == descriptor;
    bool gone = known && companions[provider][number].state == GONE;
    pthread_mutex_unlock(&lock);
    if (!known)
        die("wsp_%s of %c was called with a descriptor that is not the provider's: %#jx", who, "ab"[provider],
            (uintmax_t)descriptor);
    if (gone)
        die("wsp_%s of %c was called with the descriptor of a companion that is gone: %c%u", who, "ab"[provider],
            "ab"[provider], number);
    return number;
}

static unsigned new_number(enum provider provider)
{
    pthread_mutex_lock(&lock);
    unsigned number = ++made[provider];
    pthread_mutex_unlock(&lock);
    if (number >= COMPANIONS)
        die("too many companions");
    return number;
}

static struct companion_of_test *at(enum provider provider, unsigned number)
{
    return &companions[provider][number];
}

wpu_handle companion_handle(enum provider provider, unsigned number)
{
    pthread_mutex_lock(&lock);
    wpu_handle handle = at(provider, number)->handle;
    pthread_mutex_unlock(&lock);
    return handle;
}

uintptr_t companion_context(enum provider provider, unsigned number)
{
    return at(provider, number)->context;
}

unsigned companions_made(enum provider provider)
{
    pthread_mutex_lock(&lock);
    unsigned number = made[provider];
    pthread_mutex_unlock(&lock);
    return number;
}

unsigned companions_alive(enum provider provider)
{
    unsigned alive = 0;
    pthread_mutex_lock(&lock);
    for (unsigned number = 1; number <= made[provider]; number++)
        alive += companions[provider][number].state != GONE && companions[provider][number].state != UNUSED;
    pthread_mutex_unlock(&lock);
    return alive;
}

unsigned movers_alive(enum provider provider)
{
    return (unsigned)movers[provider];
}

uint64_t moved_out(enum provider provider)
{
    return bytes_out[provider];
}

uint64_t moved_in(enum provider provider)
{
    return bytes_in[provider];
}

static int take_handle(enum provider provider, unsigned number, uintptr_t context)
{
    bool fails = begins(provider, CALL_HANDLE);
    size_t place = record(provider, CALL_HANDLE, " {%c%u}", "ab"[provider], number);
    /* Without a context there is no handle: as if the switch's memory were short. */
    wpu_handle handle = wpu_create_socket_handle(provider == A ? &provider_a : &provider_b, descriptor_of(number),
                                                 fails ? 0 : context);
    pthread_mutex_lock(&lock);
    at(provider, number)->handle = handle;
    at(provider, number)->context = context;
    pthread_mutex_unlock(&lock);
    if (!handle)
        add(place, " = 0");
    return handle ? 0 : -orders[provider].error[CALL_HANDLE];
}

static void give_handle(enum provider provider, unsigned number)
{
    size_t place = record(provider, CALL_UNHANDLE, " {%c%u}", "ab"[provider], number);
    ended(place, wpu_close_socket_handle(at(provider, number)->handle));
}

static void set_state(enum provider provider, unsigned number, int state)
{
    pthread_mutex_lock(&lock);
    at(provider, number)->state = state;
    pthread_mutex_unlock(&lock);
}

/* --- the fabric --- */

/* A listener is 'L', or 'D' on the IPv6 wildcard with IPv4 clients; a connecting end is 'C' and carries both addresses. */
static socklen_t fabric_name(struct sockaddr_un *name, enum provider provider, char kind, const struct endpoint *one,
                             const struct endpoint *other)
{
    struct endpoint both[2] = {{.port = one->port, .scope = one->scope}, {.port = other ? other->port : 0}};
    memcpy(both[0].ip, one->ip, 16);
    if (other)
        memcpy(both[1].ip, other->ip, 16);
    *name = (struct sockaddr_un){.sun_family = AF_UNIX};
    int length = sprintf(name->sun_path + 1, "spi-test/%d/%c%c/", fabric, "ab"[provider], kind) + 1;
    memcpy(name->sun_path + length, both, sizeof both);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)length + sizeof both);
}

static int fabric_socket(void)
{
    int fd = real.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return fd < 0 ? -errno : fd;
}

static int fabric_connect(enum provider provider, unsigned number)
{
    struct companion_of_test *companion = at(provider, number);
    struct sockaddr_un name;
    socklen_t length = fabric_name(&name, provider, 'C', &companion->local, &companion->remote);
    if (real.bind(companion->fd, (struct sockaddr *)&name, length) < 0)
        return -errno;
    struct endpoint wildcard4 = {.port = companion->remote.port}, wildcard6 = wildcard4;
    endpoint_set_wildcard(&wildcard4, true);
    const struct endpoint *targets[] = {&companion->remote, &wildcard4, &wildcard6, &wildcard6};
    bool v4 = endpoint_is_v4(&companion->remote);
    for (int i = 0; i < 4; i++) {
        if (i == (v4 ? 2 : 1))         /* the wildcard of the other family */
            continue;
        length = fabric_name(&name, provider, i == 3 ? 'D' : 'L', targets[i], NULL);
        if (real.connect(companion->fd, (struct sockaddr *)&name, length) == 0)
            return 0;
        if (errno != ECONNREFUSED)
            return -errno;
    }
    return -ENOENT;                    /* nobody on this SAN; ECONNREFUSED would be final */
}

/* --- calls from the switch --- */

static bool test_serves(enum provider provider, const struct subnet *subnet)
{
    char text[80];
    begins(provider, CALL_SERVES);
    record(provider, CALL_SERVES, " %s/%u", text_of(&subnet->address, text), subnet->prefix);
    return !orders[provider].serves || orders[provider].serves(subnet);
}

static int test_reach(enum provider provider, const struct endpoint *remote, struct endpoint *source)
{
    char text[80];
    bool fails = begins(provider, CALL_REACH);
    size_t place = record(provider, CALL_REACH, " %s", text_of(remote, text));
    int error = fails ? ordered(provider, CALL_REACH) : netinfo_local(remote, source);
    if (orders[provider].source) {
        endpoint_set_wildcard(source, true);
        unsigned parts[4];
        sscanf(orders[provider].source, "%u.%u.%u.%u", &parts[0], &parts[1], &parts[2], &parts[3]);
        for (int i = 0; i < 4; i++)
            source->ip[12 + i] = (uint8_t)parts[i];
    }
    if (error)
        add(place, " = %d", error);
    return error;
}

static int test_socket(enum provider provider, int family, uintptr_t context, wsp_descriptor *out)
{
    bool fails = begins(provider, CALL_SOCKET);
    unsigned number = new_number(provider);
    size_t place = record(provider, CALL_SOCKET, " %s {%c%u}", family == AF_INET6 ? "inet6" : "inet", "ab"[provider], number);
    struct companion_of_test *companion = at(provider, number);
    companion->family = family;
    if (!fails || orders[provider].takes_handle) {
        int error = take_handle(provider, number, context);
        if (error)
            return ended(place, error);
    }
    if (fails) {
        if (orders[provider].takes_handle)
            give_handle(provider, number);
        return ended(place, ordered(provider, CALL_SOCKET));
    }
    companion->fd = fabric_socket();
    if (companion->fd < 0)
        die("no socket for the fabric");
    set_state(provider, number, MADE);
    *out = descriptor_of(number);
    return 0;
}

static int test_bind(enum provider provider, wsp_descriptor descriptor, const struct endpoint *local)
{
    char text[80];
    unsigned number = number_of(provider, descriptor, "bind");
    bool fails = begins(provider, CALL_BIND);
    size_t place = record(provider, CALL_BIND, " {%c%u} %s", "ab"[provider], number, text_of(local, text));
    if (fails)
        return ended(place, ordered(provider, CALL_BIND));
    at(provider, number)->local = *local;
    set_state(provider, number, BOUND);
    return 0;
}

/* What AF_UNIX has, and one of TCP's. */
static bool usual(int level, int name)
{
    return level == SOL_SOCKET ? name == SO_RCVTIMEO || name == SO_SNDTIMEO || name == SO_SNDBUF || name == SO_RCVBUF ||
                                     name == SO_RCVLOWAT || name == SO_LINGER || name == SO_KEEPALIVE || name == SO_OOBINLINE
                               : level == IPPROTO_TCP && name == 1 /* TCP_NODELAY */;
}

static bool test_supports(enum provider provider, int level, int name)
{
    begins(provider, CALL_SUPPORTS);
    record(provider, CALL_SUPPORTS, " %d %d", level, name);
    return (orders[provider].supports ? orders[provider].supports : usual)(level, name);
}

static int test_setsockopt(enum provider provider, wsp_descriptor descriptor, int level, int name, const void *value,
                           socklen_t length)
{
    unsigned number = number_of(provider, descriptor, "setsockopt");
    bool fails = begins(provider, CALL_SETSOCKOPT);
    size_t place = record(provider, CALL_SETSOCKOPT, " {%c%u} %d %d", "ab"[provider], number, level, name);
    int word;
    for (socklen_t i = 0; i + sizeof word <= length; i += sizeof word) {
        memcpy(&word, (const char *)value + i, sizeof word);
        add(place, " %d", word);
    }
    if (length % sizeof word)
        add(place, " (%u bytes)", length);
    if (fails)
        return ended(place, ordered(provider, CALL_SETSOCKOPT));
    if (level == SOL_SOCKET && real.setsockopt(at(provider, number)->fd, level, name, value, length) < 0)
        return ended(place, -errno);
    return 0;
}

static int test_listen(enum provider provider, wsp_descriptor descriptor, int backlog, bool v6only, bool quiet)
{
    (void)quiet;
    unsigned number = number_of(provider, descriptor, "listen");
    bool fails = begins(provider, CALL_LISTEN);
    size_t place = record(provider, CALL_LISTEN, " {%c%u} %d%s", "ab"[provider], number, backlog, v6only ? " v6only" : "");
    struct companion_of_test *companion = at(provider, number);
    if (fails && !orders[provider].keeps_listening)
        return ended(place, ordered(provider, CALL_LISTEN));
    bool dual = companion->family == AF_INET6 && !v6only && endpoint_is_wildcard(&companion->local) &&
                !endpoint_is_v4(&companion->local);
    struct sockaddr_un name;
    socklen_t length = fabric_name(&name, provider, dual ? 'D' : 'L', &companion->local, NULL);
    if (real.bind(companion->fd, (struct sockaddr *)&name, length) < 0 || real.listen(companion->fd, backlog) < 0)
        return ended(place, -errno);
    set_state(provider, number, LISTENING);
    return fails ? ended(place, ordered(provider, CALL_LISTEN)) : 0;
}

/* The provider's own threads, and what they have to complete. */
struct late {
    enum provider provider;
    unsigned number;
    int error;
};

static struct late late[QUEUE];
static unsigned nlate, taken, done;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_once_t started = PTHREAD_ONCE_INIT;

static void *complete_late(void *argument)
{
    (void)argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (taken == nlate)
            pthread_cond_wait(&changed, &lock);
        struct late this = late[taken++ % QUEUE];
        pthread_mutex_unlock(&lock);
        complete(this.provider, this.number, this.error);
        pthread_mutex_lock(&lock);
        done++;
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static void start_threads(void)
{
    pthread_t thread;
    for (int i = 0; i < 2; i++)
        if (pthread_create(&thread, NULL, complete_late, NULL) != 0 || pthread_detach(thread) != 0)
            die("no thread");
}

static void complete_by_thread(enum provider provider, unsigned number)
{
    pthread_once(&started, start_threads);
    pthread_mutex_lock(&lock);
    if (nlate - done == QUEUE)
        die("too many late completions");
    late[nlate++ % QUEUE] = (struct late){provider, number, orders[provider].late};
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void join_completions(void)
{
    pthread_mutex_lock(&lock);
    while (done != nlate)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

int complete_handle(wpu_handle handle, int error)
{
    return wpu_complete_overlapped_request(handle, -error);
}

int complete(enum provider provider, unsigned number, int error)
{
    pthread_mutex_lock(&lock);
    if (at(provider, number)->state == CONNECTING) {   /* else the switch has closed it meanwhile */
        error = error ? error : -fabric_connect(provider, number);
        at(provider, number)->state = error ? BOUND : CONNECTED;
    }
    wpu_handle handle = at(provider, number)->handle;
    pthread_mutex_unlock(&lock);
    if (error)
        errno = EIO;
    size_t place = record(provider, CALL_COMPLETE, " {%c%u} %s", "ab"[provider], number, error ? strerrorname_np(error) : "0");
    return ended(place, complete_handle(handle, error));
}

unsigned complete_all(enum provider provider, int error)
{
    unsigned count = 0;
    for (unsigned number = 1; number <= companions_made(provider); number++) {
        pthread_mutex_lock(&lock);
        bool waits = at(provider, number)->state == CONNECTING;
        pthread_mutex_unlock(&lock);
        count += waits && complete(provider, number, error) == 0;
    }
    return count;
}

static int test_connect(enum provider provider, wsp_descriptor descriptor, const struct endpoint *remote)
{
    char text[80];
    unsigned number = number_of(provider, descriptor, "connect");
    bool fails = begins(provider, CALL_CONNECT);
    size_t place = record(provider, CALL_CONNECT, " {%c%u} %s", "ab"[provider], number, text_of(remote, text));
    at(provider, number)->remote = *remote;
    if (fails)
        return ended(place, ordered(provider, CALL_CONNECT));
    if (orders[provider].completion == AT_ONCE) {
        int error = fabric_connect(provider, number);
        if (!error)
            set_state(provider, number, CONNECTED);
        return ended(place, error);
    }
    set_state(provider, number, CONNECTING);
    ended(place, -EINPROGRESS);
    switch (orders[provider].completion) {
    case BEFORE_RETURN: complete(provider, number, orders[provider].late); break;
    case BEFORE_RETURN_BY_THREAD:
        complete_by_thread(provider, number);
        join_completions();
        break;
    case BY_THREAD: complete_by_thread(provider, number); break;
    default: break;
    }
    return -EINPROGRESS;
}

static int test_accept(enum provider provider, wsp_descriptor descriptor, uintptr_t context, bool nonblocking, bool cloexec,
                       wsp_descriptor *out, struct endpoint *local, struct endpoint *peer)
{
    char mine[80], his[80];
    unsigned listener = number_of(provider, descriptor, "accept");
    bool fails = begins(provider, CALL_ACCEPT);
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    int fd = real.accept4(at(provider, listener)->fd, (struct sockaddr *)&name, &length,
                          (nonblocking ? SOCK_NONBLOCK : 0) | (cloexec ? SOCK_CLOEXEC : 0));
    if (fd < 0) {
        pthread_mutex_lock(&lock);
        int error = errno == EAGAIN && at(provider, listener)->state == SILENT ? EINVAL : errno;
        pthread_mutex_unlock(&lock);
        return -error;                 /* asked in vain: no event */
    }
    struct endpoint both[2];
    if (length < sizeof both + offsetof(struct sockaddr_un, sun_path))
        die("a stranger on the fabric");
    memcpy(both, (char *)&name + length - sizeof both, sizeof both);
    *peer = both[0];
    *local = both[1];
    size_t place = record(provider, CALL_ACCEPT, " {%c%u}%s%s", "ab"[provider], listener, nonblocking ? " nonblocking" : "",
                          cloexec ? " cloexec" : "");
    if (fails && !orders[provider].takes_handle) {
        real.close(fd);
        return ended(place, ordered(provider, CALL_ACCEPT));
    }
    unsigned number = new_number(provider);
    add(place, " {%c%u} %s %s", "ab"[provider], number, text_of(local, mine), text_of(peer, his));
    at(provider, number)->family = at(provider, listener)->family;
    at(provider, number)->fd = fd;
    at(provider, number)->local = *local;
    at(provider, number)->remote = *peer;
    int error = take_handle(provider, number, context);
    if (!error && fails) {
        give_handle(provider, number);
        error = ordered(provider, CALL_ACCEPT);
    }
    if (error) {
        real.close(fd);
        return ended(place, error);
    }
    set_state(provider, number, CONNECTED);
    *out = descriptor_of(number);
    return 0;
}

static void test_silence(enum provider provider, wsp_descriptor descriptor)
{
    unsigned number = number_of(provider, descriptor, "silence");
    begins(provider, CALL_SILENCE);
    record(provider, CALL_SILENCE, " {%c%u}", "ab"[provider], number);
    set_state(provider, number, SILENT);
    real.shutdown(at(provider, number)->fd, SHUT_RDWR);
}

static int test_close_socket(enum provider provider, wsp_descriptor descriptor)
{
    unsigned number = number_of(provider, descriptor, "close_socket");
    bool fails = begins(provider, CALL_CLOSE);
    size_t place = record(provider, CALL_CLOSE, " {%c%u}", "ab"[provider], number);
    give_handle(provider, number);
    pthread_mutex_lock(&lock);         /* nobody connects a number that is another's by now */
    at(provider, number)->state = GONE;
    real.close(at(provider, number)->fd);
    pthread_mutex_unlock(&lock);
    return fails ? ended(place, ordered(provider, CALL_CLOSE)) : 0;
}

static int test_poll_fd(enum provider provider, wsp_descriptor descriptor)
{
    unsigned number = number_of(provider, descriptor, "poll_fd");
    bool fails = begins(provider, CALL_POLL_FD);
    record(provider, CALL_POLL_FD, " {%c%u}", "ab"[provider], number);
    return fails ? ordered(provider, CALL_POLL_FD) : at(provider, number)->fd;
}

static int test_detach(enum provider provider, wsp_descriptor descriptor)
{
    unsigned number = number_of(provider, descriptor, "detach");
    bool fails = begins(provider, CALL_DETACH);
    size_t place = record(provider, CALL_DETACH, " {%c%u}", "ab"[provider], number);
    if (fails)
        return ended(place, ordered(provider, CALL_DETACH));
    give_handle(provider, number);
    set_state(provider, number, GONE);
    return at(provider, number)->fd;
}

/* --- the mover --- */

static ssize_t move_out(enum provider provider, int fd, const struct msghdr *message, int flags)
{
    begins(provider, CALL_SEND);
    ssize_t done = real.sendmsg(fd, message, flags);
    if (done > 0)
        bytes_out[provider] += (uint64_t)done;
    return done;
}

static ssize_t move_in(enum provider provider, int fd, struct msghdr *message, int flags)
{
    begins(provider, CALL_RECEIVE);
    ssize_t done = real.recvmsg(fd, message, flags);
    if (done > 0)
        bytes_in[provider] += (uint64_t)done;
    return done;
}

static void release(enum provider provider, uintptr_t state)
{
    begins(provider, CALL_RELEASE);
    struct companion_of_test *companion = at(provider, (unsigned)(state - 0xfeed0000u));
    record(provider, CALL_RELEASE, " {%c%u}", "ab"[provider], (unsigned)(state - 0xfeed0000u));
    pthread_mutex_lock(&lock);
    bool moving = companion->moving;
    companion->moving = false;
    pthread_mutex_unlock(&lock);
    if (!moving)
        die("a mover was closed twice");
    --movers[provider];
}

#define MOVER(letter, provider)                                                                                        \
    static ssize_t letter##_send(uintptr_t state, int fd, const struct msghdr *message, int flags)                     \
    {                                                                                                                  \
        (void)state;                                                                                                   \
        return move_out(provider, fd, message, flags);                                                                 \
    }                                                                                                                  \
    static ssize_t letter##_receive(uintptr_t state, int fd, struct msghdr *message, int flags)                        \
    {                                                                                                                  \
        (void)state;                                                                                                   \
        return move_in(provider, fd, message, flags);                                                                  \
    }                                                                                                                  \
    static void letter##_release(uintptr_t state)                                                                      \
    {                                                                                                                  \
        release(provider, state);                                                                                      \
    }                                                                                                                  \
    static const struct wsp_mover letter##_mover = {letter##_send, letter##_receive, letter##_release};

MOVER(a, A)
MOVER(b, B)

static int test_transfer(enum provider provider, wsp_descriptor descriptor, const struct wsp_mover **mover, uintptr_t *state)
{
    unsigned number = number_of(provider, descriptor, "transfer");
    bool fails = begins(provider, CALL_TRANSFER);
    size_t place = record(provider, CALL_TRANSFER, " {%c%u}", "ab"[provider], number);
    if (fails || !orders[provider].moves)
        return ended(place, fails ? ordered(provider, CALL_TRANSFER) : -EOPNOTSUPP);
    pthread_mutex_lock(&lock);
    at(provider, number)->moving = true;
    pthread_mutex_unlock(&lock);
    ++movers[provider];
    *mover = provider == A ? &a_mover : &b_mover;
    *state = 0xfeed0000u + number;
    return 0;
}

/* A companion from elsewhere is never this process's. */
/* Programs that may make an io_uring are not among these tests. */
static void test_announce(wsp_descriptor listener)
{
    (void)listener;
}

static int test_recognise(int fd, struct endpoint *local, struct endpoint *peer, bool *v6)
{
    (void)fd, (void)local, (void)peer, (void)v6;
    return -ENOTSOCK;
}

/* --- both providers --- */

#define BOTH(type, call, parameters, arguments)                                                                        \
    static type a_##call parameters                                                                                    \
    {                                                                                                                  \
        return test_##call(A, arguments);                                                                              \
    }                                                                                                                  \
    static type b_##call parameters                                                                                    \
    {                                                                                                                  \
        return test_##call(B, arguments);                                                                              \
    }
#define LIST(...) __VA_ARGS__

BOTH(bool, serves, (const struct subnet *subnet), subnet)
BOTH(int, reach, (const struct endpoint *remote, struct endpoint *source), LIST(remote, source))
BOTH(int, socket, (int family, uintptr_t context, wsp_descriptor *out), LIST(family, context, out))
BOTH(int, bind, (wsp_descriptor descriptor, const struct endpoint *local), LIST(descriptor, local))
BOTH(bool, supports, (int level, int name), LIST(level, name))
BOTH(int, setsockopt, (wsp_descriptor descriptor, int level, int name, const void *value, socklen_t length),
     LIST(descriptor, level, name, value, length))
BOTH(int, listen, (wsp_descriptor descriptor, int backlog, bool v6only, bool quiet), LIST(descriptor, backlog, v6only, quiet))
BOTH(int, connect, (wsp_descriptor descriptor, const struct endpoint *remote), LIST(descriptor, remote))
BOTH(int, accept,
     (wsp_descriptor descriptor, uintptr_t context, bool nonblocking, bool cloexec, wsp_descriptor *out,
      struct endpoint *local, struct endpoint *peer),
     LIST(descriptor, context, nonblocking, cloexec, out, local, peer))
BOTH(void, silence, (wsp_descriptor descriptor), descriptor)
BOTH(int, close_socket, (wsp_descriptor descriptor), descriptor)
BOTH(int, poll_fd, (wsp_descriptor descriptor), descriptor)
BOTH(int, detach, (wsp_descriptor descriptor), descriptor)
BOTH(int, transfer, (wsp_descriptor descriptor, const struct wsp_mover **mover, uintptr_t *state),
     LIST(descriptor, mover, state))

#define PROVIDER(letter, number)                                                                                       \
    const struct san_provider provider_##letter = {                                                                    \
        .name = "test-" #letter,                                                                                       \
        .id = number,                                                                                                  \
        .wsp_serves = letter##_serves,                                                                                 \
        .wsp_reach = letter##_reach,                                                                                   \
        .wsp_socket = letter##_socket,                                                                                 \
        .wsp_bind = letter##_bind,                                                                                     \
        .wsp_supports = letter##_supports,                                                                             \
        .wsp_setsockopt = letter##_setsockopt,                                                                         \
        .wsp_announce = test_announce,                                                                                 \
        .wsp_listen = letter##_listen,                                                                                 \
        .wsp_connect = letter##_connect,                                                                               \
        .wsp_accept = letter##_accept,                                                                                 \
        .wsp_silence = letter##_silence,                                                                               \
        .wsp_close_socket = letter##_close_socket,                                                                     \
        .wsp_poll_fd = letter##_poll_fd,                                                                               \
        .wsp_detach = letter##_detach,                                                                                 \
        .wsp_transfer = letter##_transfer,                                                                             \
        .wsp_recognise = test_recognise,                                                                               \
    }

PROVIDER(a, ID_A);
PROVIDER(b, ID_B);
const struct san_provider *const provider_tests[] = {&provider_a, &provider_b, NULL};

__attribute__((constructor)) static void name_fabric(void)
{
    fabric = getpid();
}
