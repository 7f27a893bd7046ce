/* Products of float32 matrices by vectors, where they are twice as long as PyTorch's library (MKL)
   takes on this processor: AMD's from Zen 5 on. The same shapes as tiles of bfloat16 have. */

#if defined(__AVX512F__)
#include <cpuid.h>
#endif

#define TILE 256 /* numbers of a tile: 16 rows of ACROSS */
#define ACROSS 16 /* numbers of each row */
#define DEEP 256 /* numbers that are summed over before the sums go to memory */
#define WHOLLY 1 /* parts of a number: itself */
#define NEARLY 1
#define TALL 8 /* rows whose sums are in registers at a time */

/* Whether the processor is one of those. */
static int worth_it(void) {
#if defined(__AVX512F__)
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
    const int amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    __cpuid(1, a, b, c, d);
    return amd && (a >> 8 & 15) + (a >> 20 & 255) >= 26; /* family */
#else
    return 0;
#endif
}

static inline void begin(void) {}
static inline void end(void) {}

/* A tile of 16 rows and ACROSS numbers, 0 where there are fewer: a row of the matrix lies in each
   column. */
static inline __attribute__((always_inline)) void tile(
    const int parts, const int along, const int right, const float *from, count down, count rows,
    count numbers, float *to) {
    (void)parts, (void)right;
    lanes x[LANES];
    const count lines = along ? rows : numbers, left = along ? numbers : rows;
    for (int i = 0; i < LANES; i++)
        x[i] = i < lines && left > 0 ? some(from + i * down, left) : (lanes){0};
    if (along) turn_here(x);
    for (int i = 0; i < LANES; i++) put(to + i * LANES, x[i]);
}

/* SQUARE rows and columns of a product, or what is added to them. */
static inline __attribute__((always_inline)) void square(
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add) {
    const float *d = c + steps * TILE;
    (void)parts;
    for (int top = 0; top < SQUARE; top += TALL, y += TALL * down) {
        const float *row = a + top / LANES * steps * TILE + top % LANES;
        lanes low[TALL] = {0}, high[TALL] = {0};
        for (count l = 0; l < steps * TILE; l += LANES) {
            const lanes first = get(c + l), second = get(d + l);
            #pragma GCC unroll 8
            for (int i = 0; i < TALL; i++) {
                low[i] += row[l + i] * first;
                high[i] += row[l + i] * second;
            }
        }
        for (int i = 0; i < TALL; i++) {
            float *to = y + i * down;
            if (add) low[i] += get(to), high[i] += get(to + LANES);
            put(to, low[i]), put(to + LANES, high[i]);
        }
    }
}
