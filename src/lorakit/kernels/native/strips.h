/* Products of bfloat16 matrices whose one side is a rank, a multiple of 8, and whose other is a multiple of 32: strips of
 * columns, sums in float32 in registers. For processors that multiply pairs of bfloat16 (AVX-512 BF16). */
#ifndef LORAKIT_STRIPS
#define LORAKIT_STRIPS

#include "lanes.h"
#include "threads.h"

#ifdef __AVX512BF16__
#define AT_ONCE 8     /* ranks whose sums stay in registers */
#define STRIP 32      /* columns of one load */
#define ROWS 4        /* rows whose sums stay in registers */
#define FEW 128       /* rows that are not worth a second thread */

static inline __m512 pairs(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

static inline __m512i twice(const uint16_t *p) {
    int32_t two;
    memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
}

/* Sixteen vectors -> the sum of each. */
static inline __m512 sums(const __m512 *v) {
    __m512 t[8], u[4];
    for (int j = 0; j < 8; j++)
        t[j] = _mm512_unpacklo_ps(v[2 * j], v[2 * j + 1]) + _mm512_unpackhi_ps(v[2 * j], v[2 * j + 1]);
    for (int j = 0; j < 4; j++) {
        __m512d a = (__m512d)t[2 * j], b = (__m512d)t[2 * j + 1];
        u[j] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    __m512 low = _mm512_shuffle_f32x4(u[0], u[1], 0x88) + _mm512_shuffle_f32x4(u[0], u[1], 0xdd);
    __m512 high = _mm512_shuffle_f32x4(u[2], u[3], 0x88) + _mm512_shuffle_f32x4(u[2], u[3], 0xdd);
    return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

/* s (m, r) = x (m, i) a^T */
static inline void project(const uint16_t *x, int64_t x_row, const uint16_t *a, int64_t i, int64_t r, uint16_t *s, int64_t s_row,
                    int64_t m) {
    for (int64_t k = 0; k < r; k += AT_ONCE)
        for (int64_t t = 0; t < m; t += 2) {
            const uint16_t *one = x + t * x_row, *other = t + 1 < m ? one + x_row : one;
            __m512 sum[2 * AT_ONCE];
            for (int q = 0; q < 2 * AT_ONCE; q++) sum[q] = _mm512_setzero_ps();
            for (int64_t j = 0; j < i; j += STRIP) {
                __m512i p = _mm512_loadu_si512(one + j), o = _mm512_loadu_si512(other + j);
                for (int q = 0; q < AT_ONCE; q++) {
                    __m512i row = _mm512_loadu_si512(a + (k + q) * i + j);
                    sum[q] = pairs(sum[q], p, row);
                    sum[AT_ONCE + q] = pairs(sum[AT_ONCE + q], o, row);
                }
            }
            __m256i both = (__m256i)_mm512_cvtneps_pbh(sums(sum));
            _mm_storeu_si128((__m128i *)(s + t * s_row + k), _mm256_castsi256_si128(both));
            if (t + 1 < m) _mm_storeu_si128((__m128i *)(s + (t + 1) * s_row + k), _mm256_extracti128_si256(both, 1));
        }
}

/* Two rows of b (r, o) beside each other, as `expand` takes them: [o / 32][r / 2][2][16] pairs, in the order of unpacking:
 * the first vector has columns 0-3, 8-11, 16-19, 24-27 of the strip. */
static inline void pair_up(const uint16_t *b, int64_t r, int64_t o, uint16_t *to) {
    for (int64_t j = 0; j < o; j += STRIP)
        for (int64_t k = 0; k < r; k += 2, to += 2 * STRIP) {
            __m512i one = _mm512_loadu_si512(b + k * o + j), other = _mm512_loadu_si512(b + (k + 1) * o + j);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(one, other));
            _mm512_storeu_si512(to + STRIP, _mm512_unpackhi_epi16(one, other));
        }
}

/* Numbers of columns in the order of `pair_up`. */
static inline void spread(const float *from, int64_t o, float *to) {
    for (int64_t j = 0; j < o; j += STRIP)
        for (int64_t c = 0; c < STRIP; c++) to[j + (c & 4 ? LANES : 0) + c / 8 * 4 + c % 4] = from[j + c];
}

/* One strip of y += s b for `rows` rows: a constant, so that the sums stay in registers. With `gain` (of `spread`), y is
 * multiplied by it behind that, and a bias, if there is one, added. */
static inline __attribute__((always_inline)) void strip(uint16_t *y, int64_t y_row, const uint16_t *b, const uint16_t *s,
                                                        int64_t s_row, int64_t r, int rows, __m512i order,
                                                        const float *gain, const float *bias) {
    __m512 low[ROWS], high[ROWS];
    for (int t = 0; t < rows; t++) {
        __m512i row = _mm512_loadu_si512(y + t * y_row), zero = _mm512_setzero_si512();
        low[t] = (__m512)_mm512_unpacklo_epi16(zero, row);
        high[t] = (__m512)_mm512_unpackhi_epi16(zero, row);
    }
    for (int64_t k = 0; k < r; k += 2, b += 2 * STRIP) {
        __m512i first = _mm512_loadu_si512(b), second = _mm512_loadu_si512(b + STRIP);
        for (int t = 0; t < rows; t++) {
            __m512i two = twice(s + t * s_row + k);
            low[t] = pairs(low[t], first, two);
            high[t] = pairs(high[t], second, two);
        }
    }
    if (gain) {
        __m512 one = _mm512_loadu_ps(gain), other = _mm512_loadu_ps(gain + LANES);
        __m512 add = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
        __m512 more = bias ? _mm512_loadu_ps(bias + LANES) : _mm512_setzero_ps();
        for (int t = 0; t < rows; t++) {
            low[t] = low[t] * one + add;
            high[t] = high[t] * other + more;
        }
    }
    for (int t = 0; t < rows; t++)
        _mm512_storeu_si512(y + t * y_row,
                            _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high[t], low[t])));
}

/* y (m, o) += s (m, r) b, with b from `pair_up`; then y = gain y + bias, both from `spread`, if there is a gain. */
static inline void expand(uint16_t *y, int64_t y_row, int64_t o, const uint16_t *b, const uint16_t *s, int64_t s_row, int64_t r,
                   int64_t m, const float *gain, const float *bias) {
    uint16_t places[STRIP];
    for (int c = 0; c < STRIP; c++) places[c] = (uint16_t)((c & 4 ? 16 : 0) + c / 8 * 4 + c % 4);
    __m512i order = _mm512_loadu_si512(places);
    int64_t t = 0;
    for (; t + ROWS <= m; t += ROWS)
        for (int64_t j = 0; j < o; j += STRIP)
            strip(y + t * y_row + j, y_row, b + j * r, s + t * s_row, s_row, r, ROWS, order, gain ? gain + j : NULL,
                  bias ? bias + j : NULL);
    for (; t < m; t++)
        for (int64_t j = 0; j < o; j += STRIP)
            strip(y + t * y_row + j, y_row, b + j * r, s + t * s_row, s_row, r, 1, order, gain ? gain + j : NULL,
                  bias ? bias + j : NULL);
}

/* sum [r / 8][o / 32][2][8][16] += s^T y for s (m, r), y (m, o); `work` has room for m + 1 rows of s. */
static inline void outer(float *sum, const uint16_t *s, int64_t s_row, const uint16_t *y, int64_t y_row, int64_t o, int64_t r,
                  int64_t m, uint16_t *work) {
    for (int64_t k = 0; k < r; k += AT_ONCE) {
        for (int64_t t = 0; t < m; t += 2) {
            const uint16_t *row = s + t * s_row + k;
            __m128i one = _mm_loadu_si128((const __m128i *)row), other = _mm_setzero_si128();
            if (t + 1 < m) other = _mm_loadu_si128((const __m128i *)(row + s_row));
            _mm_storeu_si128((__m128i *)(work + t * AT_ONCE), _mm_unpacklo_epi16(one, other));
            _mm_storeu_si128((__m128i *)(work + (t + 1) * AT_ONCE), _mm_unpackhi_epi16(one, other));
        }
        for (int64_t j = 0; j < o; j += STRIP, sum += STRIP * AT_ONCE) {
            __m512 low[AT_ONCE], high[AT_ONCE];
            for (int q = 0; q < AT_ONCE; q++) {
                low[q] = _mm512_loadu_ps(sum + q * LANES);
                high[q] = _mm512_loadu_ps(sum + (AT_ONCE + q) * LANES);
            }
            for (int64_t t = 0; t < m; t += 2) {
                const uint16_t *row = y + t * y_row + j;
                __m512i one = _mm512_loadu_si512(row), other = _mm512_setzero_si512();
                if (t + 1 < m) other = _mm512_loadu_si512(row + y_row);
                __m512i a = _mm512_unpacklo_epi16(one, other), b = _mm512_unpackhi_epi16(one, other);
                for (int q = 0; q < AT_ONCE; q++) {
                    __m512i two = twice(work + t * AT_ONCE + 2 * q);
                    low[q] = pairs(low[q], a, two);
                    high[q] = pairs(high[q], b, two);
                }
            }
            for (int q = 0; q < AT_ONCE; q++) {
                _mm512_storeu_ps(sum + q * LANES, low[q]);
                _mm512_storeu_ps(sum + (AT_ONCE + q) * LANES, high[q]);
            }
        }
    }
}

/* Adds what `outer` has summed up, times scale and, if there is one, the gain of each column: to (rank, o) by its strides. */
static inline void deliver(const float *sum, int64_t o, int64_t rank, float *to, int64_t to_r, int64_t to_o, float scale,
                           const float *gain) {
    for (int64_t k = 0; k < rank; k++)
        for (int64_t j = 0; j < o; j += STRIP) {
            const float *from = sum + (k / AT_ONCE * o + j) * AT_ONCE + k % AT_ONCE * LANES;
            for (int64_t lane = 0; lane < LANES; lane++) {
                int64_t column = j + lane / 4 * 8 + lane % 4;
                float *place = to + k * to_r + column * to_o;
                place[0] += (gain ? gain[column] : 1.0f) * scale * from[lane];
                place[4 * to_o] += (gain ? gain[column + 4] : 1.0f) * scale * from[AT_ONCE * LANES + lane];
            }
        }
}

static inline void *room(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
#endif
#endif
