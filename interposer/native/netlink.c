/* No state. Runs after fork and in signal handlers. */
#include "netlink.h"
#include "real.h"
#include <errno.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/socket.h>

#define MAX_ERRNO 4095                 /* the kernel's own bound */

int netlink_open(int protocol, int *cancel)
{
    int fd = real.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0)
        return -errno;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, cancel);
    return fd;
}

void netlink_close(int fd, int cancel)
{
    real.close(fd);
    pthread_setcancelstate(cancel, NULL);
}

ssize_t netlink_ask(int protocol, void *request, size_t length, void *answer, size_t size)
{
    int cancel, fd = netlink_open(protocol, &cancel);
    if (fd < 0)
        return fd;
    ssize_t got = real.send(fd, request, length, MSG_NOSIGNAL);
    if (got >= 0)
        do
            got = real.recv(fd, answer, size, 0);
        while (got < 0 && errno == EINTR);
    if (got < 0)
        got = -errno;
    netlink_close(fd, cancel);
    if (got >= 0) {
        struct nlmsghdr *header = answer;
        if ((size_t)got < sizeof *header || header->nlmsg_len > (size_t)got)
            return -EPROTO;
        if (header->nlmsg_type == NLMSG_ERROR) {
            struct nlmsgerr *error = NLMSG_DATA(header);
            bool whole = header->nlmsg_len >= NLMSG_LENGTH(sizeof error->error);
            return whole && error->error < 0 && error->error >= -MAX_ERRNO ? error->error : -EPROTO;
        }
    }
    return got;
}
