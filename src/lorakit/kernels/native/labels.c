/* Cross-entropy of rows of logits, in place: the gradient takes the place of the logits.
 *
 * A row is read twice in float32 (from float32 or bfloat16): once for its largest and the sum of exponentials, kept
 * running together, once to write softmax - onehot over it.
 */
#include "lanes.h"

static inline vec row_part(const void *row, int64_t j, int half) {
    return half ? widen((const uint16_t *)row + j) : load((const float *)row + j);
}

static inline float row_one(const void *row, int64_t j, int half) {
    return half ? widened(((const uint16_t *)row)[j]) : ((const float *)row)[j];
}

/* loss[i] = log sum exp(row i) - row i[label], right[i] = 1 where the label has the first largest logit. `stride` from row to
 * row. With `gradient`, softmax - onehot is written over the row. */
void labels_loss(void *logits, int64_t rows, int64_t n, int64_t stride, const int64_t *labels, float *loss,
                 float *right, int gradient, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        void *row = (char *)logits + i * stride * (half ? 2 : 4);
        int64_t j = 0, label = labels[i];
        vec tops = splat(-INFINITY);
        for (; j + LANES <= n; j += LANES) {
            vec x = row_part(row, j, half);
            ivec more = x > tops;
            tops = (vec)(((ivec)x & more) | ((ivec)tops & ~more));
        }
        float top = tops[0];
        for (int lane = 1; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
        for (; j < n; j++) {
            float x = row_one(row, j, half);
            top = x > top ? x : top;
        }
        vec sums = splat(0);
        for (j = 0; j + LANES <= n; j += LANES) sums += exp_of(row_part(row, j, half) - top);
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        for (; j < n; j++) sum += expf(row_one(row, j, half) - top);
        float own = row_one(row, label, half), shift = top + logf(sum);
        loss[i] = shift - own;
        int first = own == top; /* of equal ones the first counts, as in torch's argmax */
        for (j = 0; first && j < label; j++) first = row_one(row, j, half) != top;
        right[i] = first;
        if (!gradient) continue;
        if (half) {
            uint16_t *to = row;
            for (j = 0; j + LANES <= n; j += LANES) narrow(to + j, exp_of(widen(to + j) - shift));
            for (; j < n; j++) to[j] = rounded(expf(widened(to[j]) - shift));
            to[label] = rounded(expf(own - shift) - 1);
        } else {
            float *to = row;
            for (j = 0; j + LANES <= n; j += LANES) store(to + j, exp_of(load(to + j) - shift));
            for (; j < n; j++) to[j] = expf(to[j] - shift);
            to[label] = expf(own - shift) - 1;
        }
    }
}
