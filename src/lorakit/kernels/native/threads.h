/* How many threads a call takes, and which one this is: OpenMP's, which are torch's own; else one. */
#ifndef LORAKIT_THREADS
#define LORAKIT_THREADS

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* For n rows, of which fewer than `few` are not worth a second one. */
static inline int64_t threads_for(int64_t n, int64_t few) {
#ifdef _OPENMP
    return n < few ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

static inline int64_t me(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

#endif
