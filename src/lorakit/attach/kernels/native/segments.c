/* Attention inside segments: rows of several texts stand one after the other, and each text attends to itself only.
 *
 * One task is one head of one segment. Its q, k and v are read as float32 (from float32 or bfloat16), the scores of a
 * block of query rows are held whole, so the softmax needs no second pass over the keys, and the backward makes them
 * again from the log-sum-exp of the forward. Everything is summed in float32.
 *
 * A tensor is given by its first element and two strides, in elements: from token to token and from head to head.
 */
#include "lanes.h"

#define ROWS 32 /* query rows of one block */

typedef struct {
    void *first;
    int64_t token, head;
} View;

/* Rows first .. first + n of a view as float32 rows of `width` numbers, zeros behind the `d` that there are. */
static void read_rows(const View *x, int64_t first, int64_t n, int64_t head, int half, int64_t d, int64_t width,
                      float scale, float *out) {
    for (int64_t i = 0; i < n; i++) {
        int64_t offset = (first + i) * x->token + head * x->head, j = 0;
        float *row = out + i * width;
        if (half) {
            const uint16_t *from = (const uint16_t *)x->first + offset;
            for (; j + LANES <= d; j += LANES)
                store(row + j, widen(from + j) * scale);
            for (; j < d; j++) row[j] = widened(from[j]) * scale;
        } else {
            const float *from = (const float *)x->first + offset;
            for (; j + LANES <= d; j += LANES) store(row + j, load(from + j) * scale);
            for (; j < d; j++) row[j] = from[j] * scale;
        }
        for (; j < width; j++) row[j] = 0;
    }
}

static void write_rows(const View *x, int64_t first, int64_t n, int64_t head, int half, int64_t d, int64_t width,
                       float scale, const float *in) {
    for (int64_t i = 0; i < n; i++) {
        int64_t offset = (first + i) * x->token + head * x->head, j = 0;
        const float *row = in + i * width;
        if (half) {
            uint16_t *to = (uint16_t *)x->first + offset;
            for (; j + LANES <= d; j += LANES) narrow(to + j, load(row + j) * scale);
            for (; j < d; j++) to[j] = rounded(row[j] * scale);
        } else {
            float *to = (float *)x->first + offset;
            for (; j + LANES <= d; j += LANES) store(to + j, load(row + j) * scale);
            for (; j < d; j++) to[j] = row[j] * scale;
        }
    }
}

/* (n, width) -> (width, stride), zeros behind the n columns. */
static void transpose(const float *x, int64_t n, int64_t width, int64_t stride, float *out) {
    for (int64_t j = 0; j < width; j++) {
        for (int64_t i = 0; i < n; i++) out[j * stride + i] = x[i * width + j];
        for (int64_t i = n; i < stride; i++) out[j * stride + i] = 0;
    }
}

/* c (m, n) = or += a (m, k) b (k, n); n is a multiple of LANES. `a` has a stride for each side: it may be transposed. */
#define TILE(R, V)                                                                                                  \
    static inline void tile_##R##_##V(const float *a, int64_t ai, int64_t ak, const float *b, int64_t bk, float *c,  \
                                      int64_t ci, int64_t k, int add) {                                             \
        vec sum[R][V];                                                                                              \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int v = 0; v < V; v++) sum[r][v] = add ? load(c + r * ci + v * LANES) : splat(0);                   \
        for (int64_t p = 0; p < k; p++) {                                                                           \
            vec right[V];                                                                                           \
            for (int v = 0; v < V; v++) right[v] = load(b + p * bk + v * LANES);                                     \
            for (int r = 0; r < R; r++)                                                                             \
                for (int v = 0; v < V; v++) sum[r][v] += a[r * ai + p * ak] * right[v];                              \
        }                                                                                                           \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int v = 0; v < V; v++) store(c + r * ci + v * LANES, sum[r][v]);                                    \
    }
TILE(8, 2)
TILE(8, 1)
TILE(1, 2)
TILE(1, 1)

static void multiply(const float *a, int64_t ai, int64_t ak, const float *b, int64_t bk, float *c, int64_t ci,
                     int64_t m, int64_t n, int64_t k, int add) {
    int64_t j = 0;
    for (; j < n; j += j + 2 * LANES <= n ? 2 * LANES : LANES) {
        int wide = j + 2 * LANES <= n;
        int64_t i = 0;
        for (; i + 8 <= m; i += 8)
            (wide ? tile_8_2 : tile_8_1)(a + i * ai, ai, ak, b + j, bk, c + i * ci + j, ci, k, add);
        for (; i < m; i++)
            (wide ? tile_1_2 : tile_1_1)(a + i * ai, ai, ak, b + j, bk, c + i * ci + j, ci, k, add);
    }
}

/* Which rows ask and which answer. Segment s has the keys k_starts[s] .. k_starts[s + 1] and the queries
 * q_starts[s] .. q_starts[s + 1]; `places`, where there is one, gives the place of each query in its segment, rising;
 * else every row of a segment asks. */
typedef struct {
    const int64_t *q_starts, *k_starts, *places;
    int64_t n_segments, window; /* a query sees the last `window` keys up to its own place; 0: all of them */
    int causal;
} Plan;

/* How many of the n keys of its segment query i of the segment may see. */
static inline int64_t seen(const Plan *plan, int64_t segment, int64_t i, int64_t n) {
    if (!plan->causal) return n;
    return (plan->places ? plan->places[plan->q_starts[segment] + i] : i) + 1;
}

/* The first key that it may see. */
static inline int64_t seen_from(const Plan *plan, int64_t segment, int64_t i, int64_t n) {
    int64_t begin = plan->window ? seen(plan, segment, i, n) - plan->window : 0;
    return begin > 0 ? begin : 0;
}

/* Scores of rows i0 .. i0 + m -> probabilities, and the log-sum-exp of each row. */
static void softmax_rows(float *s, int64_t stride, const Plan *plan, int64_t segment, int64_t i0, int64_t m, int64_t n,
                         float *lse, int64_t lse_step) {
    for (int64_t i = 0; i < m; i++) {
        float *row = s + i * stride;
        int64_t count = seen(plan, segment, i0 + i, n);
        for (int64_t j = count; j < stride; j++) row[j] = -INFINITY;
        for (int64_t j = seen_from(plan, segment, i0 + i, n) - 1; j >= 0; j--) row[j] = -INFINITY;
        vec top = load(row);
        for (int64_t j = LANES; j < stride; j += LANES) {
            vec x = load(row + j);
            ivec more = x > top;
            top = (vec)(((ivec)x & more) | ((ivec)top & ~more));
        }
        float most = top[0];
        for (int v = 1; v < LANES; v++) most = top[v] > most ? top[v] : most;
        vec sum = splat(0);
        for (int64_t j = 0; j < stride; j += LANES) {
            vec e = exp_of(load(row + j) - most);
            store(row + j, e);
            sum += e;
        }
        float total = 0;
        for (int v = 0; v < LANES; v++) total += sum[v];
        float share = 1 / total;
        for (int64_t j = 0; j < stride; j += LANES) store(row + j, load(row + j) * share);
        lse[i * lse_step] = most + logf(total);
    }
}

static float *take(float **from, int64_t n) {
    float *mine = *from;
    *from += padded(n);
    return mine;
}

static int64_t longest_of(const int64_t *starts, int64_t n_segments) {
    int64_t longest = 0;
    for (int64_t s = 0; s < n_segments; s++)
        if (starts[s + 1] - starts[s] > longest) longest = starts[s + 1] - starts[s];
    return longest;
}

/* out = softmax(scale q k^T) v inside every segment; `lse` is (queries, heads). Returns 0, or 1 if there was no memory. */
int segments_forward(const View *q, const View *k, const View *v, const View *out, float *lse, const Plan *plan,
                     int64_t heads, int64_t kv_heads, int64_t d, float scale, int half) {
    const int64_t *q_starts = plan->q_starts, *k_starts = plan->k_starts;
    int64_t longest = longest_of(k_starts, plan->n_segments), width = padded(d), failed = 0;
#pragma omp parallel
    {
        int64_t size = (2 * longest + ROWS) * width + ROWS * width + padded(longest) * (width + ROWS) + 8 * LANES;
        float *memory = malloc(size * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < plan->n_segments * heads; task++) {
            if (!memory) continue;
            int64_t segment = task / heads, head = task % heads, kv = head / (heads / kv_heads);
            int64_t first = k_starts[segment], n = k_starts[segment + 1] - first, stride = padded(n);
            int64_t asks = q_starts[segment], n_asks = q_starts[segment + 1] - asks;
            float *free_ = memory;
            float *kr = take(&free_, n * width), *vr = take(&free_, n * width), *kt = take(&free_, width * stride);
            float *qr = take(&free_, ROWS * width), *s = take(&free_, ROWS * stride), *o = take(&free_, ROWS * width);
            read_rows(k, first, n, kv, half, d, width, 1, kr);
            read_rows(v, first, n, kv, half, d, width, 1, vr);
            transpose(kr, n, width, stride, kt);
            for (int64_t i = 0; i < n_asks; i += ROWS) {
                int64_t m = n_asks - i < ROWS ? n_asks - i : ROWS, reach = seen(plan, segment, i + m - 1, n);
                int64_t cover = padded(reach);
                read_rows(q, asks + i, m, head, half, d, width, scale, qr);
                multiply(qr, width, 1, kt, stride, s, cover, m, cover, d, 0);
                softmax_rows(s, cover, plan, segment, i, m, n, lse + (asks + i) * heads + head, heads);
                multiply(s, cover, 1, vr, width, o, width, m, width, reach, 0);
                write_rows(out, asks + i, m, head, half, d, width, 1, o);
            }
        }
        free(memory);
    }
    return (int)failed;
}

/* Gradients of the forward: dq, dk, dv from dout, with the scores made again from `lse`. */
int segments_backward(const View *q, const View *k, const View *v, const View *out, const View *dout, const View *dq,
                      const View *dk, const View *dv, const float *lse, const Plan *plan, int64_t heads,
                      int64_t kv_heads, int64_t d, float scale, int half) {
    const int64_t *q_starts = plan->q_starts, *k_starts = plan->k_starts;
    int64_t longest = longest_of(k_starts, plan->n_segments), width = padded(d), failed = 0, share = heads / kv_heads;
#pragma omp parallel
    {
        int64_t size = 4 * longest * width + 2 * width * padded(longest) + 4 * ROWS * width +
                       2 * ROWS * padded(longest) + 16 * LANES;
        float *memory = malloc(size * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < plan->n_segments * kv_heads; task++) {
            if (!memory) continue;
            int64_t segment = task / kv_heads, kv = task % kv_heads;
            int64_t first = k_starts[segment], n = k_starts[segment + 1] - first, stride = padded(n);
            int64_t asks = q_starts[segment], n_asks = q_starts[segment + 1] - asks;
            float *free_ = memory;
            float *kr = take(&free_, n * width), *vr = take(&free_, n * width);
            float *kt = take(&free_, width * stride), *vt = take(&free_, width * stride);
            float *dkr = take(&free_, n * width), *dvr = take(&free_, n * width);
            float *qr = take(&free_, ROWS * width), *dor = take(&free_, ROWS * width), *or_ = take(&free_, ROWS * width);
            float *dqr = take(&free_, ROWS * width);
            float *p = take(&free_, ROWS * stride), *dp = take(&free_, ROWS * stride);
            read_rows(k, first, n, kv, half, d, width, 1, kr);
            read_rows(v, first, n, kv, half, d, width, 1, vr);
            transpose(kr, n, width, stride, kt);
            transpose(vr, n, width, stride, vt);
            memset(dkr, 0, n * width * sizeof(float));
            memset(dvr, 0, n * width * sizeof(float));
            for (int64_t head = kv * share; head < (kv + 1) * share; head++)
                for (int64_t i = 0; i < n_asks; i += ROWS) {
                    int64_t m = n_asks - i < ROWS ? n_asks - i : ROWS, reach = seen(plan, segment, i + m - 1, n);
                    int64_t cover = padded(reach);
                    read_rows(q, asks + i, m, head, half, d, width, scale, qr);
                    read_rows(dout, asks + i, m, head, half, d, width, 1, dor);
                    read_rows(out, asks + i, m, head, half, d, width, 1, or_);
                    multiply(qr, width, 1, kt, stride, p, cover, m, cover, d, 0);
                    multiply(dor, width, 1, vt, stride, dp, cover, m, cover, d, 0);
                    for (int64_t r = 0; r < m; r++) {
                        float *row = p + r * cover, *drow = dp + r * cover;
                        float shift = lse[(asks + i + r) * heads + head];
                        vec dots = splat(0);
                        for (int64_t j = 0; j < width; j += LANES)
                            dots += load(dor + r * width + j) * load(or_ + r * width + j);
                        float delta = 0;
                        for (int lane = 0; lane < LANES; lane++) delta += dots[lane];
                        for (int64_t j = seen(plan, segment, i + r, n); j < cover; j++) row[j] = -INFINITY;
                        for (int64_t j = seen_from(plan, segment, i + r, n) - 1; j >= 0; j--) row[j] = -INFINITY;
                        for (int64_t j = 0; j < cover; j += LANES) {
                            vec e = exp_of(load(row + j) - shift);
                            store(row + j, e);
                            store(drow + j, e * (load(drow + j) - delta));
                        }
                    }
                    multiply(dp, cover, 1, kr, width, dqr, width, m, width, reach, 0);
                    write_rows(dq, asks + i, m, head, half, d, width, scale, dqr);
                    multiply(dp, 1, cover, qr, width, dkr, width, reach, width, m, 1); /* q has the scale in it */
                    multiply(p, 1, cover, dor, width, dvr, width, reach, width, m, 1);
                }
            write_rows(dk, first, n, kv, half, d, width, 1, dkr);
            write_rows(dv, first, n, kv, half, d, width, 1, dvr);
        }
        free(memory);
    }
    return (int)failed;
}
