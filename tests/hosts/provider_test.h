/* Two SAN providers for tests, "test-a" and "test-b", of one implementation. They record every call between the switch and
 * themselves, both ways, with its arguments, and do as they are told: fail, answer late, twice or never, refuse, let a
 * peer die, move the data themselves. Their fabric are AF_UNIX sockets of this process, under names that other processes
 * do not have; their descriptors are numbers that no pointer and no kernel descriptor has, the same for both. */
#ifndef PROVIDER_TEST_H
#define PROVIDER_TEST_H
#include "interposer/native/spi.h"

enum provider { A, B, PROVIDERS };
#define ID_A 5
#define ID_B 6

enum call {
    CALL_SERVES, CALL_REACH, CALL_SOCKET, CALL_BIND, CALL_SUPPORTS, CALL_SETSOCKOPT, CALL_LISTEN, CALL_CONNECT, CALL_ACCEPT,
    CALL_SILENCE, CALL_CLOSE, CALL_POLL_FD, CALL_DETACH, CALL_TRANSFER,
    CALL_SEND, CALL_RECEIVE, CALL_RELEASE,                  /* the mover's */
    CALL_HANDLE, CALL_CONTEXT, CALL_UNHANDLE, CALL_COMPLETE,   /* up: create, query, close a handle; complete a request */
    CALLS,
};

enum completion {
    AT_ONCE,                           /* wsp_connect has the result */
    WHEN_TOLD,                         /* -EINPROGRESS; the case says complete() */
    BY_THREAD,                         /* -EINPROGRESS; a thread of the provider's, a moment later */
    BEFORE_RETURN,                     /* -EINPROGRESS; but the end was told while wsp_connect still ran */
    BEFORE_RETURN_BY_THREAD,           /* the same, from another thread */
};

struct orders {
    int error[CALLS];                  /* an errno that the call fails with (wsp_reach: a reason number); 0: it works */
    unsigned only[CALLS];              /* only the nth such call fails, counted from 1; 0: all */
    bool takes_handle;                 /* a wsp_socket or wsp_accept that fails has taken a handle first, and gives it back */
    bool keeps_listening;              /* wsp_listen fails after the fabric's listener was made */
    enum completion completion;
    int late;                          /* the errno that completions of BY_THREAD and BEFORE_RETURN* tell; 0: success */
    bool moves;                        /* a mover is offered to wsp_transfer */
    bool (*serves)(const struct subnet *subnet);
    bool (*supports)(int level, int name);
    const char *source;                /* wsp_reach's; NULL: the kernel's choice */
    void (*before)(enum provider provider, enum call call);   /* runs inside each call from the switch, first */
};
extern struct orders orders[PROVIDERS];

/* What was called, one line a call: "a.bind a1 127.0.0.1:<4711>". Failures end in " = EPERM". `kinds`: a mask of calls;
 * the text is good until the next call. */
const char *recorded(unsigned kinds);
void forget_records(void);
/* How often a call was made since the start. */
unsigned calls(enum provider provider, enum call call);
/* How often it failed with the error that was ordered. */
unsigned failures(enum provider provider, enum call call);

/* The nth companion (from 1) of a provider, in the order of their making. */
wpu_handle companion_handle(enum provider provider, unsigned number);
uintptr_t companion_context(enum provider provider, unsigned number);
unsigned companions_made(enum provider provider);
/* Companions and movers that the switch has not given back. */
unsigned companions_alive(enum provider provider);
unsigned movers_alive(enum provider provider);
uint64_t moved_out(enum provider provider), moved_in(enum provider provider);   /* bytes */

/* Connects the fabric where error is 0, and makes the up-call; what that answered. */
int complete(enum provider provider, unsigned number, int error);
/* The same for every companion whose connect is in progress: how many there were. */
unsigned complete_all(enum provider provider, int error);
/* Makes the up-call with any handle. */
int complete_handle(wpu_handle handle, int error);
/* Waits until the providers' threads have nothing left to do. */
void join_completions(void);
#endif
