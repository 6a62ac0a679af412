/* System call filters that the program is about to install. */
#ifndef INTERPOSER_SANDBOX_H
#define INTERPOSER_SANDBOX_H
#include <linux/filter.h>
#include <stdbool.h>

/* Under a filter that forbids what the switch does by itself, it may do no more than the program: set for good. */
extern _Atomic bool sandbox_closed;

/* A system call that the switch makes and the filter would not let it make, or -1. */
int sandbox_forbids(const struct sock_fprog *filter);
#endif
