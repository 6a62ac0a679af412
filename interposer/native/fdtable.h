/* From a descriptor to the state of the socket behind it (S3), and the places of hidden descriptors. The table is a
 * two-level array, read without a lock; socket state is type-stable (pool.h) and counted. Aliases made by dup share one
 * state. All of it may run in signal handlers and after fork. */
#ifndef INTERPOSER_FDTABLE_H
#define INTERPOSER_FDTABLE_H
#include "engine.h"
#include "pool.h"
#include "spi.h"

enum sock_phase {
    SOCK_FREE,
    SOCK_FRESH,                        /* made, perhaps bound; not decided */
    SOCK_DECIDING,                     /* one thread is in connect() or listen() */
    SOCK_TCP,                          /* TCP for good */
    SOCK_INHERITED,                    /* a listener from elsewhere: decided when this process first waits on it */
    SOCK_LISTENING,                    /* with companions */
    SOCK_CONNECTED,                    /* the companion is the descriptor */
    SOCK_CONNECTING,                   /* a placeholder is the descriptor until a provider completes the connect */
    SOCK_HIDDEN,                       /* the switch's own descriptor: no close() of the program reaches it */
};

/* One registration of an alias with an epoll: which descriptor stands there for it (the alias itself, the private epoll,
 * or one that no other alias's registrations have), and what the program gave. */
struct sock_registration {
    int epfd, fd, via;                 /* epfd < 0: free */
    bool owned;                        /* via goes with the last registration that has it */
    bool stale;                        /* changed under another number of the epoll: its fdinfo knows */
    bool spent;                        /* EPOLLONESHOT that has fired */
    uint32_t events;
    uint64_t data;
};

struct companion {
    const struct san_provider *provider;
    wsp_descriptor descriptor;
};

struct connecting;                     /* connecting.c */
/* Beside the errno: the program ended the connect itself, so its next connect() is not told. */
#define CONNECT_CANCELLED 0x10000

struct moving {
    const struct wsp_mover *mover;     /* NULL: the kernel moves the data */
    uintptr_t state;
};

/* Why a companion's data does not simply go by the kernel's calls. */
enum { SLOW_SHUT_READ = 1, SLOW_CONNECTING = 2, SLOW_MOVER = 4 };

struct sock {
    struct pool_item item;
    _Atomic uint32_t refs;
    _Atomic uint32_t aliases;          /* table entries */
    _Atomic uint32_t waiters;          /* threads in a blocking accept(), each with a reference */
    _Atomic uint8_t phase;             /* enum sock_phase */
    _Atomic uint8_t lock;              /* options, registrations: held for a few instructions only */
    _Atomic uint8_t slow;              /* SLOW_* */
    uint8_t family;                    /* AF_INET or AF_INET6 */
    uint8_t role;                      /* ROW_* of stats.h */
    bool bound, port_is_ours, shut_write;   /* bound, of an accepted one: its listener was, to one address */
    bool handed_on;                    /* a listener's companions came from another program or went to one */
    bool over;                         /* both ends have closed, or the peer has reset it: TCP does not know it any more */
    bool left;                         /* getsockname() says what it said before connect(AF_UNSPEC): `local` */
    bool signals;                      /* its owner or its signal was set: F_SETOWN and its kin */
    _Atomic bool in_epoll;             /* a connection that was registered with one at some time */
    _Atomic bool spent;                /* one of its registrations is, or was */
    bool foreign;                      /* another program has it too, perhaps: its O_NONBLOCK is not ours alone */
    _Atomic bool announce;             /* connect() has yet to say 0 once */
    bool nonblocking;                  /* a listener: the program's view of O_NONBLOCK, where no other process shares it */
    _Atomic uint32_t common;           /* a listener: the number of its word on the page of common.c; 0: none */
    _Atomic bool quiet;                /* a listener: no client finds its companions before the program waits for one */
    _Atomic bool options_late;         /* set since connect(): while it is in progress the provider has the companion */
    bool options_lost, registrations_lost, strict, v6only;
    uint8_t unfit;                     /* reason number of an option that keeps it on TCP */
    _Atomic uint8_t turn;              /* a listener: how often the same side was served in a row */
    uint8_t reason;
    uint32_t rule;
    uint64_t generation;               /* of the policy that `rule` is of */
    uint32_t fork_count;               /* lifecycle's, when the socket was made */
    uint32_t companion_forks;          /* the same, when a listener's companions were made */
    _Atomic int shadow;                /* hidden TCP socket that holds the port and answers for options, or -1 */
    _Atomic int joined;                /* the shadow that was connected to itself; 0: none */
    _Atomic int epoll;                 /* a listener's private epoll, for this process to wait at, or -1 */
    _Atomic int32_t epoll_pid;
    _Atomic int epoll_shared;          /* the one that stands in the program's epolls; forked processes share it, as those */
    _Atomic uint32_t epoll_forks;      /* lifecycle's, when that one was made */
    _Atomic uint64_t completion;       /* of a connect in progress: connecting.c */
    uint32_t attempt;                  /* the number of the companion that was set up last, in this process */
    _Atomic int connect_error;         /* errno of one that failed later, until the program has been told; CONNECT_* */
    struct connecting *connecting;
    struct moving moving;
    uint32_t send_buffer, receive_buffer;   /* bytes, as the policy wants them; 0: as they are */
    uint8_t ncompanions;
    _Atomic uint8_t noptions, nregistrations;   /* registrations: places ever used */
    struct companion companions[PROVIDERS_MAX];
    struct endpoint local, remote;
    _Atomic(struct accept_epolls *) accept_epolls;   /* readiness.c's, too */
    struct sock_registration *registrations;   /* readiness.c's; most sockets never need any */
    struct sock_option options[SOCK_OPTIONS];
};

#define FDTABLE_LEAF 1024
#define FDTABLE_LEAVES 1024
extern _Atomic(_Atomic(struct sock *) *) fdtable_leaves[FDTABLE_LEAVES];

/* The state without a reference: good for a look at single fields on the hot path. */
static inline struct sock *fdtable_peek(int fd)
{
    unsigned number = (unsigned)fd;
    if (number >= FDTABLE_LEAF * FDTABLE_LEAVES)
        return NULL;
    _Atomic(struct sock *) *leaf = atomic_load_explicit(&fdtable_leaves[number / FDTABLE_LEAF], memory_order_acquire);
    return leaf ? atomic_load_explicit(&leaf[number % FDTABLE_LEAF], memory_order_acquire) : NULL;
}

/* Is, or was, any socket of this process not the kernel's alone? Most programs have none, and their calls pass. */
extern _Atomic bool fdtable_matters;

static inline bool fdtable_is_idle(void)
{
    return !atomic_load_explicit(&fdtable_matters, memory_order_relaxed);
}

/* The socket is not the kernel's alone from here on. */
static inline void sock_becomes(struct sock *sock, enum sock_phase phase)
{
    atomic_store_explicit(&fdtable_matters, true, memory_order_relaxed);
    atomic_store(&sock->phase, phase);
}

static inline enum sock_phase sock_phase(const struct sock *sock)
{
    return (enum sock_phase)atomic_load_explicit(&sock->phase, memory_order_acquire);
}

/* The state behind a companion, or what holds the place of one; NULL for every other descriptor. */
static inline struct sock *fdtable_companion(int fd)
{
    struct sock *sock = fdtable_peek(fd);
    enum sock_phase phase = sock ? sock_phase(sock) : SOCK_FREE;
    return phase == SOCK_CONNECTED || phase == SOCK_CONNECTING ? sock : NULL;
}

static inline bool sock_is_slow(const struct sock *sock, int why)
{
    return atomic_load_explicit(&sock->slow, memory_order_relaxed) & why;
}

static inline void sock_is_over(struct sock *sock)
{
    sock->shut_write = sock->over = true;
}

/* The errno of a connect that failed later, once. */
static inline int sock_take_error(struct sock *sock)
{
    return atomic_exchange(&sock->connect_error, 0) & (CONNECT_CANCELLED - 1);
}

struct sock *fdtable_get(int fd);      /* with a reference, or NULL; never a hidden one */
/* The state with that pool index, with a reference; NULL when it is nobody's. */
struct sock *fdtable_at(uint32_t index);
/* Any descriptor of the program's for the socket, `hint` if it is one; -1: it has none any more. */
int fdtable_alias_of(const struct sock *sock, int hint);
/* Do both numbers show the same file? One that was replaced where no hook saw it (freopen, a raw dup2) does not. */
bool fdtable_same_file(int fd, int other);
void sock_put(struct sock *sock);
/* New state for fd, one alias and one reference (sock_put it); NULL when memory is short. */
struct sock *fdtable_new(int fd, int family, enum sock_phase phase);
void fdtable_alias(int fd, struct sock *sock);   /* fd becomes an alias; whatever stood there is dropped */
void fdtable_drop(int fd);             /* the program closed fd: before the real close */
void fdtable_drop_if(int fd, struct sock *sock);   /* where fd still is the socket's */
/* Calls visit for each entry in [first, last], in order, until it says false. */
void fdtable_each(unsigned first, unsigned last, bool (*visit)(int fd, struct sock *sock, void *context), void *context);
/* The same for all entries, each with a reference, as other threads may close it meanwhile. */
void fdtable_each_held(bool (*visit)(int fd, struct sock *sock, void *context), void *context);
/* Who has dropped an entry closes its number only after the visits that found it there. */
void fdtable_await_visitors(void);

bool sock_lock(struct sock *sock);     /* bounded: false when a signal handler or a fork got in the way */
void sock_unlock(struct sock *sock);
void fdtable_before_fork(void);
void fdtable_after_fork_parent(void);
void fdtable_after_fork_child(void);

/* Moves fd to a high close-on-exec number that the program does not miss, and marks it; -1 (and fd closed) when there
 * is none. hidden_dup leaves fd as it is. */
int hidden_fd(int fd);
/* hidden_dup for what is about to be replaced under all of its numbers: -1 also where the program has set its limit below
 * one of them, because dup3() would refuse. */
int hidden_park(const struct sock *sock, int fd);
/* Makes the kernel's descriptor table large enough for hidden ones. Once a process has threads, growing it takes the
 * kernel more than 10 ms. */
void hidden_prepare(void);
int hidden_dup(int fd);
/* A process that is started inherits the limit of that moment: between the two calls it is as the program set it. */
void hidden_before_start(void);
void hidden_after_start(void);
/* fd stays where it is, as one of the switch's own. */
void hidden_adopt(int fd);
/* The program is out of descriptors: gives some hidden ones up. Parked sockets first, and with them the claim to their
 * ports; then what can be made again, in a process with one thread; at last a listener's companions. False: there was
 * none. */
bool hidden_reclaim(void);
/* Closes one that can be made again; false: there was none. */
bool hidden_give(_Atomic int *place);
void hidden_close(int fd);
bool hidden_is(int fd);
#endif
