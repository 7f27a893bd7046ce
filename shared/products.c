/* Matrix products on a CPU that take less time here than in PyTorch: of few rows, and where the
   processor has a matrix unit. `native.py` compiles this; `kernels.py` calls it with contiguous
   float32 tensors. Results do not depend on the number of threads. */

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
#endif

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

/* Whether the processor multiplies tiles (Intel's AMX), and Linux lets this process do so. */
int tiles(void) {
#ifdef TILES
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

#ifdef TILES
/* Products of float32 matrices by tiles of bfloat16. A number is the sum of three of bfloat16, of 8
   bits each, and nearly of two; the products of parts that matter, 6 of 9 or 3 of 4, are summed in
   float32. */
#define TILE 256 /* words of a tile: 16 rows of 16 pairs of bfloat16 */
#define PAIRED 32 /* numbers that a tile sums over: the i-th lies beside the 16 + i-th */
#define SQUARE 32 /* rows and columns whose sums the processor holds at a time */
#define DEEP 512 /* numbers that are summed over before the sums go to memory */
#define BROAD 512 /* columns whose tiles stay in the processor's cache */
#define WHOLLY 3 /* parts of a number that are all of it */
#define NEARLY 2 /* and that are 16 bits of it */
#define SOURCES 3 /* matrices of one side at most */
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));

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

/* Pairs of numbers as pairs of their parts, the largest first. */
static inline void cut(const int parts, lanes x, lanes y, lanes *to) {
    const bits high = (bits){0} + 0xffff0000u;
    for (int i = 0; i < parts; i++) {
        const bits a = (bits)x + 0x8000, b = (bits)y + 0x8000;
        to[i * LANES] = (lanes)((a >> 16) | (b & high));
        x -= (lanes)(a & high), y -= (lanes)(b & high);
    }
}

/* Tiles of 16 rows and PAIRED numbers, 0 where there are fewer. A tile of the left side has a row
   of the matrix in each row, one of the right side a row in each column. */
static inline __attribute__((always_inline)) void tile(
    const int parts, const int along, const int turned, const float *from, count down, count rows,
    count numbers, float *to) {
    lanes x[WHOLLY * LANES];
    if (rows >= LANES && numbers >= PAIRED)
        for (int i = 0; i < LANES; i++) {
            const float *a = from + i * down;
            cut(parts, get(a), get(a + (along ? LANES : LANES * down)), x + i);
        }
    else
        for (int i = 0; i < LANES; i++) {
            const float *a = from + i * down;
            const count first = along ? numbers : rows, second = along ? numbers - LANES : rows;
            const int there = i < (along ? rows : numbers) && first > 0;
            const int too = i + (along ? 0 : LANES) < (along ? rows : numbers) && second > 0;
            cut(parts, there ? some(a, first) : (lanes){0},
                too ? some(a + (along ? LANES : LANES * down), second) : (lanes){0}, x + i);
        }
    for (int i = 0; i < parts; i++) {
        if (turned) turn_here(x + i * LANES);
        for (int j = 0; j < LANES; j++) put(to + i * TILE + j * LANES, x[i * LANES + j]);
    }
}

/* SQUARE rows from `row` on, and of each `numbers` from `first` on: two strips of tiles. */
static inline __attribute__((always_inline)) void strips(
    const int parts, const int right, const Side *s, count row, count first, count numbers,
    float *to) {
    const int i = source(s, &row);
    const count down = s->down[i];
    for (count r = row; r < row + SQUARE; r += LANES)
        for (count n = 0; n < numbers; n += PAIRED, to += parts * TILE) {
            const count rows = s->size[i] - r, left = numbers - n;
            const float *at = s->at[i];
            at += s->along ? r * down + first + n : (first + n) * down + r;
            if (s->along) tile(parts, 1, right, at, down, rows, left, to);
            else tile(parts, 0, !right, at, down, rows, left, to);
        }
}

#define LEFT(part)                                                                               \
    _tile_loadd(4, a + (part) * TILE, 64);                                                       \
    _tile_loadd(5, b + (part) * TILE, 64);
#define RIGHT(part)                                                                              \
    _tile_loadd(6, c + (part) * TILE, 64);                                                       \
    _tile_loadd(7, d + (part) * TILE, 64);
#define MULTIPLY                                                                                 \
    _tile_dpbf16ps(0, 4, 6);                                                                     \
    _tile_dpbf16ps(1, 4, 7);                                                                     \
    _tile_dpbf16ps(2, 5, 6);                                                                     \
    _tile_dpbf16ps(3, 5, 7);
#define FOUR(do_with)                                                                            \
    do_with(0, y, 4 * down);                                                                     \
    do_with(1, y + LANES, 4 * down);                                                             \
    do_with(2, y + LANES * down, 4 * down);                                                      \
    do_with(3, y + LANES * down + LANES, 4 * down);

/* SQUARE rows and columns of a product, or what is added to them. Small products come first. */
static inline __attribute__((always_inline)) void square(
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add) {
    const count step = parts * TILE;
    const float *b = a + steps * step, *d = c + steps * step;
    if (add) {
        FOUR(_tile_loadd)
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (count s = 0; s < steps; s++, a += step, b += step, c += step, d += step) {
        if (parts == WHOLLY) {
            LEFT(2) RIGHT(0) MULTIPLY
            LEFT(1) MULTIPLY
            RIGHT(1) MULTIPLY
            LEFT(0) MULTIPLY
            RIGHT(2) MULTIPLY
            RIGHT(0) MULTIPLY
        } else {
            LEFT(1) RIGHT(0) MULTIPLY
            LEFT(0) MULTIPLY
            RIGHT(1) MULTIPLY
        }
    }
    FOUR(_tile_stored)
}

/* The same where the product has fewer of them. */
static inline __attribute__((always_inline)) void corner(
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add,
    count rows, count columns) {
    float sums[SQUARE * SQUARE] = {0};
    for (count i = 0; add && i < rows; i++)
        memcpy(sums + i * SQUARE, y + i * down, columns * sizeof(float));
    square(parts, a, c, steps, sums, SQUARE, add);
    for (count i = 0; i < rows; i++)
        memcpy(y + i * down, sums + i * SQUARE, columns * sizeof(float));
}

/* y = a b^T, or added to y: sums over so many numbers. A y for each matrix of the side that has
   several; its rows are `down` apart. */
static inline __attribute__((always_inline)) void product(
    const int parts, int threads, const Side *a, const Side *b, count numbers, float *const *y,
    const count *down, int adding) {
    static const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; }
        shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    const count m = spread(a), n = spread(b);
    const count deep = least(up_to(numbers, PAIRED), DEEP), broad = least(n, BROAD);
    float *right = aligned_alloc(64, deep / 2 * parts * broad * sizeof(float));
    #pragma omp parallel num_threads(threads)
    {
        float *left = aligned_alloc(64, deep / 2 * parts * SQUARE * sizeof(float));
        _tile_loadconfig(&shape);
        for (count j0 = 0; j0 < n; j0 += broad)
            for (count first = 0; first < numbers; first += deep) {
                const count held = least(deep, numbers - first), columns = least(broad, n - j0);
                const count steps = up_to(held, PAIRED) / PAIRED, strip = 2 * steps * parts * TILE;
                const int add = adding || first;
                #pragma omp for
                for (count j = 0; j < columns; j += SQUARE)
                    strips(parts, 1, b, j0 + j, first, held, right + j / SQUARE * strip);
                #pragma omp for
                for (count i = 0; i < m; i += SQUARE) {
                    strips(parts, 0, a, i, first, held, left);
                    count row = i;
                    const int up = source(a, &row);
                    const count tall = least(SQUARE, a->size[up] - row);
                    for (count j = 0; j < columns; j += SQUARE) {
                        count column = j0 + j;
                        const int of = source(b, &column), to = up + of;
                        const count wide = least(SQUARE, b->size[of] - column);
                        float *at = y[to] + row * down[to] + column;
                        const float *other = right + j / SQUARE * strip;
                        if (tall == SQUARE && wide == SQUARE)
                            square(parts, left, other, steps, at, down[to], add);
                        else corner(parts, left, other, steps, at, down[to], add, tall, wide);
                    }
                }
            }
        _tile_release();
        free(left);
    }
    free(right);
}

/* y_i (rows, n_i) = x (rows, k) w_i^T of up to three matrices w_i (n_i, k). */
void products(int threads, count sources, count rows, count k, const count *n, const float *x,
              const float *const *w, float *const *y) {
    const Side a = {{rows}, {k}, {x}, 1, 1};
    Side b = {{0}, {k, k, k}, {0}, (int)sources, 1};
    for (int i = 0; i < sources; i++) b.size[i] = n[i], b.at[i] = w[i];
    product(WHOLLY, threads, &a, &b, k, y, n, 0);
}

/* Their gradients, of x and of the matrices that have one: others' are null. */
void products_backward(int threads, count sources, count rows, count k, const count *n,
                       const float *x, const float *const *w, const float *const *g, float *of_x,
                       float *const *of_w) {
    const count down[SOURCES] = {k, k, k};
    for (int i = 0; of_x && i < sources; i++) {
        const Side a = {{rows}, {n[i]}, {g[i]}, 1, 1}, b = {{k}, {k}, {w[i]}, 1, 0};
        product(NEARLY, threads, &a, &b, n[i], &of_x, down, i > 0);
    }
    Side a = {{0}, {0}, {0}, 0, 0};
    const Side b = {{k}, {k}, {x}, 1, 0};
    float *to[SOURCES];
    for (int i = 0; i < sources; i++)
        if (of_w[i]) {
            const int j = a.sources++;
            a.size[j] = a.down[j] = n[i], a.at[j] = g[i], to[j] = of_w[i];
        }
    if (a.sources) product(NEARLY, threads, &a, &b, rows, to, down, 0);
}
#endif
