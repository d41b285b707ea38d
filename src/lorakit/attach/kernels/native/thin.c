/* The gradient of a factor in bfloat16, a product whose one side is the rank: libraries bring the wide side into an order
 * of their own first, which for a rank of 8 costs more than the product; here it is read as it lies, once. Sums are in
 * float32, and are added to the gradient right away.
 *
 * Only where the processor multiplies pairs of bfloat16 (AVX-512 BF16): `thin_known` tells. */
#include "lanes.h"

#ifdef __AVX512BF16__
#define AT_ONCE 8 /* rows of the gradient whose sums stay in registers */

int thin_known(void) { return 1; }

static inline __m512 pairs(__m512 sum, __m512i x, const void *y) {
    int32_t two;
    memcpy(&two, y, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(two));
}

static inline uint16_t *scratch(int64_t n) { return aligned_alloc(64, (n * 2 + 63) / 64 * 64); }

/* into (r, o), float32, += scale s^T y for s (n, r), y (n, o); o a multiple of 32. `into_r` and `into_o` are its strides:
 * it may be transposed. */
int thin_left(const uint16_t *s, int64_t s_row, const uint16_t *y, int64_t y_row, float *into, int64_t into_r,
              int64_t into_o, int64_t n, int64_t o, int64_t r, float scale) {
    int64_t twos = (n + 1) / 2, wide = (r + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    uint16_t *order = scratch(twos * wide * 2); /* [n / 2][wide][2] */
    if (!order) return 1;
    for (int64_t p = 0; p < twos; p++)
        for (int64_t k = 0; k < wide; k++)
            for (int64_t two = 0; two < 2; two++)
                order[(p * wide + k) * 2 + two] = k < r && 2 * p + two < n ? s[(2 * p + two) * s_row + k] : 0;
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < o; j += 2 * LANES) {
        for (int64_t k = 0; k < wide; k += AT_ONCE) {
            __m512 low[AT_ONCE], high[AT_ONCE];
            for (int q = 0; q < AT_ONCE; q++) low[q] = high[q] = _mm512_setzero_ps();
            for (int64_t p = 0; p < twos; p++) {
                const uint16_t *row = y + 2 * p * y_row + j;
                __m512i one = _mm512_loadu_si512(row), other = _mm512_setzero_si512();
                if (2 * p + 1 < n) other = _mm512_loadu_si512(row + y_row);
                __m512i a = _mm512_unpacklo_epi16(one, other), b = _mm512_unpackhi_epi16(one, other);
                const uint16_t *left = order + (p * wide + k) * 2;
                for (int q = 0; q < AT_ONCE; q++) {
                    low[q] = pairs(low[q], a, left + 2 * q);
                    high[q] = pairs(high[q], b, left + 2 * q);
                }
            }
            for (int64_t q = 0; q < AT_ONCE && k + q < r; q++)
                for (int lane = 0; lane < LANES; lane++) { /* unpacking took four of every eight */
                    int64_t at = j + lane / 4 * 8 + lane % 4;
                    float *to = into + (k + q) * into_r + at * into_o;
                    to[0] += scale * ((vec)low[q])[lane];
                    to[4 * into_o] += scale * ((vec)high[q])[lane];
                }
        }
    }
    free(order);
    return 0;
}
#else
int thin_known(void) { return 0; }
#endif
