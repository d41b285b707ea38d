/* The low-rank side of a convolution, in bfloat16: a * x, whose kernel has as many places as the layer's, and b behind it.
 *
 *     forward   s = a * x,  y += s b
 *     backward  ds = dy b^T,  db += s^T dy,  da += (what ds and x give for each place of the kernel)
 *
 * Channels lie last, so a map is a matrix with a row for each place. Which row of x a place of the kernel reads for a place
 * of the output stands in a table, so nothing is unfolded. The backward puts dy and ds beside each other, as the
 * convolution takes them that makes the gradient of x. Threads and conditions as in thin.c. */
#include "strips.h"

typedef struct {
    const uint16_t *x;    /* (n, size, i) */
    const uint16_t *a;    /* (r, kernel, i) */
    const uint16_t *b;    /* (r, o) */
    uint16_t *y;          /* (n, places, o): the output, in the backward its gradient */
    uint16_t *s;          /* (n, places, r) */
    uint16_t *joined;     /* (n, places, o + r): dy and ds */
    float *da, *db;       /* (rank, i, kernel), (o, rank): gradients to add to, or null */
    const float *gain;    /* (o,): the gradient of b is multiplied by it, or null */
    const int32_t *table; /* (places, kernel): row of x, or -1 */
    int64_t n, size, places, kernel, i, o, r, rank;
    float scale; /* of the gradient of b */
} Maps;

#ifdef __AVX512BF16__
#define BLOCK (1 << 16) /* numbers of a block of rows */

/* Images first .. last - 1, and of each the places begin .. end - 1. */
typedef struct {
    int64_t first, last, begin, end;
} Tile;

/* How the work is divided: several small maps at once, or a part of a large one. */
typedef struct {
    int64_t images, length, tiles, parts;
} Division;

static Division division(const Maps *m, int64_t threads) {
    int64_t rows = BLOCK / (m->o > m->i ? m->o : m->i);
    rows = rows < 8 ? 8 : rows;
    int64_t images = rows / m->places < 1 ? 1 : rows / m->places, parts = (m->places + rows - 1) / rows;
    int64_t blocks = (m->n + threads * images - 1) / (threads * images) * threads;
    if (parts == 1) images = (m->n + blocks - 1) / blocks;
    return (Division){images, (m->places + parts - 1) / parts, (m->n + images - 1) / images * parts, parts};
}

static Tile tile_of(const Maps *m, Division d, int64_t k) {
    int64_t first = k / d.parts * d.images, begin = k % d.parts * d.length;
    int64_t last = first + d.images, end = begin + d.length;
    return (Tile){first, last < m->n ? last : m->n, begin < m->places ? begin : m->places, end < m->places ? end : m->places};
}

static inline const uint16_t *row(const uint16_t *x, int32_t at, int64_t i, const uint16_t *none) {
    return at < 0 ? none : x + at * i;
}

/* s = a * x of one image's places */
static void shrink(const Maps *m, const uint16_t *x, uint16_t *s, Tile tile, const uint16_t *none) {
    int64_t i = m->i, r = m->r, n_kernel = m->kernel;
    for (int64_t k = 0; k < r; k += AT_ONCE)
        for (int64_t t = tile.begin; t < tile.end; t += 2) {
            const int32_t *one = m->table + t * n_kernel, *other = t + 1 < tile.end ? one + n_kernel : one;
            __m512 sum[2 * AT_ONCE];
            for (int q = 0; q < 2 * AT_ONCE; q++) sum[q] = _mm512_setzero_ps();
            for (int64_t p = 0; p < n_kernel; p++) {
                const uint16_t *left = row(x, one[p], i, none), *right = row(x, other[p], i, none);
                if (left == none && right == none) continue;
                const uint16_t *a = m->a + (k * n_kernel + p) * i;
                for (int64_t j = 0; j < i; j += STRIP) {
                    __m512i first = _mm512_loadu_si512(left + j), second = _mm512_loadu_si512(right + j);
                    for (int q = 0; q < AT_ONCE; q++) {
                        __m512i factor = _mm512_loadu_si512(a + q * n_kernel * i + j);
                        sum[q] = pairs(sum[q], first, factor);
                        sum[AT_ONCE + q] = pairs(sum[AT_ONCE + q], second, factor);
                    }
                }
            }
            __m256i both = (__m256i)_mm512_cvtneps_pbh(sums(sum));
            _mm_storeu_si128((__m128i *)(s + t * r + k), _mm256_castsi256_si128(both));
            if (t + 1 < tile.end) _mm_storeu_si128((__m128i *)(s + (t + 1) * r + k), _mm256_extracti128_si256(both, 1));
        }
}

/* ds of all images of a tile, two places beside each other: [r / 8][image][place / 2][8][2]; the last may stand alone. */
static void beside(const Maps *m, Tile tile, uint16_t *work) {
    int64_t wide = m->o + m->r;
    for (int64_t k = 0; k < m->r; k += AT_ONCE)
        for (int64_t g = tile.first; g < tile.last; g++)
            for (int64_t t = tile.begin; t < tile.end; t += 2, work += 2 * AT_ONCE) {
                const uint16_t *ds = m->joined + (g * m->places + t) * wide + m->o + k;
                __m128i one = _mm_loadu_si128((const __m128i *)ds), other = _mm_setzero_si128();
                if (t + 1 < tile.end) other = _mm_loadu_si128((const __m128i *)(ds + wide));
                _mm_storeu_si128((__m128i *)work, _mm_unpacklo_epi16(one, other));
                _mm_storeu_si128((__m128i *)(work + AT_ONCE), _mm_unpackhi_epi16(one, other));
            }
}

/* sum [kernel][r / 8][i / 32][2][8][16] += ds^T x for every place of the kernel, as `outer` does */
static void gather(const Maps *m, float *sum, Tile tile, uint16_t *work, const uint16_t *none) {
    int64_t i = m->i, n_kernel = m->kernel, pairs_each = (tile.end - tile.begin + 1) / 2;
    beside(m, tile, work);
    for (int64_t p = 0; p < n_kernel; p++)
        for (int64_t k = 0; k < m->r; k += AT_ONCE) {
            const uint16_t *of_k = work + k * (tile.last - tile.first) * pairs_each * 2;
            for (int64_t j = 0; j < i; j += STRIP, sum += STRIP * AT_ONCE) {
                const uint16_t *next = of_k;
                __m512 low[AT_ONCE], high[AT_ONCE];
                for (int q = 0; q < AT_ONCE; q++) {
                    low[q] = _mm512_loadu_ps(sum + q * LANES);
                    high[q] = _mm512_loadu_ps(sum + (AT_ONCE + q) * LANES);
                }
                for (int64_t g = tile.first; g < tile.last; g++)
                    for (int64_t t = tile.begin; t < tile.end; t += 2, next += 2 * AT_ONCE) {
                        const uint16_t *x = m->x + g * m->size * i + j;
                        const int32_t *at = m->table + t * n_kernel + p;
                        int32_t second = t + 1 < tile.end ? at[n_kernel] : -1;
                        if (at[0] < 0 && second < 0) continue;
                        __m512i one = _mm512_loadu_si512(row(x, at[0], i, none));
                        __m512i other = _mm512_loadu_si512(row(x, second, i, none));
                        __m512i a = _mm512_unpacklo_epi16(one, other), b = _mm512_unpackhi_epi16(one, other);
                        for (int q = 0; q < AT_ONCE; q++) {
                            __m512i two = twice(next + 2 * q);
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

/* a * x -> s; y += s b */
int maps_forward(const Maps *m) {
    int64_t threads = threads_for(m->n * m->places, FEW), r = m->r, o = m->o;
    Division d = division(m, threads);
    uint16_t *b = room(r * o * 2), *none = room(m->i * 2);
    if (!b || !none) return free(b), free(none), 1;
    memset(none, 0, (size_t)m->i * 2);
    pair_up(m->b, r, o, b);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < d.tiles; k++) {
        Tile tile = tile_of(m, d, k);
        for (int64_t g = tile.first; g < tile.last; g++)
            shrink(m, m->x + g * m->size * m->i, m->s + g * m->places * r, tile, none);
        int64_t t = tile.first * m->places + tile.begin;
        int64_t rows = (tile.last - tile.first - 1) * m->places + tile.end - tile.begin; /* parts: of one image */
        expand(m->y + t * o, o, o, b, m->s + t * r, r, r, rows, NULL, NULL);
    }
    free(b), free(none);
    return 0;
}

/* The gradients of a and b, added to what is there; dy and ds in `joined`. */
int maps_backward(const Maps *m) {
    int64_t threads = threads_for(m->n * m->places, FEW), r = m->r, o = m->o, i = m->i, wide = o + r;
    Division d = division(m, threads);
    int64_t size = r * o + r * i * m->kernel, most = d.images * (d.length + 1);
    int64_t small = ((most + 1) * (r > AT_ONCE ? r : AT_ONCE) + 31) / 32 * 32;
    float *all = room(threads * size * 4);
    uint16_t *thin = room(threads * small * 2), *none = room(i * 2);
    if (!all || !thin || !none) return free(all), free(thin), free(none), 1;
    memset(all, 0, (size_t)(threads * size * 4));
    memset(none, 0, (size_t)i * 2);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < d.tiles; k++) {
        Tile tile = tile_of(m, d, k);
        int64_t t = tile.first * m->places + tile.begin;
        int64_t rows = (tile.last - tile.first - 1) * m->places + tile.end - tile.begin;
        const uint16_t *dy = m->y + t * o;
        uint16_t *joined = m->joined + t * wide, *work = thin + me() * small;
        float *sum = all + me() * size;
        for (int64_t u = 0; u < rows; u++) memcpy(joined + u * wide, dy + u * o, (size_t)o * 2);
        project(dy, o, m->b, o, r, joined + o, wide, rows);
        if (m->db) outer(sum, m->s + t * r, r, dy, o, o, r, rows, work);
        if (m->da) gather(m, sum + r * o, tile, work, none);
    }
    for (int64_t thread = 0; thread < threads; thread++) {
        const float *sum = all + thread * size;
        if (m->db) deliver(sum, o, m->rank, m->db, 1, m->rank, m->scale, m->gain);
        for (int64_t p = 0; m->da && p < m->kernel; p++)
            deliver(sum + r * o + p * r * i, i, m->rank, m->da + p, i * m->kernel, m->kernel, 1.0f, NULL);
    }
    free(all), free(thin), free(none);
    return 0;
}
#else
int maps_forward(const Maps *m) { return 1; }
int maps_backward(const Maps *m) { return 1; }
#endif
