/* What a transformer of Llama's kind does between its matrix products, on a CPU: each operation and
   its gradient in one pass over memory. `native.py` compiles this; `kernels.py` and `attention.py`
   say what each one is, and call it with contiguous float32 tensors.

   Results do not depend on the number of threads: what several rows add to is summed in one order. */

#include "lanes.h"
#include <math.h>

#define TALL 8 /* rows of a product that are held in registers */
#define BLOCK 16 /* positions whose attention is computed at a time */

static const ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* e^x, and e^-80 or e^80 beyond: 2^n times a polynomial of what is left, |r| <= ln(2) / 2. */
static inline lanes power(lanes x) {
    x = choose(x < -80, splat(-80), x); /* NaN stays NaN */
    x = choose(x > 80, splat(80), x);
    const lanes nearest = x * 1.44269504f + choose(x > 0, splat(.5f), splat(-.5f));
    const ints n = __builtin_convertvector(nearest, ints); /* cuts off what follows the point */
    const lanes m = __builtin_convertvector(n, lanes);
    const lanes r = x - m * 0.693359375f + m * 2.12194440e-4f; /* ln(2) in two parts */
    lanes sum = splat(1 / 5040.f);
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

void swiglu(int threads, count numbers, const float *restrict gate, const float *restrict up,
            float *restrict y) {
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < numbers; i += LANES) {
        const lanes a = load_part(gate + i, numbers - i);
        store_part(y + i, a / (1 + power(-a)) * load_part(up + i, numbers - i), numbers - i);
    }
}

void swiglu_backward(int threads, count numbers, const float *restrict gate,
                     const float *restrict up, const float *restrict g, float *restrict of_gate,
                     float *restrict of_up) {
    #pragma omp parallel for num_threads(threads)
    for (count i = 0; i < numbers; i += LANES) {
        const count left = numbers - i;
        const lanes a = load_part(gate + i, left), c = load_part(g + i, left);
        const lanes open = 1 / (1 + power(-a)), swish = a * open;
        store_part(of_up + i, c * swish, left);
        store_part(of_gate + i, c * load_part(up + i, left) * (open + swish * (1 - open)), left);
    }
}

/* Rows of tokens that attend causally to each other, as `shared.attention.Pass` has them. */
typedef struct {
    count tokens, rows, width, kv, group, size;
    const count *token, *starts, *lengths; /* (rows, width), (rows,), (rows,) */
    float scaling;
} Rows;

/* One row's keys and values of a head, and a block of its queries. Weights lie key by key, so that
   a vector holds one key's for LANES queries. What fills the blocks up is computed with, but no
   number that is kept depends on it. */
typedef struct {
    count wide, tall, across; /* a vector's numbers, a row's keys, a block's queries: rounded up */
    float *keys, *values, *of_keys, *of_values; /* tall x wide */
    float *queries, *outputs, *of_queries; /* across x wide */
    float *queries_turned, *outputs_turned; /* wide x across */
    float *weights, *of_weights; /* tall x across */
    float *tops, *shares; /* across: of the softmax, its largest logit and 1 / its sum */
    int32_t *positions; /* across: of a query, counted from the block's first */
    float *all;
} Desk;

static Desk desk(const Rows *of) {
    Desk d = {.wide = up_to(of->size, LANES), .tall = up_to(of->width, TALL),
              .across = up_to(BLOCK * of->group, LANES)};
    const count held = d.tall * d.wide, asked = d.across * d.wide, seen = d.tall * d.across;
    const count room = 4 * held + 5 * asked + 2 * seen + 3 * d.across;
    float *at = d.all = aligned_alloc(64, up_to(room * sizeof(float), 64));
    memset(at, 0, room * sizeof(float)); /* what lay there may be denormal: a hundred times slower */
    float **of_row[] = {&d.keys, &d.values, &d.of_keys, &d.of_values};
    for (int i = 0; i < 4; i++, at += held) *of_row[i] = at;
    float **of_block[] = {&d.queries, &d.outputs, &d.of_queries, &d.queries_turned,
                          &d.outputs_turned};
    for (int i = 0; i < 5; i++, at += asked) *of_block[i] = at;
    d.weights = at, d.of_weights = at + seen, at += 2 * seen;
    d.tops = at, d.shares = at + d.across, d.positions = (int32_t *)(at + 2 * d.across);
    for (count i = 0; i < d.across; i++) d.positions[i] = i / of->group;
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
    count i = 0;
    for (; i + LANES <= size; i += LANES) put(to + i, get(from + i));
    if (i < size) memcpy(to + i, from + i, (size - i) * sizeof(float));
}

/* Vectors of key head h of a row's tokens, (length, wide). */
static void gather(const Rows *of, const Desk *d, count b, count h, const float *x, float *row) {
    const count *token = of->token + b * of->width;
    for (count t = 0; t < of->lengths[b]; t++)
        copy(x + (token[t] * of->kv + h) * of->size, row + t * d->wide, of->size);
}

/* A position's queries of key head h: where the first is among those of all tokens. */
static inline count queries(const Rows *of, count b, count h, count position) {
    return (of->token[b * of->width + position] * of->kv + h) * of->group;
}
static void fetch(const Rows *of, const Desk *d, count b, count h, count first, count last,
                  const float *x, float *block, float *turned) {
    float *to = block;
    for (count t = first; t < last; t++) {
        const float *from = x + queries(of, b, h, t) * of->size;
        for (count e = 0; e < of->group; e++, from += of->size, to += d->wide)
            copy(from, to, of->size);
    }
    for (count i = 0; i < (last - first) * of->group; i += LANES)
        for (count j = 0; j < d->wide; j += LANES)
            turn(block + i * d->wide + j, d->wide, turned + j * d->across + i, d->across);
}
static void store(const Rows *of, const Desk *d, count b, count h, count first, count last,
                  const float *block, float *x) {
    for (count t = first; t < last; t++) {
        float *to = x + queries(of, b, h, t) * of->size;
        for (count e = 0; e < of->group; e++, to += of->size, block += d->wide)
            copy(block, to, of->size);
    }
}

/* Positions of LANES queries, from the i-th of a block on. */
static inline ints place(const Desk *d, count first, count i) {
    ints found;
    memcpy(&found, d->positions + i, sizeof found);
    return found + (int32_t)first;
}

/* Logits of LANES queries, `across` apart from key to key, become weights: 0 for keys that come
   after the query's position. Those before `first` come before all. */
static void softmax(float *s, count across, count first, count keys, ints position, float scaling,
                    float *top, float *share) {
    lanes most = splat(-INFINITY), sum = {0};
    for (count j = 0; j < keys; j++) {
        const lanes x = get(s + j * across);
        const ints held = (int32_t)j <= position;
        most = choose((x > most) & held, x, most);
    }
    for (count j = 0; j < keys; j++) {
        lanes x = power((get(s + j * across) - most) * scaling);
        if (j >= first) x = choose((int32_t)j <= position, x, (lanes){0});
        put(s + j * across, x);
        sum += x;
    }
    put(top, most * scaling);
    put(share, 1 / sum);
    for (count j = 0; j < keys; j++) put(s + j * across, get(s + j * across) / sum);
}

/* The same weights anew, and from their gradients those of the logits: 0 too where weights are. */
static void softmax_backward(float *s, float *of_s, count across, count first, count keys,
                             ints position, float scaling, lanes top, lanes share) {
    lanes along = {0};
    for (count j = 0; j < keys; j++) {
        lanes x = power(get(s + j * across) * scaling - top) * share, g = get(of_s + j * across);
        if (j >= first) {
            const ints held = (int32_t)j <= position;
            x = choose(held, x, (lanes){0}), g = choose(held, g, (lanes){0});
        }
        put(s + j * across, x);
        along += x * g;
    }
    for (count j = 0; j < keys; j++) {
        lanes g = get(s + j * across) * (get(of_s + j * across) - along) * scaling;
        if (j >= first) g = choose((int32_t)j <= position, g, (lanes){0});
        put(of_s + j * across, g);
    }
}

/* q, out (tokens, kv group, size); k, v (tokens, kv, size); `about` (tokens, kv group, 2): of the
   softmax, the largest logit and 1 / the sum. A token's queries are those of the row that computes
   it. */
void attend(int threads, const Rows *of, const float *q, const float *k, const float *v, float *out,
            float *about) {
    #pragma omp parallel num_threads(threads)
    {
        const Desk d = desk(of);
        #pragma omp for schedule(guided) collapse(2)
        for (count b = 0; b < of->rows; b++)
            for (count h = 0; h < of->kv; h++) {
                const count length = of->lengths[b];
                gather(of, &d, b, h, k, d.keys);
                gather(of, &d, b, h, v, d.values);
                for (count first = of->starts[b]; first < length; first += BLOCK) {
                    const count last = least(first + BLOCK, length);
                    const count asked = (last - first) * of->group, n = up_to(asked, LANES);
                    fetch(of, &d, b, h, first, last, q, d.queries, d.queries_turned);
                    product(up_to(last, TALL), n, of->size, d.keys, d.wide, 1, d.queries_turned,
                            d.across, d.weights, d.across, 0);
                    for (count i = 0; i < n; i += LANES)
                        softmax(d.weights + i, d.across, first, last, place(&d, first, i),
                                of->scaling, d.tops + i, d.shares + i);
                    product(up_to(asked, TALL), d.wide, last, d.weights, 1, d.across, d.values,
                            d.wide, d.outputs, d.wide, 0);
                    store(of, &d, b, h, first, last, d.outputs, out);
                    for (count t = first, i = 0; t < last; t++) {
                        float *to = about + 2 * queries(of, b, h, t);
                        for (count e = 0; e < of->group; e++, i++, to += 2)
                            to[0] = d.tops[i], to[1] = d.shares[i];
                    }
                }
            }
        free(d.all);
    }
}

/* `parts` (rows, width, 2, kv, size): what each row adds to keys and values that it does not
   compute itself. */
void attend_backward(int threads, const Rows *of, const float *q, const float *k, const float *v,
                     const float *about, const float *g, float *of_q, float *of_k, float *of_v,
                     float *parts) {
    const count size = of->size, kv = of->kv;
    #pragma omp parallel num_threads(threads)
    {
        const Desk d = desk(of);
        #pragma omp for schedule(guided) collapse(2)
        for (count b = 0; b < of->rows; b++)
            for (count h = 0; h < kv; h++) {
                const count length = of->lengths[b], *token = of->token + b * of->width;
                gather(of, &d, b, h, k, d.keys);
                gather(of, &d, b, h, v, d.values);
                memset(d.of_keys, 0, up_to(length, TALL) * d.wide * sizeof(float));
                memset(d.of_values, 0, up_to(length, TALL) * d.wide * sizeof(float));
                for (count first = of->starts[b]; first < length; first += BLOCK) {
                    const count last = least(first + BLOCK, length), tall = up_to(last, TALL);
                    const count asked = (last - first) * of->group, n = up_to(asked, LANES);
                    fetch(of, &d, b, h, first, last, q, d.queries, d.queries_turned);
                    fetch(of, &d, b, h, first, last, g, d.outputs, d.outputs_turned);
                    for (count t = first, i = 0; t < last; t++) {
                        const float *from = about + 2 * queries(of, b, h, t);
                        for (count e = 0; e < of->group; e++, i++, from += 2)
                            d.tops[i] = from[0], d.shares[i] = from[1];
                    }
                    product(tall, n, size, d.keys, d.wide, 1, d.queries_turned, d.across,
                            d.weights, d.across, 0);
                    product(tall, n, size, d.values, d.wide, 1, d.outputs_turned, d.across,
                            d.of_weights, d.across, 0);
                    for (count i = 0; i < n; i += LANES)
                        softmax_backward(d.weights + i, d.of_weights + i, d.across, first, tall,
                                         place(&d, first, i), of->scaling, get(d.tops + i),
                                         get(d.shares + i));
                    product(up_to(asked, TALL), d.wide, last, d.of_weights, 1, d.across, d.keys,
                            d.wide, d.of_queries, d.wide, 0);
                    product(tall, d.wide, asked, d.of_weights, d.across, 1, d.queries, d.wide,
                            d.of_keys, d.wide, 1);
                    product(tall, d.wide, asked, d.weights, d.across, 1, d.outputs, d.wide,
                            d.of_values, d.wide, 1);
                    store(of, &d, b, h, first, last, d.of_queries, of_q);
                }
                for (count t = 0; t < length; t++) {
                    const int own = t >= of->starts[b];
                    const count at = (token[t] * kv + h) * size;
                    float *to = parts + ((b * of->width + t) * 2 * kv + h) * size;
                    copy(d.of_keys + t * d.wide, own ? of_k + at : to, size);
                    copy(d.of_values + t * d.wide, own ? of_v + at : to + kv * size, size);
                }
            }
        free(d.all);
        #pragma omp for
        for (count h = 0; h < 2 * kv; h++) {
            float *sum = h < kv ? of_k + h * size : of_v + (h - kv) * size;
            for (count b = 0; b < of->rows; b++)
                for (count t = 0; t < of->starts[b]; t++) {
                    const count at = b * of->width + t;
                    float *to = sum + of->token[at] * kv * size;
                    const float *from = parts + (at * 2 * kv + h) * size;
                    for (count j = 0; j < size; j++) to[j] += from[j];
                }
        }
    }
}

/* Weights of the keys from `first` to `last` for one query, of its scaled logits. */
static void softmax_of_row(float *s, count first, count last, float scaling) {
    lanes most = splat(-INFINITY), sum = {0};
    const count begin = first / LANES * LANES;
    for (count j = begin; j < last; j += LANES) {
        const ints at = LANE + (int32_t)j, held = (at >= (int32_t)first) & (at < (int32_t)last);
        const lanes x = get(s + j);
        most = choose((x > most) & held, x, most);
    }
    float top = -INFINITY, total = 0;
    for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (count j = begin; j < last; j += LANES) {
        const ints at = LANE + (int32_t)j, held = (at >= (int32_t)first) & (at < (int32_t)last);
        const lanes x = choose(held, power((get(s + j) - top) * scaling), (lanes){0});
        put(s + j, x);
        sum += x;
    }
    for (int i = 0; i < LANES; i++) total += sum[i];
    for (count j = begin; j < last; j += LANES) put(s + j, get(s + j) / total);
}

/* Each of LANES vectors' sum. */
static inline lanes sums(lanes x[LANES]) {
    FOLD(x, 1)
    FOLD(x, 2)
    FOLD(x, 4)
    FOLD(x, 8)
    return x[0];
}

/* Of a sampling step: each row's token attends to its columns from `first` on, up to `seen`. q, out
   (rows, kv group, size); keys, values (rows, kv, columns, size); `size` and `columns` are multiples
   of LANES. */
void attend_step(int threads, count rows, count kv, count group, count size, count columns,
                 count seen, float scaling, const count *first, const float *q,
                 const float *keys, const float *values, float *out) {
    #pragma omp parallel num_threads(threads)
    {
        float *weights = aligned_alloc(64, columns * sizeof(float));
        #pragma omp for collapse(2)
        for (count b = 0; b < rows; b++)
            for (count h = 0; h < kv; h++) {
                const float *k = keys + (b * kv + h) * columns * size;
                const float *v = values + (b * kv + h) * columns * size;
                for (count e = 0; e < group; e++) {
                    const count at = ((b * kv + h) * group + e) * size;
                    for (count j = first[b] / LANES * LANES; j < seen; j += LANES) {
                        lanes x[LANES] = {0};
                        for (count d = 0; d < size; d += LANES) {
                            const lanes a = get(q + at + d);
                            for (int i = 0; i < LANES; i++)
                                x[i] += a * get(k + least(j + i, seen - 1) * size + d);
                        }
                        put(weights + j, sums(x));
                    }
                    softmax_of_row(weights, first[b], seen, scaling);
                    for (count d = 0; d < size; d += LANES) {
                        lanes sum = {0};
                        for (count j = first[b]; j < seen; j++)
                            sum += weights[j] * get(v + j * size + d);
                        put(out + at + d, sum);
                    }
                }
            }
        free(weights);
    }
}
