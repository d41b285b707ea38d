/* What a block does to each number or each row by itself, forward and backward in one reading: the GELU in its tanh form
 * (Hendrycks and Gimpel, 2016, arXiv 1606.08415) and the root-mean-square norm (Zhang and Sennrich, 2019, arXiv
 * 1910.07467). Float32 inside; x and y are float32 or bfloat16. */
#include "lanes.h"

#define PIECE 4096 /* numbers of one task */

/* sigmoid(2 u) for u = sqrt(2 / pi) (x + 0.044715 x^3): gelu(x) = x sigmoid(2 u), since 1 + tanh u = 2 sigmoid(2 u). */
static inline vec gate_of(vec x) {
    vec u2 = 1.5957691216f * x * (1.0f + 0.044715f * x * x);
    ivec low = u2 < -80.0f, high = u2 > 80.0f; /* where exp would leave its range */
    u2 = (vec)((low & (ivec)splat(-80.0f)) | (high & (ivec)splat(80.0f)) | (~(low | high) & (ivec)u2));
    return (vec)((ivec)(1.0f / (1.0f + exp_of(-u2))) & ~low);
}

static inline vec gelu_one(vec x) { return x * gate_of(x); }

static inline vec gelu_slope(vec x) {
    vec s = gate_of(x);
    return s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
}

/* y = gelu(x), or with dy: y = dy gelu'(x); n numbers that lie one after the other. */
void gelu_rows(const void *x, const void *dy, void *y, int64_t n, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        int64_t end = begin + PIECE < n ? begin + PIECE : n, j = begin;
        for (; j + LANES <= end; j += LANES) {
            vec one = fetch(x, j, half);
            put(y, j, half, dy ? fetch(dy, j, half) * gelu_slope(one) : gelu_one(one));
        }
        if (j < end) {
            vec one = fetch_some(x, j, end - j, half);
            put_some(y, j, end - j, half, dy ? fetch_some(dy, j, end - j, half) * gelu_slope(one) : gelu_one(one));
        }
    }
}

static inline float total(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* y = x r w with r = 1 / sqrt(mean(x^2) + eps), row by row (rows, d), w in float32; or with dy the gradient of x:
 * r (dy w - x r^2 mean(dy w x)). */
void rms_rows(const void *x, const void *dy, const float *w, void *y, int64_t rows, int64_t d, float eps, int half) {
    int64_t size = half ? 2 : 4, whole = d / LANES * LANES, rest = d - whole;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const char *xi = (const char *)x + i * d * size, *di = dy ? (const char *)dy + i * d * size : 0;
        char *yi = (char *)y + i * d * size;
        vec squares = splat(0), dots = splat(0), last_w = splat(0);
        if (rest) last_w = fetch_some(w, whole, rest, 0);
        for (int64_t j = 0; j < whole; j += LANES) {
            vec one = fetch(xi, j, half);
            squares += one * one;
            if (dy) dots += fetch(di, j, half) * load(w + j) * one;
        }
        if (rest) {
            vec one = fetch_some(xi, whole, rest, half);
            squares += one * one;
            if (dy) dots += fetch_some(di, whole, rest, half) * last_w * one;
        }
        float r = 1.0f / sqrtf(total(squares) / d + eps), pull = dy ? r * r * total(dots) / d : 0;
        for (int64_t j = 0; j < whole; j += LANES) {
            vec one = fetch(xi, j, half);
            put(yi, j, half, dy ? r * (fetch(di, j, half) * load(w + j) - one * pull) : one * r * load(w + j));
        }
        if (rest) {
            vec one = fetch_some(xi, whole, rest, half);
            vec out = dy ? r * (fetch_some(di, whole, rest, half) * last_w - one * pull) : one * r * last_w;
            put_some(yi, whole, rest, half, out);
        }
    }
}
