/* Owns nothing. Runs after fork. */
#include "decide.h"
#include "flows.h"
#include "reasons.h"
#include "stats.h"
#include "trace.h"
#include "uring.h"
#include <stdio.h>

#define RULE_EARLIER (RULE_DEFAULT - 1)

static size_t earlier_policy(uint32_t rule, char *out, size_t size)
{
    (void)rule;
    return (size_t)snprintf(out, size, "an earlier policy");
}

void switch_publish(int fd, const struct sock *sock)
{
    uint64_t now = flows_generation();
    bool current = sock->generation == now;
    stats_generation(now);
    enum sock_phase phase = sock_phase(sock);
    bool san = phase == SOCK_LISTENING || phase == SOCK_CONNECTED;
    stats_row_set(fd, sock->role, sock->family, san ? sock->companions[0].provider->id : PROVIDER_NONE, sock->reason,
                  &sock->local, &sock->remote, 0, current ? sock->rule : RULE_EARLIER,
                  current ? flows_rule_text : earlier_policy);
}

void decide_tcp(int fd, struct sock *sock, uint32_t role, int reason)
{
    sock->role = (uint8_t)role;
    sock->reason = (uint8_t)reason;
    atomic_store(&sock->phase, SOCK_TCP);
    switch_publish(fd, sock);
    if (role == ROW_LISTEN)
        stats_listener(PROVIDER_NONE);
    else
        stats_connection(PROVIDER_NONE);
    stats_reason((uint32_t)reason);
    trace_log("%s fd %d: TCP, reason %d", role == ROW_LISTEN ? "listen" : "connect", fd, reason);
}

void decide_request(struct sock *sock, uint8_t role, const struct endpoint *local, const struct endpoint *remote,
                    struct verdict *verdict)
{
    flows_decide(role, sock->family, local, remote, sock->options, sock->noptions, verdict);
    sock->rule = verdict->rule;
    sock->generation = flows_generation();
    sock->send_buffer = verdict->send_buffer;
    sock->receive_buffer = verdict->receive_buffer;
    if (verdict->action == ACTION_SAN && uring_exists(role == ROLE_LISTEN)) {
        verdict->action = ACTION_TCP;
        verdict->reason = REASON_IO_URING;
    }
    if (verdict->action != ACTION_SAN && !verdict->reason)
        verdict->reason = REASON_POLICY_TCP;
}
