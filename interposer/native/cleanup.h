/* pthread_cleanup_push, whose names musl's loader does not know: it would not start a program that was to preload us. */
#ifndef INTERPOSER_CLEANUP_H
#define INTERPOSER_CLEANUP_H
#include <pthread.h>
#pragma weak __pthread_register_cancel
#pragma weak __pthread_unregister_cancel
#endif
