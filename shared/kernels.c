/* What a transformer of Llama's kind does between its matrix products, on a CPU: each operation and
   its gradient in one pass over memory. `native.py` compiles this; `kernels.py` and `attention.py`
   say what each one is, and call it with contiguous float32 tensors.

   Results do not depend on the number of threads: what several rows add to is summed in one order.
   Vectors are GNU C's, which the compiler cuts into those that the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define TALL 8 /* rows of a product that are held in registers */
#define BLOCK 32 /* positions whose attention is computed at a time */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t count;

static const whole LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline lanes get(const float *at) { return *(const lanes *)at; }
static inline void put(float *at, lanes x) { *(lanes *)at = x; }
static inline lanes all(float x) { return x - (lanes){0}; }
static inline lanes choose(whole which, lanes a, lanes b) {
    return (lanes)(((whole)a & which) | ((whole)b & ~which));
}
static inline float total(lanes x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
static inline count up_to(count n, count step) { return (n + step - 1) / step * step; }
static inline count least(count a, count b) { return a < b ? a : b; }

/* e^x, and e^-80 or e^80 beyond: 2^n times a polynomial of what is left, |r| <= ln(2) / 2. */
static inline lanes power(lanes x) {
    x = choose(x < -80, all(-80), x); /* NaN stays NaN */
    x = choose(x > 80, all(80), x);
    const lanes nearest = x * 1.44269504f + choose(x > 0, all(.5f), all(-.5f));
    const whole n = __builtin_convertvector(nearest, whole); /* cuts off what follows the point */
    const lanes m = __builtin_convertvector(n, lanes);
    const lanes r = x - m * 0.693359375f + m * 2.12194440e-4f; /* ln(2) in two parts */
    lanes sum = all(1 / 5040.f);
    sum = sum * r + 1 / 720.f;
    sum = sum * r + 1 / 120.f;
    sum = sum * r + 1 / 24.f;
    sum = sum * r + 1 / 6.f;
    sum = sum * r + .5f;
    sum = sum * r * r + r + 1;
    return sum * (lanes)((n + 127) << 23);
}

void rms_norm(int threads, count rows, count size, float epsilon, const float *restrict x,
              const float *restrict weight, float *restrict y, float *restrict scale) {
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < rows; i++) {
        const float *a = x + i * size;
        float *b = y + i * size, squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (count j = 0; j < size; j++) squares += a[j] * a[j];
        const float s = scale[i] = 1 / sqrtf(squares / size + epsilon);
        #pragma omp simd
        for (count j = 0; j < size; j++) b[j] = a[j] * s * weight[j];
    }
}

/* `of_weight`: (runs, size), each of a run of rows, to be summed. */
void rms_norm_backward(int threads, count runs, count rows, count size, const float *restrict x,
                       const float *restrict weight, const float *restrict scale,
                       const float *restrict g, float *restrict of_x, float *restrict of_weight) {
    #pragma omp parallel for num_threads(threads)
    for (count run = 0; run < runs; run++) {
        float *sum = of_weight + run * size;
        memset(sum, 0, size * sizeof(float));
        for (count i = rows * run / runs; i < rows * (run + 1) / runs; i++) {
            const float *a = x + i * size, *b = g + i * size, s = scale[i];
            float *c = of_x + i * size, product = 0;
            #pragma omp simd reduction(+ : product)
            for (count j = 0; j < size; j++) product += a[j] * b[j] * weight[j];
            const float along = product * s * s * s / size;
            #pragma omp simd
            for (count j = 0; j < size; j++) {
                c[j] = b[j] * weight[j] * s - a[j] * along;
                sum[j] += a[j] * b[j] * s;
            }
        }
    }
}

void rotate(int threads, count tokens, count heads, count size, float sign,
            const float *restrict x, const float *restrict cosine, const float *restrict sine,
            float *restrict y) {
    const count half = size / 2;
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < tokens; i++)
        for (count h = 0; h < heads; h++) {
            const float *a = x + (i * heads + h) * size;
            const float *c = cosine + i * size, *s = sine + i * size;
            float *b = y + (i * heads + h) * size;
            #pragma omp simd
            for (count j = 0; j < half; j++) {
                b[j] = a[j] * c[j] - sign * a[j + half] * s[j];
                b[j + half] = a[j + half] * c[j] + sign * a[j] * s[j];
            }
        }
}

/* Fewer numbers than lanes may be left: the others are 0, and are not written. */
static inline lanes some(const float *at, count left) {
    if (left >= LANES) return get(at);
    float part[LANES] = {0};
    memcpy(part, at, left * sizeof(float));
    return get(part);
}
static inline void put_some(float *at, lanes x, count left) {
    if (left >= LANES) put(at, x);
    else memcpy(at, &x, left * sizeof(float));
}

void swiglu(int threads, count numbers, const float *restrict gate, const float *restrict up,
            float *restrict y) {
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < numbers; i += LANES) {
        const lanes a = some(gate + i, numbers - i);
        put_some(y + i, a / (1 + power(-a)) * some(up + i, numbers - i), numbers - i);
    }
}

void swiglu_backward(int threads, count numbers, const float *restrict gate,
                     const float *restrict up, const float *restrict g, float *restrict of_gate,
                     float *restrict of_up) {
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < numbers; i += LANES) {
        const count left = numbers - i;
        const lanes a = some(gate + i, left), c = some(g + i, left);
        const lanes open = 1 / (1 + power(-a)), swish = a * open;
        put_some(of_up + i, c * swish, left);
        put_some(of_gate + i, c * some(up + i, left) * (open + swish * (1 - open)), left);
    }
}

/* Rows of tokens that attend causally to each other, as `shared.attention.Pass` has them. */
typedef struct {
    count tokens, rows, width, kv, group, size;
    const count *token, *starts, *lengths; /* (rows, width), (rows,), (rows,) */
    float scaling;
} Rows;

/* One row's keys and values of a head, and a block of its queries: all padded with zeros. */
typedef struct {
    count wide, across, tall;
    float *keys, *keys_turned, *values, *values_turned, *of_keys, *of_values; /* wide x across */
    float *queries, *outputs, *of_queries; /* tall x wide */
    float *weights, *of_weights; /* tall x across */
    float *all;
} Desk;

static Desk desk(const Rows *of) {
    Desk d = {.wide = up_to(of->size, LANES), .across = up_to(of->width, LANES),
              .tall = up_to(BLOCK * of->group, TALL)};
    const count held = d.wide * d.across, asked = d.tall * d.wide, seen = d.tall * d.across;
    const count room = up_to((6 * held + 3 * asked + 2 * seen) * sizeof(float), 64);
    float *at = d.all = aligned_alloc(64, room);
    memset(at, 0, room);
    float **of_row[] = {&d.keys,          &d.keys_turned, &d.values,
                        &d.values_turned, &d.of_keys,     &d.of_values};
    for (int i = 0; i < 6; i++, at += held) *of_row[i] = at;
    float **of_block[] = {&d.queries, &d.outputs, &d.of_queries};
    for (int i = 0; i < 3; i++, at += asked) *of_block[i] = at;
    d.weights = at, d.of_weights = at + seen;
    return d;
}

/* c (m, n) = a (m, k) b (k, n), or added to it; m a multiple of TALL and n of LANES. `a` has its
   rows `down` apart and its columns `on`. */
static inline __attribute__((always_inline)) void product(
    count m, count n, count k, const float *a, count down, count on, const float *b, count b_down,
    float *c, count c_down, int add) {
    for (count i = 0; i < m; i += TALL)
        for (count j = 0; j < n; j += LANES) {
            lanes sum[TALL];
            for (int r = 0; r < TALL; r++)
                sum[r] = add ? get(c + (i + r) * c_down + j) : (lanes){0};
            for (count l = 0; l < k; l++)
                for (int r = 0; r < TALL; r++)
                    sum[r] += a[(i + r) * down + l * on] * get(b + l * b_down + j);
            for (int r = 0; r < TALL; r++) put(c + (i + r) * c_down + j, sum[r]);
        }
}

static inline void copy(const float *from, float *to, count size) {
    for (count i = 0; i < size; i += LANES) put_some(to + i, some(from + i, size - i), size - i);
}

/* Vectors of head h of a row's tokens: `plain` (length, wide), `turned` (wide, across). */
static void gather(const Rows *of, const Desk *d, count b, count h, const float *x, float *plain,
                   float *turned) {
    const count *token = of->token + b * of->width;
    for (count t = 0; t < of->lengths[b]; t++) {
        const float *from = x + (token[t] * of->kv + h) * of->size;
        if (plain) copy(from, plain + t * d->wide, of->size);
        if (turned)
            for (count i = 0; i < of->size; i++) turned[i * d->across + t] = from[i];
    }
}

/* A position's queries of key head h: where the first is among those of all tokens. */
static inline count queries(const Rows *of, count b, count h, count position) {
    return (of->token[b * of->width + position] * of->kv + h) * of->group;
}
static void fetch(const Rows *of, const Desk *d, count b, count h, count first, count last,
                  const float *x, float *block) {
    for (count t = first; t < last; t++) {
        const float *from = x + queries(of, b, h, t) * of->size;
        for (count e = 0; e < of->group; e++, from += of->size, block += d->wide)
            copy(from, block, of->size);
    }
}
static void store(const Rows *of, const Desk *d, count b, count h, count first, count last,
                  const float *block, float *x) {
    for (count t = first; t < last; t++) {
        float *to = x + queries(of, b, h, t) * of->size;
        for (count e = 0; e < of->group; e++, to += of->size, block += d->wide)
            copy(block, to, of->size);
    }
}

/* A query's logits become weights, 0 from `keys` on; the log of the sum of exponentials. */
static float softmax(float *s, count keys, count seen, float scaling) {
    lanes most = all(-INFINITY), sums = {0};
    for (count j = 0; j < seen; j += LANES) {
        const lanes x = choose(LANE + (int32_t)j < (int32_t)keys, get(s + j), all(-INFINITY));
        most = choose(x > most, x, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (count j = 0; j < seen; j += LANES) {
        const lanes x = power((get(s + j) - top) * scaling);
        const lanes w = choose(LANE + (int32_t)j < (int32_t)keys, x, (lanes){0});
        put(s + j, w);
        sums += w;
    }
    const float sum = total(sums);
    for (count j = 0; j < seen; j += LANES) put(s + j, get(s + j) / sum);
    return top * scaling + logf(sum);
}

/* q, out (tokens, kv group, size); k, v (tokens, kv, size); `sums` (tokens, kv group): logs of the
   softmax's. A token's queries are those of the row that computes it. */
void attend(int threads, const Rows *of, const float *q, const float *k, const float *v, float *out,
            float *sums) {
    #pragma omp parallel num_threads(threads)
    {
        const Desk d = desk(of);
        #pragma omp for schedule(dynamic) collapse(2)
        for (count b = 0; b < of->rows; b++)
            for (count h = 0; h < of->kv; h++) {
                const count length = of->lengths[b];
                gather(of, &d, b, h, k, NULL, d.keys_turned);
                gather(of, &d, b, h, v, d.values, NULL);
                for (count first = of->starts[b]; first < length; first += BLOCK) {
                    const count last = least(first + BLOCK, length), seen = up_to(last, LANES);
                    const count m = (last - first) * of->group, tall = up_to(m, TALL);
                    fetch(of, &d, b, h, first, last, q, d.queries);
                    product(tall, seen, of->size, d.queries, d.wide, 1, d.keys_turned, d.across,
                            d.weights, d.across, 0);
                    float *s = d.weights;
                    for (count t = first; t < last; t++)
                        for (count e = 0; e < of->group; e++, s += d.across)
                            sums[queries(of, b, h, t) + e] = softmax(s, t + 1, seen, of->scaling);
                    product(tall, d.wide, last, d.weights, d.across, 1, d.values, d.wide, d.outputs,
                            d.wide, 0);
                    store(of, &d, b, h, first, last, d.outputs, out);
                }
            }
        free(d.all);
    }
}

static inline float dot(const float *a, const float *b, count size) {
    lanes sum = {0};
    for (count i = 0; i < size; i += LANES) sum += some(a + i, size - i) * some(b + i, size - i);
    return total(sum);
}

/* The gradients of a query's logits, from those of its weights; both 0 from `keys` on. */
static void softmax_backward(float *s, float *of_s, count keys, count seen, float scaling,
                             float sum, float along) {
    for (count j = 0; j < seen; j += LANES) {
        const whole held = LANE + (int32_t)j < (int32_t)keys;
        const lanes w = choose(held, power(get(s + j) * scaling - sum), (lanes){0});
        put(s + j, w);
        put(of_s + j, choose(held, w * (get(of_s + j) - along) * scaling, (lanes){0}));
    }
}

/* `parts` (rows, width, 2, kv, size): what each row adds to its tokens' keys and values. */
void attend_backward(int threads, const Rows *of, const float *q, const float *k, const float *v,
                     const float *out, const float *sums, const float *g, float *of_q, float *of_k,
                     float *of_v, float *parts) {
    const count size = of->size, kv = of->kv;
    #pragma omp parallel num_threads(threads)
    {
        const Desk d = desk(of);
        #pragma omp for schedule(dynamic) collapse(2)
        for (count b = 0; b < of->rows; b++)
            for (count h = 0; h < kv; h++) {
                const count length = of->lengths[b], held = up_to(length, LANES) * d.wide;
                gather(of, &d, b, h, k, d.keys, d.keys_turned);
                gather(of, &d, b, h, v, NULL, d.values_turned);
                memset(d.of_keys, 0, held * sizeof(float));
                memset(d.of_values, 0, held * sizeof(float));
                for (count first = of->starts[b]; first < length; first += BLOCK) {
                    const count last = least(first + BLOCK, length), seen = up_to(last, LANES);
                    const count m = (last - first) * of->group, tall = up_to(m, TALL);
                    fetch(of, &d, b, h, first, last, q, d.queries);
                    fetch(of, &d, b, h, first, last, g, d.outputs);
                    product(tall, seen, size, d.queries, d.wide, 1, d.keys_turned, d.across,
                            d.weights, d.across, 0);
                    product(tall, seen, size, d.outputs, d.wide, 1, d.values_turned, d.across,
                            d.of_weights, d.across, 0);
                    count i = 0;
                    for (count t = first; t < last; t++)
                        for (count e = 0; e < of->group; e++, i++) {
                            const count n = queries(of, b, h, t) + e;
                            const float along = dot(d.outputs + i * d.wide, out + n * size, size);
                            softmax_backward(d.weights + i * d.across, d.of_weights + i * d.across,
                                             t + 1, seen, of->scaling, sums[n], along);
                        }
                    product(tall, d.wide, last, d.of_weights, d.across, 1, d.keys, d.wide,
                            d.of_queries, d.wide, 0);
                    product(seen, d.wide, m, d.of_weights, 1, d.across, d.queries, d.wide,
                            d.of_keys, d.wide, 1);
                    product(seen, d.wide, m, d.weights, 1, d.across, d.outputs, d.wide,
                            d.of_values, d.wide, 1);
                    store(of, &d, b, h, first, last, d.of_queries, of_q);
                }
                for (count t = 0; t < length; t++) {
                    float *to = parts + ((b * of->width + t) * 2 * kv + h) * size;
                    copy(d.of_keys + t * d.wide, to, size);
                    copy(d.of_values + t * d.wide, to + kv * size, size);
                }
            }
        free(d.all);
        #pragma omp for
        for (count h = 0; h < 2 * kv; h++) {
            float *sum = h < kv ? of_k + h * size : of_v + (h - kv) * size;
            for (count n = 0; n < of->tokens; n++)
                memset(sum + n * kv * size, 0, size * sizeof(float));
            for (count b = 0; b < of->rows; b++)
                for (count t = 0; t < of->lengths[b]; t++) {
                    const count place = b * of->width + t;
                    float *to = sum + of->token[place] * kv * size;
                    const float *from = parts + (place * 2 * kv + h) * size;
                    for (count j = 0; j < size; j++) to[j] += from[j];
                }
        }
    }
}
