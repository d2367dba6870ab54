/* Products and attention of a decode step, which has few tokens. Included by kernels.c for each dtype, after low_rank.inc.c. With
   AVX-512 or AVX2 the result of a token is bit-equal whatever the other tokens are. */

/* --- y = x W^T + b, and each token's adapter -----------------------------------------------------------------------------

   x: (N, D_in), W: (D_out, D_in), b: (D_out,) or none, y: (N, D_out); all contiguous. W is read once, in place; a library packs
   it at every call, which reads and writes it once more. Sums are float, in the order of `inner` or `across`. The (x A^T) B of a
   token's span is added in float, and the sum is rounded once. */

#ifdef BY_TOKENS
#define OUTPUTS 48 /* outputs of a block */
#else
#define OUTPUTS 32
#endif

/* `broad` outputs of each token. Prefetches the following rows of W, `lines` rows per ROWS tokens. */
static inline __attribute__((always_inline)) void NAME(by_rows)(float *to, const T *x, const T *rows, long tokens, long d_in, const int broad, const T *soon, const int lines)
{
    long t = 0;
    for (; t + ROWS <= tokens; t += ROWS, soon += lines * d_in)
        NAME(inner)(to + t * OUTPUTS, x + t * d_in, rows, d_in, OUTPUTS, ROWS, broad, soon, lines);
    for (; t < tokens; t++, soon += lines * d_in)
        NAME(inner)(to + t * OUTPUTS, x + t * d_in, rows, d_in, OUTPUTS, 1, broad, soon, lines);
}

#ifdef BY_TOKENS
/* The same with one token per lane of up to two vectors: an element of W is broadcast, so no sum runs across lanes, and the sum
   of a token follows the order of W's columns. x is transposed in groups of up to 2 * ACROSS tokens, one after another:
   (D_in, ACROSS or 2 * ACROSS), the last one filled with zeros. */
#define CHAIN 256                     /* columns of one sum; a longer sum rounds worse */
#define SOON ((long)(64 / sizeof(T))) /* columns between two prefetches */
#define LINE_OF(tokens) ((tokens) > ACROSS ? 2 * ACROSS : ACROSS)

static void NAME(turned)(float *to, const T *x, long tokens, long d_in, long from, long end)
{
    for (long t = 0; t < tokens; t += 2 * ACROSS, to += 2 * ACROSS * d_in) {
        long line = LINE_OF(tokens - t);
        for (long i = 0; i < line; i++)
            for (long k = from; k < end; k++) to[k * line + i] = t + i < tokens ? LOAD(x[(t + i) * d_in + k]) : 0.0f;
    }
}

static inline __attribute__((always_inline)) void NAME(across)(float *to, const float *line, long tokens, const T *rows, long d_in, const int broad, const int vectors, const T *soon)
{
    float lanes[8][2 * ACROSS] = {{0}};
    for (long first = 0; first < d_in; first += CHAIN) {
        long last = first + CHAIN < d_in ? first + CHAIN : d_in;
        vector sum[8][2];
        for (int r = 0; r < broad; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] = spread(0.0f);
        for (long from = first; from < last; from += SOON) {
            for (int r = 0; soon && r < broad; r++) __builtin_prefetch(soon + r * d_in + from, 0, 3);
            long end = from + SOON < last ? from + SOON : last;
#pragma GCC unroll 4
            for (long k = from; k < end; k++, line += vectors * ACROSS) {
                vector x[2];
                for (int v = 0; v < vectors; v++) x[v] = load_floats(line + v * ACROSS);
                for (int r = 0; r < broad; r++) {
                    vector by = spread(LOAD(rows[r * d_in + k]));
                    for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], by, x[v]);
                }
            }
        }
        for (int r = 0; r < broad; r++)
            for (int v = 0; v < vectors; v++) store_floats(lanes[r] + v * ACROSS, load_floats(lanes[r] + v * ACROSS) + sum[r][v]);
    }
    for (long t = 0; t < tokens; t++)
        for (int r = 0; r < broad; r++) to[t * OUTPUTS + r] = lanes[r][t];
}

static inline __attribute__((always_inline)) void NAME(by_tokens)(float *to, const float *turned, const T *rows, long tokens, long d_in, const int broad)
{
    for (long t = 0; t < tokens; t += 2 * ACROSS) {
        long left = tokens - t, own = left < 2 * ACROSS ? left : 2 * ACROSS;
        const T *soon = t ? 0 : rows + broad * d_in;
        if (own > ACROSS) NAME(across)(to + t * OUTPUTS, turned + t * d_in, own, rows, d_in, broad, 2, soon);
        else NAME(across)(to + t * OUTPUTS, turned + t * d_in, own, rows, d_in, broad, 1, soon);
    }
}
#endif

#ifdef BY_TILES
/* The same by tiles, in which a row of W meets 16 tokens in the time of one. x is packed for them, with zeros for the tokens that
   fill the last tile. A token's sum has one order, however many tokens there are. */
#define FILLED(tokens) ((tokens) > 16 ? ROUND(tokens) : 16)

/* (D_in / 2, FILLED) pairs, and room for sums (OUTPUTS, FILLED) at `sums`; 0 if D_in is no multiple of 32, or without memory */
static T *NAME(packed)(const T *x, long tokens, long d_in, float **sums)
{
    long n = FILLED(tokens);
    char *room = d_in % 32 ? 0 : scratch(sizeof(T) * 2 * n * d_in + sizeof(float) * OUTPUTS * n), *next = room;
    if (!room) return 0;
    T *to = CUT(T, n * d_in), *filled = CUT(T, n * d_in);
    *sums = CUT(float, OUTPUTS * n);
    memcpy(filled, x, sizeof(T) * tokens * d_in);
    memset(filled + tokens * d_in, 0, sizeof(T) * (n - tokens) * d_in);
    right_of_transposed_pairs(to, filled, n, d_in);
    return to;
}

/* OUTPUTS rows of W. Prefetches the rows that follow. */
static void NAME(by_tiles)(float *to, float *sums, const T *packed, const T *rows, long tokens, long d_in)
{
    long n = FILLED(tokens);
    const T *soon = rows + OUTPUTS * d_in;
    if (n == 16) product_rows(sums, rows, packed, n, d_in, 0, soon);
    else
        for (long t = 0; t < n; t += 32) product_rows(sums + t, rows, packed + 2 * t, n, d_in, 1, t ? 0 : soon);
    transposed_words(to, OUTPUTS, sums, n, OUTPUTS, n);
}
#endif

static inline int NAME(factors)(const struct spans *spans, long i, long layer, const T **a, const T **b)
{
    const uint64_t *both = spans->factors + 2 * (i * spans->layers + layer);
    *a = (const T *)(uintptr_t)both[0], *b = (const T *)(uintptr_t)both[1];
    return *a != 0;
}

/* Prefetches, for the end of a block, `own` columns of B from `first` on: of every `step`th span from `i` on */
static inline void NAME(ahead_of_spans)(const struct spans *spans, long i, long step, long layer, long first, long own, long d_out)
{
    const T *a, *b;
    for (; i < spans->count; i += step)
        if (NAME(factors)(spans, i, layer, &a, &b))
            for (long e = 0; e < spans->ranks[i]; e++) ahead(b + e * d_out + first, sizeof(T) * own);
}

/* sums (N, OUTPUTS) += h B of every span, for `own` columns of B from `first` on. h: (N, most) */
static void NAME(add_spans)(float (*sums)[OUTPUTS], const struct spans *spans, long layer, const float *h, long most, long first, long own, long d_out)
{
    for (long i = 0; i < spans->count; i++) {
        const T *a, *b;
        if (!NAME(factors)(spans, i, layer, &a, &b)) continue;
        for (long t = spans->starts[i]; t < spans->ends[i]; t++) {
            const float *by = h + t * most;
            long j = 0;
            for (; j + ACROSS <= own; j += ACROSS) { /* the sum stays in a register for all ranks */
                vector sum = load_floats(sums[t] + j);
                for (long r = 0; r < spans->ranks[i]; r++) sum = dot(sum, spread(by[r]), LOADS(b + r * d_out + first + j));
                store_floats(sums[t] + j, sum);
            }
            for (; j < own; j++)
                for (long r = 0; r < spans->ranks[i]; r++) sums[t][j] += by[r] * LOAD(b[r * d_out + first + j]);
        }
    }
}

/* Products of one x: W, b and the output of each. */
struct NAME(products) {
    long count;
    const struct matrix *of[3];
    T *y[3];
};

static inline long NAME(blocks_of)(const struct matrix *m)
{
    return (m->d_out + OUTPUTS - 1) / OUTPUTS;
}

/* All products in one parallel region, because every region ends with a wait. */
static void NAME(multiply)(const struct NAME(products) *now, const T *x, long tokens, const struct spans *spans, int threads)
{
    long d_in = now->of[0]->d_in, blocks = 0, outputs = 0;
    for (long p = 0; p < now->count; p++) blocks += NAME(blocks_of)(now->of[p]), outputs += now->of[p]->d_out;
    long share = blocks / (8 * threads) + 1; /* small shares, so that a delayed thread delays the others little */
    long most = 0;
    for (long i = 0; spans && i < spans->count; i++) most = spans->ranks[i] > most ? spans->ranks[i] : most;
    float *h = most ? (float *)scratch(sizeof(float) * now->count * tokens * most) : 0; /* (products, N, most) */
    int later = most && !h; /* no memory: add the adapters afterwards */
#ifdef BY_TOKENS
    float *turned = (float *)scratch(sizeof(float) * (tokens + 2 * ACROSS) * d_in);
#endif
#pragma omp parallel num_threads(threads) if (d_in * outputs > SERIAL)
    {
#ifdef BY_TOKENS
#pragma omp for schedule(static)
        for (long k = 0; k < d_in; k += 64)
            if (turned) NAME(turned)(turned, x, tokens, d_in, k, k + 64 < d_in ? k + 64 : d_in);
#endif
#ifdef BY_TILES
        float *tile_sums;
        T *packed = NAME(packed)(x, tokens, d_in, &tile_sums); /* by each thread: to wait for one of them takes as long */
        struct tile_config before;
        if (packed) begin_tiles(&before);
#endif
        if (h) {
#pragma omp for schedule(static)
            for (long first = 0; first < tokens; first += ROWS) { /* a few tokens at a time: one span may have all of them */
                for (long i = 0; i < spans->count; i++) {
                    long from = spans->starts[i] > first ? spans->starts[i] : first;
                    long end = spans->ends[i] < first + ROWS ? spans->ends[i] : first + ROWS;
                    for (long p = 0; from < end && p < now->count; p++) {
                        const T *a, *b;
                        if (!NAME(factors)(spans, i, now->of[p]->number, &a, &b)) continue;
                        NAME(hidden)(h + (p * tokens + from) * most, most, x + from * d_in, a, end - from, d_in, spans->ranks[i]);
                    }
                }
            }
        }
#pragma omp for schedule(dynamic, share)
        for (long block = 0; block < blocks; block++) {
            long place = block, p = 0;
            for (; place >= NAME(blocks_of)(now->of[p]); p++) place -= NAME(blocks_of)(now->of[p]);
            const struct matrix *m = now->of[p];
            const T *w = m->weight, *bias = m->bias;
            T *y = now->y[p];
            long d_out = m->d_out, first = place * OUTPUTS, own = d_out - first < OUTPUTS ? d_out - first : OUTPUTS;
            float sums[FEW][OUTPUTS];
            long r = 0;
#ifdef BY_TILES
            if (packed && own == OUTPUTS) {
                if (h) NAME(ahead_of_spans)(spans, 0, 1, m->number, first, own, d_out);
                NAME(by_tiles)(&sums[0][0], tile_sums, packed, w + first * d_in, tokens, d_in);
                r = own;
            }
#endif
            while (r < own) {
                const T *rows = w + (first + r) * d_in;
                float *to = &sums[0][r];
                if (h) NAME(ahead_of_spans)(spans, r / RANKS, OUTPUTS / RANKS, m->number, first, own, d_out); /* some at a time */
#ifdef BY_TOKENS
                if (turned) {
                    long broad = own - r < 6 ? 1 : tokens > ACROSS || own - r < 8 ? 6 : 8;
                    if (broad == 8) NAME(by_tokens)(to, turned, rows, tokens, d_in, 8);
                    else if (broad == 6) NAME(by_tokens)(to, turned, rows, tokens, d_in, 6);
                    else NAME(by_tokens)(to, turned, rows, tokens, d_in, 1);
                    r += broad;
                    continue;
                }
#endif
                if (own - r < RANKS) {
                    NAME(by_rows)(to, x, rows, tokens, d_in, 1, 0, 0);
                    r += 1;
                    continue;
                }
                const T *soon = rows + RANKS * d_in;
                if (tokens > 3 * ROWS) NAME(by_rows)(to, x, rows, tokens, d_in, RANKS, soon, 1);
                else if (tokens > ROWS) NAME(by_rows)(to, x, rows, tokens, d_in, RANKS, soon, 2);
                else NAME(by_rows)(to, x, rows, tokens, d_in, RANKS, soon, 4);
                r += RANKS;
            }
            if (bias)
                for (long t = 0; t < tokens; t++)
                    for (long j = 0; j < own; j++) sums[t][j] += LOAD(bias[first + j]);
            if (h) NAME(add_spans)(sums, spans, m->number, h + p * tokens * most, most, first, own, d_out);
            for (long t = 0; t < tokens; t++) {
                long j = 0;
                for (; j + ACROSS <= own; j += ACROSS) STORES(y + t * d_out + first + j, load_floats(sums[t] + j));
                for (; j < own; j++) y[t * d_out + first + j] = STORE(sums[t][j]);
            }
        }
#ifdef BY_TILES
        if (packed) end_tiles(&before);
        free(packed);
#endif
    }
    free(h);
#ifdef BY_TOKENS
    free(turned);
#endif
    for (long p = 0; later && p < now->count; p++) NAME(low_rank)(spans, now->of[p]->number, x, now->y[p], d_in, now->of[p]->d_out, threads);
}

void NAME(linear)(const T *x, const T *w, const T *bias, T *y, long tokens, long d_in, long d_out, const struct spans *spans, long layer,
                  int threads)
{
    const struct matrix m = {.weight = w, .bias = bias, .d_in = d_in, .d_out = d_out, .number = layer};
    const struct NAME(products) now = {1, {&m}, {y}};
    NAME(multiply)(&now, x, tokens, spans, threads);
}
#undef OUTPUTS

/* --- attention of one query per row over the KV cache --------------------------------------------------------------------

   y = softmax(scaling q K^T) V over the first `length` keys of a row. With a window, a key further back is seen only if it belongs
   to the prefix. Scores and sums are float. */

static inline __attribute__((always_inline)) vector NAME(lanes_of)(const T *q, const T *key, long dim)
{
    vector sum = spread(0.0f);
    long at = 0;
    for (; at + WIDTH <= dim; at += WIDTH) sum = DOT(sum, TAKE(q + at), TAKE(key + at));
    if (at < dim) sum = DOT(sum, NAME(some)(q + at, dim - at), NAME(some)(key + at, dim - at));
    return sum;
}

static void NAME(weighed)(T *y, const float *weights, const T *values, long length, long dim)
{
    long at = 0;
#define OF(vectors) \
    for (; at + vectors * ACROSS <= dim; at += vectors * ACROSS) { \
        vector sum[vectors]; \
        memset(sum, 0, sizeof(sum)); \
        for (long s = 0; s < length; s++) \
            for (int w = 0; w < vectors; w++) sum[w] = dot(sum[w], spread(weights[s]), LOADS(values + s * dim + at + ACROSS * w)); \
        for (int w = 0; w < vectors; w++) STORES(y + at + ACROSS * w, sum[w]); \
    }
    OF(4) OF(1)
#undef OF
    for (; at < dim; at++) {
        float sum = 0.0f;
        for (long s = 0; s < length; s++) sum += weights[s] * LOAD(values[s * dim + at]);
        y[at] = STORE(sum);
    }
}

void NAME(attend_step)(const struct cached *cached, const T *q, long q_token, long q_head, long heads, const T *keys, const T *values,
                       float scaling, long window, T *y, int threads)
{
    long group = heads / cached->kv_heads, places = cached->rows * cached->kv_heads, dim = cached->dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (cached->rows * heads * cached->most * dim > 8 * SERIAL)
    for (long place = 0; place < places; place++) {
        long row = place / cached->kv_heads, head = place % cached->kv_heads, length = cached->lengths[row];
        const T *k = keys + row * cached->row_stride + head * cached->head_stride, *v = values + row * cached->row_stride + head * cached->head_stride;
        float *weights = (float *)scratch(sizeof(float) * (length + 16));
        long hidden = window ? length - window : 0; /* keys from the end of the prefix to here are outside the window */
        for (long g = head * group; g < (head + 1) * group; g++) {
            const T *own = q + row * q_token + g * q_head;
            T *to = y + (row * heads + g) * dim;
            if (!weights) { /* no memory: NaN makes the engine end the request with NotFinite */
                for (long e = 0; e < dim; e++) to[e] = STORE(NAN);
                continue;
            }
            long s = 0;
#ifdef __AVX512F__
            for (; s + 16 <= length; s += 16) {
                vector every[16];
                for (int i = 0; i < 16; i++) every[i] = NAME(lanes_of)(own, k + (s + i) * dim, dim);
                store_floats(weights + s, added_16(every));
            }
#endif
            for (; s < length; s++) weights[s] = added(NAME(lanes_of)(own, k + s * dim, dim));
            for (s = 0; s < length; s++) weights[s] *= scaling;
            for (s = cached->prefixes[row]; s < hidden; s++) weights[s] = HIDDEN;
            float most = HIDDEN, sum = 0.0f;
            for (s = 0; s < length; s++) most = weights[s] > most ? weights[s] : most;
            for (s = 0; s < length; s++) {
                weights[s] = exponential(weights[s] - most);
                sum += weights[s];
            }
            for (s = 0; s < length; s++) weights[s] /= sum;
            NAME(weighed)(to, weights, v, length, dim);
        }
        free(weights);
    }
}

/* Writes the newest token of each row to the cache. keys, values: (rows, H_kv, D), the last axis contiguous. */
void NAME(keep_step)(const struct cached *cached, const T *keys, const T *values, long token, long head, T *kept_keys, T *kept_values)
{
    for (long row = 0; row < cached->rows; row++)
        for (long h = 0; h < cached->kv_heads; h++) {
            long from = row * token + h * head, to = row * cached->row_stride + h * cached->head_stride + (cached->lengths[row] - 1) * cached->dim;
            memcpy(kept_keys + to, keys + from, sizeof(T) * cached->dim);
            memcpy(kept_values + to, values + from, sizeof(T) * cached->dim);
        }
}
