/* Vectors of LANES numbers, which the compiler cuts into those that the processor has (GNU C). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t count;

static inline lanes get(const float *at) { return *(const lanes *)at; }
static inline void put(float *at, lanes x) { *(lanes *)at = x; }
static inline lanes splat(float x) { return x - (lanes){0}; }
static inline lanes choose(ints which, lanes a, lanes b) {
    return (lanes)(((ints)a & which) | ((ints)b & ~which));
}
/* Of a and b, in turn: the first `step` lanes of each 2 x step (LOW) or the others (HIGH). */
#define LOW(i, step) ((i) & (step) ? LANES + (i) - (step) : (i))
#define HIGH(i, step) ((i) & (step) ? LANES + (i) : (i) + (step))
#define EACH(f, s)                                                                               \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s),    \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#ifdef __clang__
#define MIXED(a, b, f, s) __builtin_shufflevector(a, b, EACH(f, s))
#else
#define MIXED(a, b, f, s) __builtin_shuffle(a, b, (ints){EACH(f, s)})
#endif
#define SWAP(x, step)                                                                            \
    for (int i = 0; i < LANES; i++)                                                              \
        if (!(i & (step))) {                                                                     \
            const lanes a = x[i], b = x[i + (step)];                                             \
            x[i] = MIXED(a, b, LOW, step), x[i + (step)] = MIXED(a, b, HIGH, step);              \
        }

#define FOLD(x, step)                                                                            \
    for (int i = 0; i < LANES; i += 2 * (step))                                                  \
        x[i] = MIXED(x[i], x[i + (step)], LOW, step) + MIXED(x[i], x[i + (step)], HIGH, step);

/* LANES rows of LANES numbers become columns. */
static inline void turn_here(lanes x[LANES]) {
    SWAP(x, 1)
    SWAP(x, 2)
    SWAP(x, 4)
    SWAP(x, 8)
}
static inline void turn(const float *from, count step, float *to, count to_step) {
    lanes x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = get(from + i * step);
    turn_here(x);
    for (int i = 0; i < LANES; i++) put(to + i * to_step, x[i]);
}

static inline count up_to(count n, count step) { return (n + step - 1) / step * step; }
static inline count least(count a, count b) { return a < b ? a : b; }

/* Fewer numbers than lanes may be left: the others are 0, and are not written. */
static inline lanes load_part(const float *at, count left) {
    if (left >= LANES) return get(at);
    float part[LANES] = {0};
    memcpy(part, at, left * sizeof(float));
    return get(part);
}
static inline void store_part(float *at, lanes x, count left) {
    if (left >= LANES) put(at, x);
    else memcpy(at, &x, left * sizeof(float));
}

/* Pairs of numbers, each rounded to bfloat16: y's in the upper half of a word, x's in the lower. */
static inline lanes as_bfloat16(lanes x, lanes y) {
    const bits a = (bits)x + 0x8000, b = (bits)y + 0x8000;
    return (lanes)((a >> 16) | (b & ((bits){0} + 0xffff0000u)));
}
