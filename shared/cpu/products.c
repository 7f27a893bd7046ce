/* Matrix products on a CPU that take less time here than in PyTorch: of few rows, and of many on
   some processors. `native.py` compiles this; `kernels.py` calls it with contiguous float32
   tensors. Results do not depend on the number of threads. */

#include <omp.h>

#include "lanes.h"

#define SQUARE 32 /* rows and columns whose sums the processor holds at a time */
#define TILE 256 /* words of a tile: 16 of each of 16 rows */
#define ACROSS 32 /* numbers of a row that tiles hold: the i-th is paired with the 16 + i-th */
#define SOURCES 3 /* matrices of one side at most */

#include "vectors.h"

/* One number of each of `deep` x LANES rows of x, turned, for each of LANES / deep rows of w, of k
   numbers. Of w's next rows, a line is asked for while one is read: they come from far away. */
static inline __attribute__((always_inline)) void few(
    const int deep, count k, const float *x, const float *w, const float *next, float *y) {
    lanes sum[LANES] = {0};
    for (count l = 0; l < k; l++, x += deep * LANES) {
        #pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            sum[i] += w[i / deep * k + l] * get(x + i % deep * LANES);
        if (l % deep == 0) __builtin_prefetch(next + l / deep * LANES, 0, 2);
    }
    for (int i = 0; i < LANES; i++) put(y + i * LANES, sum[i]);
}

/* y (rows, n) = x (rows, k) w^T (n, k), of at most 4 x LANES rows; n is LANES or more, k a multiple
   of it. The last block may begin within the one before, and writes the same there. */
void linear(int threads, count rows, count n, count k, const float *x, const float *w, float *y) {
    const count deep = rows <= LANES ? 1 : rows <= 2 * LANES ? 2 : 4;
    const count across = deep * LANES, tall = LANES / deep;
    #pragma omp parallel num_threads(threads)
    {
        float *turned = aligned_alloc(64, (k + LANES) * across * sizeof(float));
        float *block = turned + k * across, part[LANES * LANES];
        for (count i = 0; i < across; i += LANES)
            for (count l = 0; l < k; l += LANES) {
                memset(part, 0, sizeof part);
                for (count r = i; r < least(i + LANES, rows); r++)
                    put(part + (r - i) * LANES, get(x + r * k + l));
                turn(part, LANES, turned + l * across + i, across);
            }
        #pragma omp for
        for (count j = 0; j < n; j += LANES) {
            const count at = least(j, n - LANES);
            for (count c = at; c < at + LANES; c += tall) {
                const float *from = w + c * k, *next = w + least(c + tall, n - tall) * k;
                float *to = block + (c - at) * across;
                if (deep == 1) few(1, k, turned, from, next, to);
                else if (deep == 2) few(2, k, turned, from, next, to);
                else few(4, k, turned, from, next, to);
            }
            for (count i = 0; i < rows; i += LANES) {
                turn(block + i, across, part, LANES);
                for (count r = i; r < least(i + LANES, rows); r++)
                    put(y + r * n + at, get(part + (r - i) * LANES));
            }
        }
        free(turned);
    }
}

/* One side of a product: matrices, each of so many rows. Numbers that are summed over lie side by
   side in a row (`along`) or in a column, `down` apart. */
typedef struct {
    count size[SOURCES], down[SOURCES];
    const float *at[SOURCES];
    int sources, along;
} Side;

/* Rows of all matrices of a side, each of which begins at a multiple of SQUARE; which matrix one of
   these rows lies in, and where there. */
static count spread(const Side *s) {
    count sum = 0;
    for (int i = 0; i < s->sources; i++) sum += up_to(s->size[i], SQUARE);
    return sum;
}
static int source(const Side *s, count *row) {
    int i = 0;
    for (; *row >= up_to(s->size[i], SQUARE); i++) *row -= up_to(s->size[i], SQUARE);
    return i;
}

/* Tiles of 16 rows and ACROSS numbers, 0 where there are fewer: one for each part of a number. */
static inline __attribute__((always_inline)) void tile(
    const int parts, const int along, const float *from, count down, count rows,
    count numbers, float *to) {
    lanes x[EXACT * LANES];
    if (rows >= LANES && numbers >= ACROSS)
        for (int i = 0; i < LANES; i++) {
            const float *a = from + i * down;
            pair_up(parts, get(a), get(a + (along ? LANES : LANES * down)), x + i);
        }
    else
        for (int i = 0; i < LANES; i++) {
            const float *a = from + i * down;
            const count first = along ? numbers : rows, second = along ? numbers - LANES : rows;
            const int there = i < (along ? rows : numbers) && first > 0;
            const int too = i + (along ? 0 : LANES) < (along ? rows : numbers) && second > 0;
            pair_up(parts, there ? load_part(a, first) : (lanes){0},
                too ? load_part(a + (along ? LANES : LANES * down), second) : (lanes){0}, x + i);
        }
    for (int i = 0; i < parts; i++) {
        if (along) turn_here(x + i * LANES);
        for (int j = 0; j < LANES; j++) put(to + i * TILE + j * LANES, x[i * LANES + j]);
    }
}

/* SQUARE rows from `row` on, and of each `numbers` from `first` on: two strips of tiles. */
static inline __attribute__((always_inline)) void strips(
    const int parts, const Side *s, count row, count first, count numbers,
    float *to) {
    const int i = source(s, &row);
    const count down = s->down[i];
    for (count r = row; r < row + SQUARE; r += LANES)
        for (count n = 0; n < numbers; n += ACROSS, to += parts * TILE) {
            const count rows = s->size[i] - r, left = numbers - n;
            const float *at = s->at[i];
            at += s->along ? r * down + first + n : (first + n) * down + r;
            if (s->along) tile(parts, 1, at, down, rows, left, to);
            else tile(parts, 0, at, down, rows, left, to);
        }
}

/* `square` where the product has fewer rows or columns. */
static inline __attribute__((always_inline)) void corner(
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add,
    count rows, count columns) {
    float sums[SQUARE * SQUARE] = {0};
    for (count i = 0; add && i < rows; i++)
        memcpy(sums + i * SQUARE, y + i * down, columns * sizeof(float));
    square(parts, a, c, steps, sums, SQUARE, add, up_to(rows, GRAIN));
    for (count i = 0; i < rows; i++)
        memcpy(y + i * down, sums + i * SQUARE, columns * sizeof(float));
}

/* Where the i-th of `shares` of so many rows begins: they differ by GRAIN rows at most. */
static count border(count rows, int i, int shares) {
    return least(up_to(rows * i / shares, GRAIN), rows);
}

/* y = a b^T, or added to y: sums over so many numbers. A y for each matrix of the side that has
   several; its rows are `down` apart. */
static inline __attribute__((always_inline)) void product(
    const int parts, int threads, const Side *a, const Side *b, count numbers, float *const *y,
    const count *down, int adding) {
    const count m = spread(a), n = spread(b), sweeps = up_to(numbers, DEEP(parts)) / DEEP(parts);
    const count deep = up_to((numbers + sweeps - 1) / sweeps, ACROSS);
    const count broad = least(n, BROAD(parts, deep));
    const count line = deep / ACROSS * parts * TILE * sizeof(float); /* of tiles */
    float *right = aligned_alloc(64, broad / LANES * line);
    #pragma omp parallel num_threads(threads)
    {
        const int share = omp_get_thread_num(), shares = omp_get_num_threads();
        const count last = border(m, share + 1, shares);
        float *left = aligned_alloc(64, SQUARE / LANES * line);
        for (count j0 = 0; j0 < n; j0 += broad)
            for (count first = 0; first < numbers; first += deep) {
                const count held = least(deep, numbers - first), columns = least(broad, n - j0);
                const count steps = up_to(held, ACROSS) / ACROSS, strip = 2 * steps * parts * TILE;
                const int add = adding || first;
                #pragma omp for
                for (count j = 0; j < columns; j += SQUARE)
                    strips(parts, b, j0 + j, first, held, right + j / SQUARE * strip);
                for (count i = border(m, share, shares), next; i < last; i = next) {
                    next = least(up_to(i + 1, SQUARE), last);
                    count row = i;
                    const int up = source(a, &row);
                    const count tall = least(next - i, a->size[up] - row);
                    if (tall <= 0) continue;
                    strips(parts, a, i, first, held, left);
                    for (count j = 0; j < columns; j += SQUARE) {
                        count column = j0 + j;
                        const int of = source(b, &column), to = up + of;
                        const count wide = least(SQUARE, b->size[of] - column);
                        float *at = y[to] + row * down[to] + column;
                        const float *other = right + j / SQUARE * strip;
                        if (tall % GRAIN == 0 && wide == SQUARE)
                            square(parts, left, other, steps, at, down[to], add, tall);
                        else corner(parts, left, other, steps, at, down[to], add, tall, wide);
                    }
                }
                #pragma omp barrier
            }
        free(left);
    }
    free(right);
}

/* y_i (rows, n_i) = x (rows, k) w_i^T of up to three matrices w_i (n_i, k); `rough`: of what they
   are as bfloat16. */
void products(int threads, count rough, count sources, count rows, count k, const count *n,
              const float *x, const float *const *w, float *const *y) {
    const Side a = {{rows}, {k}, {x}, 1, 1};
    Side b = {{0}, {k, k, k}, {0}, (int)sources, 1};
    for (int i = 0; i < sources; i++) b.size[i] = n[i], b.at[i] = w[i];
    if (rough) product(ROUGH, threads, &a, &b, k, y, n, 0);
    else product(EXACT, threads, &a, &b, k, y, n, 0);
}

/* Their gradients, of x and of the matrices that have one: others' are null. */
static inline __attribute__((always_inline)) void gradients(
    const int parts, int threads, count sources, count rows, count k, const count *n,
    const float *x, const float *const *w, const float *const *g, float *of_x, float *const *of_w) {
    const count down[SOURCES] = {k, k, k};
    for (int i = 0; of_x && i < sources; i++) {
        const Side a = {{rows}, {n[i]}, {g[i]}, 1, 1}, b = {{k}, {k}, {w[i]}, 1, 0};
        product(parts, threads, &a, &b, n[i], &of_x, down, i > 0);
    }
    Side a = {{0}, {0}, {0}, 0, 0};
    const Side b = {{k}, {k}, {x}, 1, 0};
    float *to[SOURCES];
    for (int i = 0; i < sources; i++)
        if (of_w[i]) {
            const int j = a.sources++;
            a.size[j] = a.down[j] = n[i], a.at[j] = g[i], to[j] = of_w[i];
        }
    if (a.sources) product(parts, threads, &a, &b, rows, to, down, 0);
}
void products_backward(int threads, count rough, count sources, count rows, count k, const count *n,
                       const float *x, const float *const *w, const float *const *g, float *of_x,
                       float *const *of_w) {
    if (rough) gradients(ROUGH, threads, sources, rows, k, n, x, w, g, of_x, of_w);
    else gradients(EXACT, threads, sources, rows, k, n, x, w, g, of_x, of_w);
}
