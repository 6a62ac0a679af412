/* awkward_static PORT CHILD: connects, is connected to, and runs CHILD, a program with libc, in the same way. Linked
 * statically in the tests, so that no library can come in. Prints the letters, last the child's exit status. */
#include "awkward.h"

int main(int argc, char **argv)
{
    int own_port = 0;
    if (argc < 3)
        return 2;
    alarm(30);
    SAY("%c\n", talk(atoi(argv[1])));
    int listener = listener_at(&own_port);
    char word[16];
    snprintf(word, sizeof word, "%d", own_port);
    pid_t client = fork();
    if (client == 0) {
        execl(argv[2], argv[2], word, (char *)NULL);
        _exit(77);
    }
    SAY("%c\n", serve_one(listener));
    SAY("%c\n", ended_within(client, 10));
    return 0;
}
