/* Intel's matrix unit in C, so that products by tiles are tested on processors without one (Intel's
   manual, TDPBF16PS). */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AMX_BF16__
static _Thread_local uint32_t unit[8][16][16];
static _Thread_local int ready;

static float of_bfloat16(uint32_t high) {
    float x;
    memcpy(&x, &high, sizeof x);
    return x;
}
static void load(int tile, const char *at, int64_t apart) {
    for (int i = 0; i < 16; i++) memcpy(unit[tile][i], at + i * apart, 64);
}
static void store(int tile, char *at, int64_t apart) {
    for (int i = 0; i < 16; i++) memcpy(at + i * apart, unit[tile][i], 64);
}
static void multiply(int to, int left, int right) {
    for (int i = 0; ready && i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum, even = 0, odd = 0;
            for (int k = 0; k < 16; k++) {
                const uint32_t x = unit[left][i][k], y = unit[right][k][j];
                even += of_bfloat16(x << 16) * of_bfloat16(y << 16);
                odd += of_bfloat16(x & 0xffff0000) * of_bfloat16(y & 0xffff0000);
            }
            memcpy(&sum, &unit[to][i][j], sizeof sum);
            sum += even + odd;
            memcpy(&unit[to][i][j], &sum, sizeof sum);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) (ready = (shape)->palette)
#define _tile_release() (ready = 0)
#define _tile_zero(tile) memset(unit[tile], 0, sizeof unit[tile])
#define _tile_loadd(tile, at, apart) load(tile, (const char *)(at), apart)
#define _tile_stored(tile, at, apart) store(tile, (char *)(at), apart)
#define _tile_dpbf16ps(to, left, right) multiply(to, left, right)
