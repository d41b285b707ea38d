/* A gain for every column of a layer's output, and its bias: forward in place, backward in one reading. Float32 inside; y
 * and dy are float32 or bfloat16, gain, bias and the gain's gradient float32. */
#include "lanes.h"
#include "threads.h"

#define FEW 64 /* rows that are not worth a second thread */

static inline const void *row_of(const void *p, int64_t t, int64_t stride, int half) {
    return (const char *)p + t * stride * (half ? 2 : 4);
}

/* y (n, o) = gain y + bias; bias may be null. */
void gain_forward(void *y, int64_t stride, const float *gain, const float *bias, int64_t n, int64_t o, int half) {
#pragma omp parallel for schedule(static) num_threads(threads_for(n, FEW))
    for (int64_t t = 0; t < n; t++) {
        void *row = (void *)row_of(y, t, stride, half);
        int64_t j = 0;
        for (; j + LANES <= o; j += LANES) {
            vec x = fetch(row, j, half) * load(gain + j);
            put(row, j, half, bias ? x + load(bias + j) : x);
        }
        if (j < o) {
            vec x = fetch_some(row, j, o - j, half) * fetch_some(gain, j, o - j, 0);
            put_some(row, j, o - j, half, bias ? x + fetch_some(bias, j, o - j, 0) : x);
        }
    }
}

/* dz (n, o) = gain dy, and dgain (o) += sum over rows of dy (y - bias) / gain, which is dy times what the gain was given.
 * Threads take rows, and add up in their order. Not 0 if there is no memory. */
int gain_backward(const void *dy, int64_t dy_stride, const void *y, int64_t y_stride, const float *gain, const float *bias,
                  void *dz, float *dgain, int64_t n, int64_t o, int half) {
    int64_t threads = threads_for(n, FEW), wide = padded(o), share = (n + threads - 1) / threads;
    float *all = aligned_alloc(64, (size_t)(threads * wide * 4));
    if (!all) return 1;
    memset(all, 0, (size_t)(threads * wide * 4));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *sum = all + thread * wide;
        for (int64_t t = thread * share; t < n && t < (thread + 1) * share; t++) {
            const void *up = row_of(dy, t, dy_stride, half), *out = row_of(y, t, y_stride, half);
            void *to = (void *)row_of(dz, t, o, half);
            int64_t j = 0;
            for (; j + LANES <= o; j += LANES) {
                vec d = fetch(up, j, half), x = fetch(out, j, half);
                store(sum + j, load(sum + j) + d * (bias ? x - load(bias + j) : x));
                put(to, j, half, d * load(gain + j));
            }
            if (j < o) {
                vec d = fetch_some(up, j, o - j, half), x = fetch_some(out, j, o - j, half);
                store(sum + j, load(sum + j) + d * (bias ? x - fetch_some(bias, j, o - j, 0) : x));
                put_some(to, j, o - j, half, d * fetch_some(gain, j, o - j, 0));
            }
        }
    }
    if (dgain)
        for (int64_t thread = 0; thread < threads; thread++)
            for (int64_t j = 0; j < o; j++) dgain[j] += all[thread * wide + j] / gain[j];
    free(all);
    return 0;
}
