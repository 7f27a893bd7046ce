/* Products of float32 matrices by tiles of bfloat16, on a processor with a unit for them (Intel's
   AMX). A number is the sum of three of bfloat16, of 8 bits each, and nearly of two; the products
   of parts that matter, 6 of 9 or 3 of 4, are summed in float32. */

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BY 1
#define WHOLLY 3 /* parts of a number that are all of it */
#define NEARLY 2 /* and that are 16 bits of it */
#define ROUGHLY NEARLY /* nobody asks: PyTorch's products of bfloat16 are used */
#define DEEP(parts) 512 /* numbers that are summed over before the sums go to memory */
#define BROAD(parts, deep) 512 /* columns whose tiles stay in the processor's cache */
#define GRAIN SQUARE /* rows that are computed together */
#define TURNED(right, along) ((right) == (along)) /* the left side has a row in each row */

/* Whether Linux lets this process use them. */
static int worth_it(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

/* Before and after a thread's work. */
static inline void begin(void) {
    static const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; }
        shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}
static inline void end(void) { _tile_release(); }

static inline void cut(const int parts, lanes x, lanes y, lanes *to) {
    to_bfloat16(parts, x, y, to);
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
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add,
    count tall) {
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
