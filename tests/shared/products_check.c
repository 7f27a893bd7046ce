/* Products of odd sizes beside their sums in double precision, in memory of just their size: a
   sanitizer sees what is read beyond it. The exit code says which is wrong. */

#include "products.c"

static int few_bits; /* numbers are those that bfloat16 has */

/* Between -1 and 1. */
static float *numbers(count n) {
    static uint32_t drawn = 1;
    float *at = malloc(n * sizeof(float));
    for (count i = 0; i < n; i++) {
        drawn = drawn * 1664525 + 1013904223;
        at[i] = few_bits ? (float)(drawn >> 24) / 128 - 1 : (float)(int32_t)drawn / 2147483648.0f;
    }
    return at;
}

/* Adds x (rows, k) w (k, n), whose numbers lie so far apart, to `sum` (rows, n). */
static void add(double *sum, count rows, count n, count k, const float *x, count x_row, count x_k,
                const float *w, count w_k, count w_column) {
    for (count i = 0; i < rows; i++)
        for (count j = 0; j < n; j++)
            for (count l = 0; l < k; l++)
                sum[i * n + j] += (double)x[i * x_row + l * x_k] * w[l * w_k + j * w_column];
}

/* Whether y is off by more than this share of it, in root mean squares; frees both. */
static int off(float *y, double *truth, count n, double limit) {
    double apart = 0, size = 0;
    for (count i = 0; i < n; i++) {
        apart += (y[i] - truth[i]) * (y[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    free(y), free(truth);
    return !(apart < limit * limit * size);
}

static int few_are_wrong(count rows, count n, count k) {
    float *x = numbers(rows * k), *w = numbers(n * k), *y = numbers(rows * n);
    double *truth = calloc(rows * n, sizeof(double));
    linear(2, rows, n, k, x, w, y);
    add(truth, rows, n, k, x, k, 1, w, 1, k);
    free(x), free(w);
    return off(y, truth, rows * n, 5e-7);
}

static int many_are_wrong(count rows, count k, const count *n) {
    float *x = numbers(rows * k), *of_x = numbers(rows * k), *w[3], *y[3], *g[3], *of_w[3];
    double *of_xs = calloc(rows * k, sizeof(double));
    const double limit = few_bits ? 5e-7 : 1e-5; /* of gradients */
    int wrong = 0;
    for (int i = 0; i < 3; i++) {
        w[i] = numbers(n[i] * k), of_w[i] = numbers(n[i] * k);
        y[i] = numbers(rows * n[i]), g[i] = numbers(rows * n[i]);
    }
    products(3, few_bits, 3, rows, k, n, x, (const float *const *)w, y);
    products_backward(3, few_bits, 3, rows, k, n, x, (const float *const *)w,
                      (const float *const *)g, of_x, of_w);
    for (int i = 0; i < 3; i++) {
        double *ys = calloc(rows * n[i], sizeof(double)), *of_ws = calloc(n[i] * k, sizeof(double));
        add(ys, rows, n[i], k, x, k, 1, w[i], 1, k);
        add(of_ws, n[i], k, rows, g[i], 1, n[i], x, k, 1);
        add(of_xs, rows, k, n[i], g[i], n[i], 1, w[i], k, 1);
        wrong |= off(y[i], ys, rows * n[i], 5e-7) | off(of_w[i], of_ws, n[i] * k, limit) << 1;
        free(w[i]), free(g[i]);
    }
    free(x);
    return wrong | off(of_x, of_xs, rows * k, limit) << 2;
}

int main(void) {
    static const count few[][3] = {{5, 16, 16}, {17, 40, 48}, {64, 131, 32}};
    static const count many[][5] = {{65, 16, 16, 17, 18},
                                    {70, 48, 130, 17, 33},
                                    {257, 600, 31, 96, 16},
                                    {33, 1030, 515, 47, 49}};
    for (int t = 0; t < 3; t++)
        if (few_are_wrong(few[t][0], few[t][1], few[t][2])) return 8;
    for (int t = 0; t < 8; t++) {
        few_bits = t >= 4;
        const int wrong = many_are_wrong(many[t % 4][0], many[t % 4][1], many[t % 4] + 2);
        if (wrong) return few_bits << 4 | wrong;
    }
    return 0;
}
