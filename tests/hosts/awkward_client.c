/* awkward_client PORT: connects, and exits with the letter that the server sent. With AWKWARD_TRAPS in the environment
 * all floating-point exceptions are signals. */
#include "awkward.h"
#include <fenv.h>

int main(int argc, char **argv)
{
    alarm(20);
    if (getenv("AWKWARD_TRAPS"))
        feenableexcept(FE_ALL_EXCEPT);
    int fd = argc > 1 ? connect_to(INADDR_LOOPBACK, atoi(argv[1])) : -1;
    return fd < 0 ? 'E' : letter_from(fd);
}
