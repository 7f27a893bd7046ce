/* Products of odd sizes in memory of just their size: a sanitizer sees what is read beyond it. */

#include "products.c"

static float *numbers(count n) {
    float *at = malloc(n * sizeof(float));
    for (count i = 0; i < n; i++) at[i] = i % 7 - 3;
    return at;
}

static int differ(const float *y, const float *x, const float *w, count rows, count n, count k) {
    for (count i = 0; i < rows; i++)
        for (count j = 0; j < n; j++) {
            float sum = 0; /* of whole numbers: exact */
            for (count l = 0; l < k; l++) sum += x[i * k + l] * w[j * k + l];
            if (y[i * n + j] != sum) return 1;
        }
    return 0;
}

int main(void) {
    static const count few[][3] = {{5, 16, 16}, {17, 40, 48}, {64, 131, 32}};
    for (int t = 0; t < 3; t++) {
        const count rows = few[t][0], n = few[t][1], k = few[t][2];
        float *x = numbers(rows * k), *w = numbers(n * k), *y = numbers(rows * n);
        linear(2, rows, n, k, x, w, y);
        if (differ(y, x, w, rows, n, k)) return 2;
        free(x), free(w), free(y);
    }
#ifdef TILES
    static const count sizes[][5] = {
        {65, 16, 16, 17, 18}, {70, 48, 130, 17, 33}, {257, 600, 31, 96, 16}, {33, 1030, 515, 47, 49}};
    if (!tiles()) return 3;
    for (int t = 0; t < 4; t++) {
        const count rows = sizes[t][0], k = sizes[t][1], *n = sizes[t] + 2;
        float *x = numbers(rows * k), *of_x = numbers(rows * k), *w[3], *y[3], *g[3], *of_w[3];
        for (int i = 0; i < 3; i++) {
            w[i] = numbers(n[i] * k), of_w[i] = numbers(n[i] * k);
            y[i] = numbers(rows * n[i]), g[i] = numbers(rows * n[i]);
        }
        products(2, 3, rows, k, n, x, (const float *const *)w, y);
        products_backward(2, 3, rows, k, n, x, (const float *const *)w, (const float *const *)g,
                          of_x, of_w);
        for (int i = 0; i < 3; i++) {
            if (differ(y[i], x, w[i], rows, n[i], k)) return 4;
            free(w[i]), free(of_w[i]), free(y[i]), free(g[i]);
        }
        free(x), free(of_x);
    }
#endif
    return 0;
}
