/* Makes every call in an IFUNC resolver, while the loader still relocates this program, and prints the first that did
 * not do what it should. */
#include "each_call.h"

static const char *bad = "the resolver";

static int answer(void)
{
    return 42;
}

static int (*resolve(void))(void)
{
    bad = each_bad();
    return answer;
}

static int resolved(void) __attribute__((ifunc("resolve")));

int main(void)
{
    int value = resolved();
    const char *again = each_bad();
    printf("%d %s %s\n", value, bad ? bad : "works", again ? again : "works");
    return 0;
}
