/* The AF_UNIX provider; see provider_unix.c. */
#ifndef INTERPOSER_PROVIDER_UNIX_H
#define INTERPOSER_PROVIDER_UNIX_H
#include <stdbool.h>

/* Gives the descriptor up that it looks for listeners with; false: there was none. */
bool provider_unix_yield(void);
void provider_unix_after_fork_child(void);
#endif
