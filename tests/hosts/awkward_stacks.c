/* awkward_stacks PORT WHERE BYTES: connects twice from a small stack below which lies a page that must not be touched,
 * then listens there, and serves a client that is a thread with room. WHERE: thread, coroutine, signal (a handler on an
 * alternate stack), main (as the limit has it) or depth, which prints how deep one connection goes. */
#include "awkward.h"
#include <pthread.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <ucontext.h>

#define PAINT 0xa5

static int port;
static char letters[4];
static ucontext_t back;

static void *client(void *own_port)
{
    return (void *)(long)talk(*(int *)own_port);
}

static void connect_and_serve(void)
{
    static int own_port;
    static pthread_t thread;
    letters[0] = talk(port);
    letters[1] = talk(port);
    int listener = listener_at(&own_port);
    void *result;
    if (pthread_create(&thread, NULL, client, &own_port))
        _exit(9);
    letters[2] = serve_one(listener);
    pthread_join(thread, &result);
    if ((char)(long)result != letters[2])
        letters[2] = 'X';
    close(listener);
}

static void *in_thread(void *unused)
{
    (void)unused;
    connect_and_serve();
    return NULL;
}

static void in_coroutine(void)
{
    connect_and_serve();
    setcontext(&back);
}

static void on_signal(int number)
{
    (void)number;
    connect_and_serve();
}

static char *guarded(size_t size)
{
    char *memory = mmap(NULL, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE))
        _exit(8);
    return memory + 4096;
}

static void run_coroutine(size_t size)
{
    ucontext_t context;
    volatile bool returned = false;
    getcontext(&back);
    if (returned)
        return;
    returned = true;
    getcontext(&context);
    context.uc_stack.ss_sp = guarded(size);
    context.uc_stack.ss_size = size;
    context.uc_link = NULL;
    makecontext(&context, in_coroutine, 0);
    setcontext(&context);
}

static void run_on_signal(size_t size)
{
    stack_t stack = {.ss_sp = guarded(size), .ss_size = size};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    if (sigaltstack(&stack, NULL) || sigaction(SIGUSR1, &action, NULL))
        _exit(8);
    raise(SIGUSR1);
}

static void run_thread(size_t size, void *(*run)(void *))
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    if (pthread_attr_setstacksize(&attributes, size) || pthread_create(&thread, &attributes, run, NULL))
        _exit(8);
    pthread_join(thread, NULL);
}

static void *talk_only(void *unused)
{
    (void)unused;
    letters[0] = talk(port);
    return NULL;
}

/* On a painted stack: how far down the paint is gone after one connection. */
static void measure(size_t size)
{
    char *stack = guarded(size);
    pthread_attr_t attributes;
    pthread_t thread;
    memset(stack, PAINT, size);
    pthread_attr_init(&attributes);
    if (pthread_attr_setstack(&attributes, stack, size) || pthread_create(&thread, &attributes, talk_only, NULL))
        _exit(8);
    pthread_join(thread, NULL);
    size_t untouched = 0;
    while (untouched < size && (unsigned char)stack[untouched] == PAINT)
        untouched++;
    SAY("depth %zu\n", size - untouched);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    size_t size = (size_t)atol(argv[3]);
    const char *where = argv[2];
    port = atoi(argv[1]);
    alarm(30);
    if (!strcmp(where, "thread"))
        run_thread(size, in_thread);
    else if (!strcmp(where, "coroutine"))
        run_coroutine(size);
    else if (!strcmp(where, "signal"))
        run_on_signal(size);
    else if (!strcmp(where, "depth"))
        measure(size);
    else
        connect_and_serve();
    SAY("%s\n", letters);
    return 0;
}
