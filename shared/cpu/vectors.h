/* Products of float32 matrices by vectors, where they are twice as long as those of PyTorch's
   library (MKL): on AMD's processors from Zen 5 on. Also of what they are as bfloat16. */

#if defined(__AVX512BF16__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXACT 2 /* words that a pair of numbers takes: each as it is */
#define ROUGH 1 /* each as bfloat16 */
#define DEEP(parts) (640 / (parts)) /* numbers that are summed over before the sums go to memory */
#define BROAD(parts, deep) ((3 << 17) / (parts) / (deep) / SQUARE * SQUARE) /* columns whose tiles
   take three quarters of a core's cache, 1 MiB: two bytes a part of a number */
#define GRAIN 8 /* rows whose sums are in registers at a time */

/* Whether the processor is one of those. */
int products_are_faster(void) {
#if defined(__AVX512BF16__)
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
    const int amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    __cpuid(1, a, b, c, d);
    return amd && (a >> 8 & 15) + (a >> 20 & 255) >= 26; /* family */
#else
    return 0;
#endif
}

/* Pairs of numbers as words: each as it is, or both rounded to bfloat16 in one. */
static inline void pair_up(const int parts, lanes x, lanes y, lanes *to) {
    if (parts == EXACT) to[0] = x, to[LANES] = y;
    else to[0] = as_bfloat16(x, y);
}

/* Sums of a word's number, or of its two of bfloat16, times those beside it. */
static inline __attribute__((always_inline)) lanes more(
    const int parts, lanes sums, const float *word, lanes other) {
    if (parts == EXACT) return sums + *word * other;
#if defined(__AVX512BF16__)
    const __m512 pair = _mm512_set1_ps(*word);
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pair, (__m512bh)other);
#else
    const bits high = (bits){0} + 0xffff0000u, pair = (bits)splat(*word), pairs = (bits)other;
    sums += (lanes)(pair << 16) * (lanes)(pairs << 16);
    return sums + (lanes)(pair & high) * (lanes)(pairs & high);
#endif
}

/* SQUARE rows and columns of a product, or what is added to them. */
static inline __attribute__((always_inline)) void square(
    const int parts, const float *a, const float *c, count steps, float *y, count down, int add,
    count tall) {
    const count strip = steps * parts * TILE;
    const float *d = c + strip;
    for (count top = 0; top < tall; top += GRAIN, y += GRAIN * down) {
        const float *row = a + top / LANES * strip + top % LANES;
        lanes low[GRAIN] = {0}, high[GRAIN] = {0};
        for (count l = 0; l < strip; l += LANES) {
            const lanes first = get(c + l), second = get(d + l);
            #pragma GCC unroll 8
            for (int i = 0; i < GRAIN; i++) {
                low[i] = more(parts, low[i], row + l + i, first);
                high[i] = more(parts, high[i], row + l + i, second);
            }
        }
        for (int i = 0; i < GRAIN; i++) {
            float *to = y + i * down;
            if (add) low[i] += get(to), high[i] += get(to + LANES);
            put(to, low[i]), put(to + LANES, high[i]);
        }
    }
}
