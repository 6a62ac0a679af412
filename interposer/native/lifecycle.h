/* What a process is: started, forked, a vfork child, switched off. */
#ifndef INTERPOSER_LIFECYCLE_H
#define INTERPOSER_LIFECYCLE_H
#include <stdbool.h>
#include <stdint.h>

extern bool lifecycle_active;          /* a policy is loaded, and nobody switched us off */
extern _Thread_local int lifecycle_vfork;   /* set by the hooks of vfork and clone, in parent and child alike */
extern int32_t lifecycle_pid;

/* True in a process that shares its memory with its parent (vfork): the tables are the parent's, and must be left alone. */
bool lifecycle_borrowed(void);
/* Called before a decision: notices a fork that no handler saw. */
void lifecycle_check(void);
/* Counts forks, in parent and child: a socket older than the last fork may be shared. */
uint32_t lifecycle_forks(void);
/* The program has called setns() or unshare(), so its sockets may be of several name spaces, or Landlock, which acts on a
 * single thread: what holds for one connection says nothing about the next. */
extern _Atomic bool lifecycle_moved;
#endif
