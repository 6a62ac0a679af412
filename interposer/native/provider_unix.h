/* The AF_UNIX provider; see provider_unix.c. */
#ifndef INTERPOSER_PROVIDER_UNIX_H
#define INTERPOSER_PROVIDER_UNIX_H
void provider_unix_after_fork_child(void);
#endif
