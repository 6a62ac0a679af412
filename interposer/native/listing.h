/* The names in a directory, such as /proc/self/task, and the open descriptors, without allocation: for signal handlers and
 * after fork. */
#ifndef INTERPOSER_LISTING_H
#define INTERPOSER_LISTING_H
#include <stdbool.h>

/* Calls visit for each name until it says false. */
void listing_each(const char *directory, bool (*visit)(const char *name, void *context), void *context);
/* Calls visit for each open descriptor until it says false. */
void listing_descriptors(bool (*visit)(int fd, void *context), void *context);
#endif
