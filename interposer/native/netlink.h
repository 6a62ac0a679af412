/* Questions to the kernel over netlink, each by a socket of its own. No state; runs anywhere. */
#ifndef INTERPOSER_NETLINK_H
#define INTERPOSER_NETLINK_H
#include <stddef.h>
#include <sys/types.h>

/* A thread that is cancelled while it asks would leave the socket behind. -errno. */
int netlink_open(int protocol, int *cancel);
void netlink_close(int fd, int cancel);
/* One request, one answer of at most `size` bytes; its length, or -errno. */
ssize_t netlink_ask(int protocol, void *request, size_t length, void *answer, size_t size);
#endif
