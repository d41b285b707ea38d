/* Weights in 8 or 4 bits made numbers again: y[k] = table[code] * scale or code * scale, row by row, in one reading.
 * Two codes of 4 bits share a byte: within every 32 the low halves are the first 16, the high halves the rest. */
#include "lanes.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef int8_t bvec __attribute__((vector_size(LANES), aligned(1)));
typedef uint8_t ubvec __attribute__((vector_size(LANES), aligned(1)));

/* A vector to place j of p, or as much of it as the n numbers that are left of a row take. */
static inline void put_left(void *p, int64_t j, int64_t n, int half, vec x) {
    if (n >= LANES)
        put(p, j, half, x);
    else
        put_some(p, j, n, half, x);
}

static inline vec looked_up(vec table, ivec at) {
#ifdef __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)at, (__m512)table);
#else
    vec found;
    for (int k = 0; k < LANES; k++) found[k] = table[at[k]];
    return found;
#endif
}

/* codes (.., i), one scale for a row. `at` names the rows that are wanted, or is 0 for all. */
void unpack_bytes(const int8_t *codes, const float *scales, const int64_t *at, void *y, int64_t rows, int64_t i,
                  int half) {
    int64_t size = half ? 2 : 4;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++) {
        int64_t row = at ? at[k] : k;
        const int8_t *from = codes + row * i;
        char *to = (char *)y + k * i * size;
        vec scale = splat(scales[row]);
        int64_t j = 0;
        for (; j + LANES <= i; j += LANES)
            put(to, j, half, __builtin_convertvector(*(const bvec *)(from + j), vec) * scale);
        if (j < i) {
            int8_t last[LANES] = {0};
            memcpy(last, from + j, i - j);
            put_some(to, j, i - j, half, __builtin_convertvector(*(const bvec *)last, vec) * scale);
        }
    }
}

/* codes (.., width) bytes, one scale in bfloat16 for `block` numbers, a multiple of 32. */
void unpack_halves(const uint8_t *codes, const uint16_t *scales, const float *table, const int64_t *at, void *y,
                   int64_t rows, int64_t i, int64_t width, int64_t block, int half) {
    int64_t size = half ? 2 : 4, blocks = (i + block - 1) / block;
    vec values = load(table);
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++) {
        int64_t row = at ? at[k] : k;
        const uint8_t *from = codes + row * width;
        const uint16_t *scale = scales + row * blocks;
        char *to = (char *)y + k * i * size;
        for (int64_t j = 0; j < i; j += 2 * LANES) {
            ivec both = __builtin_convertvector(*(const ubvec *)(from + j / 2), ivec);
            vec by = splat(widened(scale[j / block]));
            put_left(to, j, i - j, half, looked_up(values, both & 15) * by);
            if (i - j > LANES) put_left(to, j + LANES, i - j - LANES, half, looked_up(values, both >> 4) * by);
        }
    }
}
