/* awkward_libpython PORT LIBPYTHON HOW [before]: connects, then loads a libpython of its own (HOW: global or local) and
 * runs Python in it, as plug-ins of editors, databases and web servers do, and connects once more; with `before` the
 * first connection comes after Python. Prints the letters. Python itself connects too. */
#include "awkward.h"
#include <dlfcn.h>
#include <wchar.h>

static const char *const program =
    "import socket, sys\n"
    "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as connection:\n"
    "    letter = connection.recv(1).decode()\n"
    "print(letter, flush=True)\n";

typedef void (*Initialize)(int);
typedef int (*Run)(const char *);
typedef void (*SetArguments)(int, wchar_t **, int);
typedef int (*Finalize)(void);

static int run_python(const char *path, int how, const char *port)
{
    void *library = dlopen(path, RTLD_NOW | how);
    if (!library)
        return 1;
    Initialize initialize = (Initialize)dlsym(library, "Py_InitializeEx");
    Run run = (Run)dlsym(library, "PyRun_SimpleString");
    SetArguments set = (SetArguments)dlsym(library, "PySys_SetArgvEx");
    Finalize finalize = (Finalize)dlsym(library, "Py_FinalizeEx");
    wchar_t word[16], *arguments[2] = {word, word};
    if (!initialize || !run || !set || !finalize)
        return 2;
    swprintf(word, 16, L"%s", port);
    initialize(0);
    set(2, arguments, 0);
    return run(program) || finalize() ? 3 : 0;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    int port = atoi(argv[1]), how = argv[3][0] == 'g' ? RTLD_GLOBAL : RTLD_LOCAL;
    alarm(40);
    if (argc < 5)
        SAY("%c\n", talk(port));
    int failed = run_python(argv[2], how, argv[1]);
    if (failed)
        return 10 + failed;
    SAY("%c\n", talk(port));
    return 0;
}
