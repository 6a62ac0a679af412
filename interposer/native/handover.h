/* Descriptors that enter and leave the process: what a program finds at its start, what comes and goes by SCM_RIGHTS, what
 * the next program inherits. A listener's companions follow it into a program that is interposed too, as they do at a
 * fork. Where they cannot, nobody may wait on them for a process that never accepts: who has not accepted so far gives them
 * up as it hands the listener on, and makes new ones if it waits again. Who has accepted, and sends it or starts itself anew
 * without the switch, will leave soon, perhaps: it serves who waits already, and then goes on by TCP. */
#ifndef INTERPOSER_HANDOVER_H
#define INTERPOSER_HANDOVER_H
#include "fdtable.h"

/* Knows what the process has inherited. In the constructor. */
void handover_start(void);
/* State for a TCP socket that came from elsewhere and is not connected, or for a companion, with a reference; NULL for every
 * other descriptor. */
struct sock *handover_tcp(int fd);
struct sock *handover_adopt(int fd);
/* The backlog of a TCP listener; -1: it does not listen. */
int handover_backlog(int fd);

/* Around the call that gives the process another program, which returns when it fails. A vfork child may call them: they
 * change what is the child's alone, and the companions. `file` is looked for in the path where `search`. */
void handover_before_exec(const char *file, bool search, char *const environment[]);
void handover_after_exec(void);
/* The same around a call that starts another process. `actions`: descriptors may become others on the way. */
void handover_before_spawn(const char *file, bool search, char *const environment[], bool actions);
void handover_after_spawn(void);
void handover_after_fork_child(void);
/* Before sendmsg() and after recvmsg(), where there are control data. */
void handover_before_send(const struct msghdr *message);
void handover_received(struct msghdr *message);
#endif
