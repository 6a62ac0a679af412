/* Moving data on an established native companion: the kernel's own calls, with AF_UNIX's differences from TCP taken
 * back (DESIGN: event table), or its provider's; while it is still connecting, as TCP would. The hooks call these only for
 * what fdtable_companion() finds. */
#ifndef INTERPOSER_DATA_H
#define INTERPOSER_DATA_H
#include "fdtable.h"
#include "real.h"

ssize_t data_read(struct sock *sock, int fd, void *buffer, size_t size);
ssize_t data_recv(struct sock *sock, int fd, void *buffer, size_t size, int flags);
ssize_t data_recvmsg(struct sock *sock, int fd, struct msghdr *message, int flags);
int data_recvmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout);
ssize_t data_readv(struct sock *sock, int fd, const struct iovec *vector, int count);
ssize_t data_write(struct sock *sock, int fd, const void *buffer, size_t size);
ssize_t data_send(struct sock *sock, int fd, const void *buffer, size_t size, int flags);
/* TCP tells no address: its length is 0. 0, or -1 with errno. */
int data_no_address(socklen_t *length);
/* TCP ignores the address of a send() on a connection, but takes it: 0, or -1 with errno. */
int data_takes_address(const struct sockaddr *address, socklen_t length);
ssize_t data_sendmsg(struct sock *sock, int fd, const struct msghdr *message, int flags);
int data_sendmmsg(struct sock *sock, int fd, struct mmsghdr *messages, unsigned count, int flags);
ssize_t data_writev(struct sock *sock, int fd, const struct iovec *vector, int count);
#endif
