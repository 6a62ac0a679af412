/* Owns the table of originals. No lock: every thread that resolves stores the same pointers. Runs anywhere. */
#include "real.h"
#include <dlfcn.h>
#include <errno.h>

#define HOOK(type, name, parameters, arguments)                                                                        \
    static type lazy_##name parameters                                                                                 \
    {                                                                                                                  \
        real_resolve();                                                                                                \
        return real.name arguments;                                                                                    \
    }
#include "hooks.def"
#undef HOOK

struct real real = {
#define HOOK(type, name, parameters, arguments) .name = lazy_##name,
#include "hooks.def"
#undef HOOK
};

static long missing(void)
{
    errno = ENOSYS;
    return -1;
}

static void *find(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    return found ? found : (void *)missing;
}

void real_resolve(void)
{
    int saved = errno;
#define HOOK(type, name, parameters, arguments) __atomic_store_n((void **)&real.name, find(#name), __ATOMIC_RELAXED);
#include "hooks.def"
#undef HOOK
    errno = saved;
}
