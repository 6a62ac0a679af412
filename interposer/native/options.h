/* Socket options: recorded while the socket is TCP's, carried over to the companion, and answered for it afterwards. */
#ifndef INTERPOSER_OPTIONS_H
#define INTERPOSER_OPTIONS_H
#include "fdtable.h"

/* After the real setsockopt succeeded on a socket that is not connected by a companion. False: there was no room. */
bool options_record(struct sock *sock, int level, int name, const void *value, socklen_t length);
/* Those that another program has set on the socket, as far as the kernel tells. */
void options_import(struct sock *sock, int fd);
const struct sock_option *options_find(const struct sock *sock, int level, int name);
/* A copy of the nth recorded option, whole even if another thread records meanwhile; false: there are fewer. */
bool options_nth(struct sock *sock, int nth, struct sock_option *option);
/* Does TCP's accept() hand the listener's on? */
bool options_inherits(int level, int name);
/* Sets all recorded options on a TCP socket. */
void options_replay(struct sock *sock, int fd);
/* On a connected companion. */
int options_set(struct sock *sock, int fd, int level, int name, const void *value, socklen_t length);
/* The hidden TCP socket behind a companion, made at need; -1 when there is no descriptor for it. */
int options_shadow(struct sock *sock);
/* The shadow, connected (to itself) if the socket is; -1. */
int options_connected(struct sock *sock);
int options_get(struct sock *sock, int fd, int level, int name, void *value, socklen_t *length);
int options_ioctl(struct sock *sock, int fd, unsigned long request, void *argument);
/* The shadow `fd` is to be the program's socket again: ends what it was connected to. */
void options_part(struct sock *sock, int fd);
#endif
