/* Softmax cross-entropy of scores of all rows x with all rows y, and what a low-rank backward needs, in one go:
 *
 *     s = x y^T + bias,  ds = softmax(s) - onehot(label),  dleft = ds right,  dright = ds^T left,  dbias = sum of ds
 *
 * The scores of a few rows stay in the cache while all is done with them: nothing of their size is written, each takes one
 * exponential, and softmax is divided by its sum in the narrow results. Threads take rows, and add up in their order, so
 * that the result depends on their number only. */
#include "lanes.h"
#include "threads.h"

#define BLOCK 16 /* rows of x whose scores are held */
#define FEW 64   /* rows that are not worth a second thread */
#ifdef __AVX512F__
#define ROWS 8 /* sums that stay in registers: ROWS x VECS x LANES */
#define VECS 3
#else
#define ROWS 4
#define VECS 1
#endif

/* The matrices of one call; columns are padded to whole lanes, with a bias of -inf and zeros. */
typedef struct {
    const float *x, *y, *bias; /* (b, d), (d, c), (c) */
    const int64_t *labels;     /* (b) */
    const float *left, *right; /* (b, n_left), (c, n_right) */
    float *loss;               /* (b) */
    float *dleft, *dright, *dbias; /* (b, n_right), (c, n_left), (c); without dbias there is no gradient */
    int64_t b, c, d, n_left, n_right;
} Pairs;

/* to (ROWS, vecs lanes) = a (ROWS, k) times b (k, vecs lanes), plus what is there; a has any strides. */
static inline __attribute__((always_inline)) void tile(const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t n,
                                                       int64_t k, float *to, int vecs, int onto) {
    vec sum[ROWS][VECS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vecs; v++) sum[i][v] = onto ? load(to + i * n + v * LANES) : splat(0);
    for (int64_t j = 0; j < k; j++) {
        vec right[VECS];
        for (int v = 0; v < vecs; v++) right[v] = load(b + j * n + v * LANES);
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < vecs; v++) sum[i][v] += a[i * a_row + j * a_col] * right[v];
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vecs; v++) store(to + i * n + v * LANES, sum[i][v]);
}

/* to (m, n) = a (m, k) b (k, n), plus what is there if `onto`; m a multiple of ROWS, n of LANES. */
static void multiply(const float *a, int64_t a_row, int64_t a_col, int64_t m, const float *b, int64_t n, int64_t k, float *to,
                     int onto) {
    int64_t j = 0;
    for (; j + VECS * LANES <= n; j += VECS * LANES)
        for (int64_t i = 0; i < m; i += ROWS) tile(a + i * a_row, a_row, a_col, b + j, n, k, to + i * n + j, VECS, onto);
    for (; j < n; j += LANES)
        for (int64_t i = 0; i < m; i += ROWS) tile(a + i * a_row, a_row, a_col, b + j, n, k, to + i * n + j, 1, onto);
}

/* A row of scores without bias -> exponentials, less the largest; returns one over their sum. */
static float exponentials(float *row, const float *bias, int64_t c, int64_t label, float *loss) {
    vec tops = splat(-INFINITY), sums = splat(0);
    for (int64_t j = 0; j < c; j += LANES) {
        vec s = load(row + j) + load(bias + j);
        ivec more = s > tops;
        store(row + j, s);
        tops = (vec)(((ivec)s & more) | ((ivec)tops & ~more));
    }
    float top = tops[0], sum = 0, own = row[label];
    for (int lane = 1; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
    for (int64_t j = 0; j < c; j += LANES) {
        vec e = exp_of(load(row + j) - top);
        store(row + j, e);
        sums += e;
    }
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    *loss = top - own + logf(sum);
    return 1 / sum;
}

/* m rows from `first` on; `sums` are this thread's dright (c, n_left) and dbias (c), `room` (BLOCK, c + d + both widths). */
static void block(const Pairs *p, int64_t first, int64_t m, float *sums, float *room) {
    int64_t c = p->c, d = p->d, whole = (m + ROWS - 1) / ROWS * ROWS;
    float *s = room, *x = s + BLOCK * c, *left = x + BLOCK * d, *dleft = left + BLOCK * p->n_left, inverse[BLOCK] = {0};
    const int64_t *labels = p->labels + first;
    memset(x, 0, (size_t)(BLOCK * d * 4));
    memcpy(x, p->x + first * d, (size_t)(m * d * 4));
    multiply(x, d, 1, whole, p->y, c, d, s, 0);
    for (int64_t i = 0; i < m; i++) inverse[i] = exponentials(s + i * c, p->bias, c, labels[i], p->loss + first + i);
    if (!p->dbias) return;
    multiply(s, c, 1, whole, p->right, p->n_right, c, dleft, 0);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < p->n_right; j++)
            p->dleft[(first + i) * p->n_right + j] =
                dleft[i * p->n_right + j] * inverse[i] - p->right[labels[i] * p->n_right + j];
    for (int64_t i = 0; i < m; i++) {
        const float *from = p->left + (first + i) * p->n_left;
        for (int64_t j = 0; j < p->n_left; j++) left[i * p->n_left + j] = from[j] * inverse[i];
        for (int64_t j = 0; j < p->n_left; j++) sums[labels[i] * p->n_left + j] -= from[j];
    }
    multiply(s, 1, c, c, left, p->n_left, m, sums, 1);
    float *dbias = sums + c * p->n_left;
    for (int64_t j = 0; j < c; j += LANES) {
        vec sum = load(dbias + j);
        for (int64_t i = 0; i < m; i++) sum += load(s + i * c + j) * inverse[i];
        store(dbias + j, sum);
    }
    for (int64_t i = 0; i < m; i++) dbias[labels[i]] -= 1;
}

/* 1 where there is no memory. */
int pairs_loss(const Pairs *p) {
    int64_t threads = threads_for(p->b, FEW), size = p->dbias ? p->c * (p->n_left + 1) : 0;
    int64_t room = BLOCK * (p->c + p->d + p->n_left + p->n_right), each = size + room;
    float *all = aligned_alloc(64, (size_t)((threads * each * 4 + 63) / 64 * 64));
    if (!all) return 1;
    for (int64_t t = 0; t < threads; t++) memset(all + t * each, 0, (size_t)(size * 4));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < p->b; i += BLOCK) {
        float *own = all + me() * each;
        block(p, i, p->b - i < BLOCK ? p->b - i : BLOCK, own, own + size);
    }
    for (int64_t j = 0; j < size; j++) {
        float sum = 0;
        for (int64_t t = 0; t < threads; t++) sum += all[t * each + j];
        *(j < p->c * p->n_left ? p->dright + j : p->dbias + j - p->c * p->n_left) = sum;
    }
    free(all);
    return 0;
}
