/* What a SAN provider is: the calls that the switch makes down to it (wsp_*), and the up-calls that it makes to the
 * switch (wpu_*). The order for one companion is wsp_socket, wsp_bind, wsp_setsockopt for each recorded option that
 * wsp_supports names, then wsp_listen or wsp_connect; wsp_close_socket exactly once if any of them but wsp_socket failed.
 *
 * Errors are -errno. A descriptor is the provider's own and opaque to the switch: any value. A handle is the switch's and
 * opaque to the provider: handles carry a generation, so a stale or foreign one is -ENOTSOCK, never a crash. No call may
 * block, take a lock across a system call, or write errno on success. */
#ifndef INTERPOSER_SPI_H
#define INTERPOSER_SPI_H
#include "endpoint.h"
#include "table.h"
#include <sys/socket.h>

typedef uintptr_t wsp_descriptor;
typedef uint64_t wpu_handle;

/* An address of this machine with its subnet: an entry of the address table (netinfo.h). */
struct subnet {
    struct endpoint address;           /* without a port */
    uint8_t prefix;                    /* bits of the 16 bytes */
    uint32_t interface;                /* its index */
};

/* How a provider moves the data of a connected companion by itself. The kernel descriptor under the program's number goes
 * on to show readiness. Each call is as sendmsg or recvmsg on it would be, errno included. */
struct wsp_mover {
    ssize_t (*send)(uintptr_t state, int fd, const struct msghdr *message, int flags);
    ssize_t (*receive)(uintptr_t state, int fd, struct msghdr *message, int flags);
    void (*close)(uintptr_t state);    /* exactly once, when the last user is gone */
};

struct san_provider {
    const char *name;
    uint8_t id;                        /* PROVIDER_* */

    /* Is this local subnet one of the provider's? Answers are kept in the address table for at most a second. Interface 0:
     * no more than the address is known of it; with the wildcard as its address: may a listener's clients come by the
     * provider, once the machine has addresses for it? */
    bool (*wsp_serves)(const struct subnet *subnet);
    /* Can `remote` be reached? 0, and in *source the address that an unbound client should use; else minus a reason
     * number. Must be cheap when the answer is no: it is asked for every connection that policy allows. */
    int (*wsp_reach)(const struct endpoint *remote, struct endpoint *source);

    /* `context` is the switch's, for wpu_create_socket_handle. */
    int (*wsp_socket)(int family, uintptr_t context, wsp_descriptor *out);
    int (*wsp_bind)(wsp_descriptor companion, const struct endpoint *local);
    bool (*wsp_supports)(int level, int name);
    int (*wsp_setsockopt)(wsp_descriptor companion, int level, int name, const void *value, socklen_t length);
    /* `v6only`: an IPv6 wildcard listener that takes no IPv4 clients. `quiet`: no client finds it before wsp_announce, which
     * any process that shares it may call, more than once too. */
    int (*wsp_listen)(wsp_descriptor companion, int backlog, bool v6only, bool quiet);
    void (*wsp_announce)(wsp_descriptor listener);
    /* 0; the final codes -ECONNRESET, -ECONNREFUSED and -EHOSTUNREACH only where TCP would surely fail too; any other
     * error means TCP. -EINPROGRESS: wpu_complete_overlapped_request tells the end, with one of the others, from any
     * thread and perhaps before this call has returned; wsp_close_socket gives the attempt up. */
    int (*wsp_connect)(wsp_descriptor companion, const struct endpoint *remote);
    /* A new companion of the listener's, with its handle exchanged as in wsp_socket. -EAGAIN: nobody waits;
     * -ECONNABORTED: one was turned away, try again. `nonblocking`, `cloexec`: of the native descriptor, if there is. */
    int (*wsp_accept)(wsp_descriptor listener, uintptr_t context, bool nonblocking, bool cloexec, wsp_descriptor *out,
                      struct endpoint *local, struct endpoint *peer);
    /* A listener refuses from here on, in every process that shares it; what waits already can still be accepted, and
     * then wsp_accept says -EINVAL. */
    void (*wsp_silence)(wsp_descriptor listener);
    /* No other process has this silenced listener: who waits there is to see a reset. False: the switch accepts and closes. */
    bool (*wsp_reset)(wsp_descriptor listener);
    /* Both may be missing. Other programs have the program's listener too, and companions of their own; told before
     * wsp_listen, or later. And this one is about to go: who waits there is to be served by one of theirs, if there is any,
     * from where wsp_accept takes it. */
    void (*wsp_share)(wsp_descriptor listener);
    void (*wsp_pass_on)(wsp_descriptor listener);
    int (*wsp_close_socket)(wsp_descriptor companion);

    /* The kernel descriptor behind a companion: a listener's shows readiness, any shows its name space. */
    int (*wsp_poll_fd)(wsp_descriptor companion);
    /* What another program gets of a listener. wsp_pass makes its descriptors inheritable, or close-on-exec again; -errno: they
     * cannot be inherited. wsp_passed: is it such a descriptor? wsp_take makes a companion of those among `fds` that belong
     * to a listener at `local`, and puts -1 in their place; -ENOENT: there are none. Only read and used where both are given. */
    int (*wsp_pass)(wsp_descriptor listener, bool on);
    bool (*wsp_passed)(int fd);
    int (*wsp_take)(int *fds, int count, int family, const struct endpoint *local, uintptr_t context, wsp_descriptor *out);
    /* Native providers: hands the kernel descriptor of a connected companion over to the switch, gives the handle back
     * and forgets the companion. Others: -EOPNOTSUPP. */
    int (*wsp_detach)(wsp_descriptor companion);
    /* Asked before wsp_detach: will the provider move this connection's data itself? 0 with *mover and its *state, or
     * -EOPNOTSUPP: the kernel does. */
    int (*wsp_transfer)(wsp_descriptor companion, const struct wsp_mover **mover, uintptr_t *state);
    /* For a descriptor that came from elsewhere (exec, SCM_RIGHTS): is it one of yours, and whose ends are they?
     * 0: the end that connected; 1: the one that was accepted; or -ENOTSOCK. */
    int (*wsp_recognise)(int fd, struct endpoint *local, struct endpoint *peer, bool *v6);
};

wpu_handle wpu_create_socket_handle(const struct san_provider *provider, wsp_descriptor companion, uintptr_t context);
int wpu_query_socket_handle_context(wpu_handle handle, uintptr_t *context);
int wpu_close_socket_handle(wpu_handle handle);
/* The wsp_connect that said -EINPROGRESS has ended: error is 0 or -errno, as wsp_connect would have said. -ENOTSOCK: no
 * such handle; -EINVAL: none is in progress there. */
int wpu_complete_overlapped_request(wpu_handle handle, int error);

#define PROVIDER_IDS 32
extern const struct san_provider provider_unix;
/* Ended by NULL; only the tests' builds have them. */
extern const struct san_provider *const provider_tests[] __attribute__((weak, visibility("hidden")));
/* NULL for an id that is not built in. */
const struct san_provider *provider_by_id(uint8_t id);
/* All that are, from 0 on; NULL after the last. */
const struct san_provider *provider_nth(int index);
#endif
