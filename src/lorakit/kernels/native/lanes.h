/* Sixteen numbers at a time, by the compiler's vector extensions: whatever the processor has, it will use. */
#ifndef LORAKIT_LANES
#define LORAKIT_LANES

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2)));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec x) { *(vec *)p = x; }
static inline vec splat(float x) { return x - (vec){0}; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* exp to 2 ulp: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2] (Cephes). Below -87 it is 0. */
static inline vec exp_of(vec x) {
    ivec keep = ~(x <= -87.0f); /* NaN stays NaN */
    x = (vec)((ivec)x & keep);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23 rounds to the nearest whole number */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & keep);
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Sixteen numbers in bfloat16 -> float32, and back, rounded to the nearest. */
static inline vec widen(const uint16_t *p) { return (vec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16); }

static inline void narrow(uint16_t *p, vec value) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    uvec bits = (uvec)value;
    uvec up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec fine = value == value; /* rounding would turn some NaN into infinity */
    up = (up & (uvec)fine) | (0x7fc0 & ~(uvec)fine);
    *(hvec *)p = __builtin_convertvector(up, hvec);
#endif
}

/* Sixteen numbers from place j of p, which is in bfloat16 or float32; and the last n of a row, fewer than that, with zeros
 * behind. */
static inline vec fetch(const void *p, int64_t j, int half) {
    return half ? widen((const uint16_t *)p + j) : load((const float *)p + j);
}

static inline vec fetch_some(const void *p, int64_t j, int64_t n, int half) {
    float x[LANES] = {0};
    for (int64_t k = 0; k < n; k++) x[k] = half ? widened(((const uint16_t *)p)[j + k]) : ((const float *)p)[j + k];
    return load(x);
}

/* Sixteen numbers to place j of p, which is in bfloat16 or float32; and of such a vector the first n alone. */
static inline void put(void *p, int64_t j, int half, vec x) {
    if (half)
        narrow((uint16_t *)p + j, x);
    else
        store((float *)p + j, x);
}

static inline void put_some(void *p, int64_t j, int64_t n, int half, vec x) {
    for (int64_t k = 0; k < n; k++) {
        if (half)
            ((uint16_t *)p)[j + k] = rounded(x[k]);
        else
            ((float *)p)[j + k] = x[k];
    }
}

#endif
