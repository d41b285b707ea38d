/* Attention inside segments: rows of several texts stand one after the other, and each text attends to itself only.
 *
 * One task is one head of one segment. Its q, k and v are read as float32 (from float32 or bfloat16), the scores of a
 * block of query rows are held whole, so the softmax needs no second pass over the keys, and the backward makes them
 * again from the log-sum-exp of the forward. Everything is summed in float32.
 *
 * A tensor is given by its first element and two strides, in elements: from token to token and from head to head.
 * What makes a score is softcap(scale q k + bias), where softcap(x) is cap tanh(x / cap) (Gemma 2) and the bias is one
 * number for every head and distance (T5).
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

/* Which rows ask and which answer, and how. Segment s has the keys k_starts[s] .. k_starts[s + 1] and the queries
 * q_starts[s] .. q_starts[s + 1]; `places`, where there is one, gives the place of each query in its segment, rising;
 * else they stand there one after the other. */
typedef struct {
    const int64_t *q_starts, *k_starts, *places;
    const float *bias; /* (heads, 2 reach - 1), from distance key - query = 1 - reach on; or null */
    int64_t n_segments, heads, kv_heads, d, reach;
    int64_t window; /* a query sees the last `window` keys up to its own place; 0: all of them */
    float scale, softcap; /* softcap 0: none */
    int causal, half;
} Plan;

/* One head of the keys and values of one segment: (n, width), and the keys transposed (width, stride). */
typedef struct {
    int64_t segment, first, n, stride, asks, n_asks;
    float *k, *v, *kt;
} Keys;

static float *take(float **from, int64_t n) {
    float *mine = *from;
    *from += padded(n);
    return mine;
}

static Keys read_keys(const Plan *plan, const View *k, const View *v, int64_t segment, int64_t kv, float **from) {
    int64_t first = plan->k_starts[segment], n = plan->k_starts[segment + 1] - first, asks = plan->q_starts[segment];
    int64_t width = padded(plan->d), stride = padded(n);
    Keys keys = {segment, first, n, stride, asks, plan->q_starts[segment + 1] - asks};
    keys.k = take(from, n * width), keys.v = take(from, n * width), keys.kt = take(from, width * stride);
    read_rows(k, first, n, kv, plan->half, plan->d, width, 1, keys.k);
    read_rows(v, first, n, kv, plan->half, plan->d, width, 1, keys.v);
    transpose(keys.k, n, width, stride, keys.kt);
    return keys;
}

/* Where query i of a segment stands in it. */
static inline int64_t place_of(const Plan *plan, const Keys *keys, int64_t i) {
    return plan->places ? plan->places[keys->asks + i] : i;
}

/* How many keys of its segment it may see, counted from the first. */
static inline int64_t seen(const Plan *plan, const Keys *keys, int64_t i) {
    return plan->causal ? place_of(plan, keys, i) + 1 : keys->n;
}

/* 1 - 2 / (exp(2x) + 1): to 1e-7, of 1 and not of itself. */
static inline vec tanh_of(vec x) {
    ivec large = x > 20.0f;
    vec e = exp_of(2 * (vec)(((ivec)x & ~large) | ((ivec)splat(20) & large)));
    return 1 - 2 / (e + 1);
}

/* Reads queries i .. i + m of a head, with the scale in them, and makes their scores (m, padded(reach)), minus infinity
 * where they may not look. Returns the reach: how many keys the last one sees. */
static int64_t score_rows(const Plan *plan, const Keys *keys, const View *q, int64_t head, int64_t i, int64_t m,
                          float *qr, float *s) {
    int64_t width = padded(plan->d), reach = seen(plan, keys, i + m - 1), cover = padded(reach);
    read_rows(q, keys->asks + i, m, head, plan->half, plan->d, width, plan->scale, qr);
    if (plan->bias)
        for (int64_t r = 0; r < m; r++) {
            int64_t nearest = plan->reach - 1 - place_of(plan, keys, i + r);
            memcpy(s + r * cover, plan->bias + head * (2 * plan->reach - 1) + nearest, reach * sizeof(float));
        }
    multiply(qr, width, 1, keys->kt, keys->stride, s, cover, m, cover, plan->d, plan->bias != NULL);
    if (plan->softcap)
        for (int64_t j = 0; j < m * cover; j += LANES)
            store(s + j, plan->softcap * tanh_of(load(s + j) / plan->softcap));
    for (int64_t r = 0; r < m; r++) {
        int64_t end = seen(plan, keys, i + r);
        for (int64_t j = end; j < cover; j++) s[r * cover + j] = -INFINITY;
        for (int64_t j = plan->window ? end - plan->window - 1 : -1; j >= 0; j--) s[r * cover + j] = -INFINITY;
    }
    return reach;
}

/* Scores (m, stride) -> probabilities, and the log-sum-exp of each row. */
static void softmax_rows(float *s, int64_t stride, int64_t m, float *lse, int64_t lse_step) {
    for (int64_t i = 0; i < m; i++) {
        float *row = s + i * stride;
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

static int64_t longest_of(const int64_t *starts, int64_t n_segments) {
    int64_t longest = 0;
    for (int64_t s = 0; s < n_segments; s++)
        if (starts[s + 1] - starts[s] > longest) longest = starts[s + 1] - starts[s];
    return longest;
}

/* out = softmax(scores) v inside every segment; `lse` is (queries, heads). Returns 0, or 1 if there was no memory. */
int segments_forward(const View *q, const View *k, const View *v, const View *out, float *lse, const Plan *plan) {
    int64_t heads = plan->heads, share = heads / plan->kv_heads, d = plan->d, width = padded(d), failed = 0;
    int64_t longest = longest_of(plan->k_starts, plan->n_segments);
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
            int64_t head = task % heads;
            float *free_ = memory;
            Keys keys = read_keys(plan, k, v, task / heads, head / share, &free_);
            float *qr = take(&free_, ROWS * width), *o = take(&free_, ROWS * width);
            float *p = take(&free_, ROWS * keys.stride);
            for (int64_t i = 0; i < keys.n_asks; i += ROWS) {
                int64_t m = keys.n_asks - i < ROWS ? keys.n_asks - i : ROWS, ask = keys.asks + i;
                int64_t reach = score_rows(plan, &keys, q, head, i, m, qr, p), cover = padded(reach);
                softmax_rows(p, cover, m, lse + ask * heads + head, heads);
                multiply(p, cover, 1, keys.v, width, o, width, m, width, reach, 0);
                write_rows(out, ask, m, head, plan->half, d, width, 1, o);
            }
        }
        free(memory);
    }
    return (int)failed;
}

/* Scores (m, cover) -> probabilities, and dp -> the gradient of scale q k + bias. */
static void softmax_rows_backward(const Plan *plan, int64_t m, int64_t cover, const float *lse, const float *dout,
                                  const float *out, float *p, float *dp) {
    int64_t width = padded(plan->d);
    float cap = plan->softcap;
    for (int64_t r = 0; r < m; r++) {
        float *row = p + r * cover, *drow = dp + r * cover;
        float shift = lse[r * plan->heads];
        vec dots = splat(0);
        for (int64_t j = 0; j < width; j += LANES) dots += load(dout + r * width + j) * load(out + r * width + j);
        float delta = 0;
        for (int lane = 0; lane < LANES; lane++) delta += dots[lane];
        for (int64_t j = 0; j < cover; j += LANES) {
            vec s = load(row + j), e = exp_of(s - shift), ds = e * (load(drow + j) - delta);
            if (cap) {
                ivec hidden = s < -cap; /* minus infinity */
                vec t = (vec)((ivec)(s / cap) & ~hidden);
                ds *= 1 - t * t;
            }
            store(row + j, e);
            store(drow + j, ds);
        }
    }
}

/* Gradients of the forward: dq, dk, dv from dout, with the scores made again from `lse`. */
int segments_backward(const View *q, const View *k, const View *v, const View *out, const View *dout, const View *dq,
                      const View *dk, const View *dv, const float *lse, const Plan *plan) {
    int64_t heads = plan->heads, share = heads / plan->kv_heads, d = plan->d, width = padded(d), failed = 0;
    int64_t longest = longest_of(plan->k_starts, plan->n_segments);
    int half = plan->half;
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
        for (int64_t task = 0; task < plan->n_segments * plan->kv_heads; task++) {
            if (!memory) continue;
            int64_t kv = task % plan->kv_heads;
            float *free_ = memory;
            Keys keys = read_keys(plan, k, v, task / plan->kv_heads, kv, &free_);
            int64_t n = keys.n, stride = keys.stride;
            float *vt = take(&free_, width * stride), *dkr = take(&free_, n * width), *dvr = take(&free_, n * width);
            float *qr = take(&free_, ROWS * width), *dor = take(&free_, ROWS * width), *or_ = take(&free_, ROWS * width);
            float *dqr = take(&free_, ROWS * width);
            float *p = take(&free_, ROWS * stride), *dp = take(&free_, ROWS * stride);
            transpose(keys.v, n, width, stride, vt);
            memset(dkr, 0, n * width * sizeof(float));
            memset(dvr, 0, n * width * sizeof(float));
            for (int64_t head = kv * share; head < (kv + 1) * share; head++)
                for (int64_t i = 0; i < keys.n_asks; i += ROWS) {
                    int64_t m = keys.n_asks - i < ROWS ? keys.n_asks - i : ROWS, ask = keys.asks + i;
                    int64_t reach = score_rows(plan, &keys, q, head, i, m, qr, p), cover = padded(reach);
                    read_rows(dout, ask, m, head, half, d, width, 1, dor);
                    read_rows(out, ask, m, head, half, d, width, 1, or_);
                    multiply(dor, width, 1, vt, stride, dp, cover, m, cover, d, 0);
                    softmax_rows_backward(plan, m, cover, lse + ask * heads + head, dor, or_, p, dp);
                    multiply(dp, cover, 1, keys.k, width, dqr, width, m, width, reach, 0);
                    write_rows(dq, ask, m, head, half, d, width, plan->scale, dqr);
                    multiply(dp, 1, cover, qr, width, dkr, width, reach, width, m, 1); /* q has the scale in it */
                    multiply(p, 1, cover, dor, width, dvr, width, reach, width, m, 1);
                }
            write_rows(dk, keys.first, n, kv, half, d, width, 1, dkr);
            write_rows(dv, keys.first, n, kv, half, d, width, 1, dvr);
        }
        free(memory);
    }
    return (int)failed;
}
