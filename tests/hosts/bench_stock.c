/* Preloaded behind the switch: buffers are granted as where net.core.wmem_max is the kernel's default and nobody may exceed
 * it, whatever this machine says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>

#define STOCK_WMEM_MAX 212992

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    static int (*next)(int, int, int, const void *, socklen_t);
    int size;
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "setsockopt");
    if (level == SOL_SOCKET && (name == SO_SNDBUFFORCE || name == SO_RCVBUFFORCE)) {
        errno = EPERM;
        return -1;
    }
    if (level != SOL_SOCKET || (name != SO_SNDBUF && name != SO_RCVBUF) || length < sizeof size)
        return next(fd, level, name, value, length);
    size = *(const int *)value < STOCK_WMEM_MAX ? *(const int *)value : STOCK_WMEM_MAX;
    return next(fd, level, name, &size, sizeof size);
}
