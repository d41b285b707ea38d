/* The low-rank side of layers that read one input, in bfloat16: products whose one side is the rank. Libraries bring the
 * wide side into an order of their own first, which for a rank of 8 costs more than the product, and go over each matrix
 * once for every product. Here a block of rows stays in the cache while all is done with it:
 *
 *     forward   s = x a^T,  y += s b,  y = gain y + bias               for every layer of the group
 *     backward  ds = dy b^T,  db += s^T dy,  da += ds^T x,  dx += ds a
 *
 * a (r, i) and b (r, o), each layer's r a multiple of 8, i and o of 32; b has the scale in it. Sums are in float32. Threads
 * take rows, and add up in their order, so that the result depends on their number only.
 *
 * Only where the processor multiplies pairs of bfloat16 (AVX-512 BF16): `thin_known` tells. */
#include "strips.h"

typedef struct {
    const uint16_t *b; /* (r, o) */
    uint16_t *y;       /* (n, o): the output, in the backward its gradient */
    float *da, *db;    /* (rank, i), (o, rank): gradients to add to, or null */
    const float *gain, *bias; /* (o): forward only, or null */
    int64_t y_row, o, r, rank;
    float scale; /* of the gradient of b */
} Part;

#ifdef __AVX512BF16__
#define BLOCK (1 << 16) /* numbers of a block of rows */

int thin_known(void) { return 1; }

/* Rows of a block: as many as stay in the cache beside each other, and no thread gets more blocks than another. */
static int64_t block_of(int64_t n, int64_t wide, int64_t threads) {
    int64_t most = BLOCK / wide < 8 ? 8 : BLOCK / wide;
    int64_t blocks = (n + threads * most - 1) / (threads * most) * threads;
    return ((n + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
}

static int64_t widest(const Part *parts, int64_t n_parts, int64_t wide) {
    for (int64_t p = 0; p < n_parts; p++) wide = parts[p].o > wide ? parts[p].o : wide;
    return wide;
}

/* x (n, i), a (sum of r, i) -> s (n, sum of r); every y = gain (y + s b) + bias. */
int thin_forward(const Part *parts, int64_t n_parts, const uint16_t *x, int64_t x_row, const uint16_t *a, uint16_t *s,
                 int64_t n, int64_t i) {
    int64_t r = 0, size = 0, threads = threads_for(n, FEW), block = block_of(n, widest(parts, n_parts, i), threads);
    int64_t wide = 0;
    for (int64_t p = 0; p < n_parts; p++) r += parts[p].r, size += parts[p].r * parts[p].o, wide += parts[p].o;
    uint16_t *b = room(size * 2), *next = b;
    float *gains = room(wide * 8), *gain = gains, *biases = gains + wide;
    if (!b || !gains) return free(b), free(gains), 1;
    for (int64_t p = 0; p < n_parts; next += parts[p].r * parts[p].o, gain += parts[p].o, p++) {
        pair_up(parts[p].b, parts[p].r, parts[p].o, next);
        if (parts[p].gain) spread(parts[p].gain, parts[p].o, gain);
        if (parts[p].bias) spread(parts[p].bias, parts[p].o, gain + wide);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < n; t += block) {
        int64_t m = n - t < block ? n - t : block;
        uint16_t *thin = s + t * r;
        const uint16_t *right = b;
        int64_t column = 0;
        project(x + t * x_row, x_row, a, i, r, thin, r, m);
        for (int64_t p = 0; p < n_parts; p++) {
            const Part *part = parts + p;
            expand(part->y + t * part->y_row, part->y_row, part->o, right, thin, r, part->r, m,
                   part->gain ? gains + column : NULL, part->bias ? biases + column : NULL);
            column += part->o;
            thin += part->r;
            right += part->r * part->o;
        }
    }
    free(b), free(gains);
    return 0;
}

/* The length of every row of w + scale b a, for w (o, i) and a (r, i), of which the first `rank` rows are not zero:
 *     |w|^2 + 2 (scale w a^T + b half) . b,    half (rank, rank) = scale^2 a a^T / 2,    b (o, rank). */
int thin_lengths(const uint16_t *w, const uint16_t *a, const float *b, const float *half, const float *squares, float scale,
                 float *length, int64_t o, int64_t i, int64_t r, int64_t rank) {
    int64_t threads = threads_for(o, FEW), block = block_of(o, i, threads);
    uint16_t *small = room(threads * block * r * 2);
    if (!small) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < o; t += block) {
        int64_t m = o - t < block ? o - t : block;
        uint16_t *thin = small + me() * block * r;
        project(w + t * i, i, a, i, r, thin, r, m);
        for (int64_t row = 0; row < m; row++) {
            const float *own = b + (t + row) * rank;
            float sum = 0;
            for (int64_t k = 0; k < rank; k++) {
                float mixed = scale * widened(thin[row * r + k]);
                for (int64_t l = 0; l < rank; l++) mixed += own[l] * half[l * rank + k];
                sum += mixed * own[k];
            }
            float square = squares[t + row] + 2 * sum;
            length[t + row] = square < 0 ? 0 : sqrtf(square);
        }
    }
    free(small);
    return 0;
}

/* The gradients of every a and b, and of x, added to what is there; `dx` (n, i) may be null, and x where no gradient of a
 * is wanted. */
int thin_backward(const Part *parts, int64_t n_parts, const uint16_t *x, int64_t x_row, const uint16_t *a, const uint16_t *s,
                  uint16_t *dx, int64_t dx_row, int64_t n, int64_t i) {
    int64_t r = 0, size = 0, threads = threads_for(n, FEW), block = block_of(n, widest(parts, n_parts, i), threads);
    for (int64_t p = 0; p < n_parts; p++) r += parts[p].r, size += parts[p].r * parts[p].o;
    size += r * i;
    int64_t thin = (block * r + (block + 1) * AT_ONCE + 31) / 32 * 32;
    float *all = room(threads * size * 4);
    uint16_t *wide = room(r * i * 2), *small = room(threads * thin * 2);
    if (!all || !wide || !small) return free(all), free(wide), free(small), 1;
    memset(all, 0, (size_t)(threads * size * 4));
    if (dx) pair_up(a, r, i, wide);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < n; t += block) {
        int64_t m = n - t < block ? n - t : block, k = 0;
        float *sum = all + me() * size;
        uint16_t *ds = small + me() * thin, *work = ds + block * r;
        for (int64_t p = 0; p < n_parts; p++) {
            const Part *part = parts + p;
            const uint16_t *dy = part->y + t * part->y_row;
            project(dy, part->y_row, part->b, part->o, part->r, ds + k, r, m);
            if (part->db) outer(sum, s + t * r + k, r, dy, part->y_row, part->o, part->r, m, work);
            sum += part->r * part->o;
            k += part->r;
        }
        if (x) outer(sum, ds, r, x + t * x_row, x_row, i, r, m, work);
        if (dx) expand(dx + t * dx_row, dx_row, i, wide, ds, r, r, m, NULL, NULL);
    }
    for (int64_t thread = 0; thread < threads; thread++) {
        const float *sum = all + thread * size;
        for (int64_t p = 0; p < n_parts; sum += parts[p].r * parts[p].o, p++)
            if (parts[p].db) deliver(sum, parts[p].o, parts[p].rank, parts[p].db, 1, parts[p].rank, parts[p].scale, NULL);
        for (int64_t p = 0; p < n_parts; sum += parts[p].r * i, p++)
            if (parts[p].da) deliver(sum, i, parts[p].rank, parts[p].da, i, 1, 1.0f, NULL);
    }
    free(all), free(wide), free(small);
    return 0;
}
#else
int thin_known(void) { return 0; }
int thin_lengths(const uint16_t *w, const uint16_t *a, const float *b, const float *half, const float *squares, float scale,
                 float *length, int64_t o, int64_t i, int64_t r, int64_t rank) {
    return 1;
}
int thin_forward(const Part *parts, int64_t n_parts, const uint16_t *x, int64_t x_row, const uint16_t *a, uint16_t *s,
                 int64_t n, int64_t i) {
    return 1;
}
int thin_backward(const Part *parts, int64_t n_parts, const uint16_t *x, int64_t x_row, const uint16_t *a, const uint16_t *s,
                  uint16_t *dx, int64_t dx_row, int64_t n, int64_t i) {
    return 1;
}
#endif
