/* SGMV: y += (x A^T) B for spans of tokens, each with the factors of one adapter. Included by kernels.c for each dtype.
   The reference in torch is `sgmv` in ops/lora.py.

   x: (N, D_in), y: (N, D_out), A: (R, D_in), B: (R, D_out) including the scaling; all contiguous. h = x A^T and y are summed in
   float, and y is rounded once. With AVX-512 or AVX2 the result of a token is bit-equal whatever the other tokens are, except in
   spans of at least TILED tokens on processors with tiles, which round h to bfloat16. Without these vectors the compiler chooses the order of some additions. */

/* --- vectors: h of a few tokens and ranks, y of a few tokens and columns ------------------------------------------ */

static inline LANES NAME(some)(const T *from, long n)
{
    T whole[WIDTH] = {0};
    memcpy(whole, from, sizeof(T) * n);
    return TAKE(whole);
}

/* h (tokens, R): `high` tokens by `broad` ranks at a time. Prefetches `lines` rows of D_in from `soon` on. */
static inline __attribute__((always_inline)) void NAME(inner)(float *h, const T *x, const T *a, long d_in, long rank, const int high, const int broad, const T *soon, const long lines)
{
    vector total[ROWS][ALONE];
    for (int t = 0; t < high; t++)
        for (int r = 0; r < broad; r++) memset(&total[t][r], 0, sizeof(vector));
    long at = 0;
    for (; at + WIDTH <= d_in; at += WIDTH) {
        LANES from[ROWS];
        for (int t = 0; t < high; t++) {
            from[t] = TAKE(x + t * d_in + at);
            STAY(from[t]);
        }
        for (int r = 0; r < lines; r++) __builtin_prefetch(soon + r * d_in + at, 0, 2);
        for (int r = 0; r < broad; r++) {
            LANES factor = TAKE(a + r * d_in + at);
            if (high > 1) STAY(factor);
            for (int t = 0; t < high; t++) total[t][r] = DOT(total[t][r], from[t], factor);
        }
    }
    if (at < d_in) { /* the rest, filled with zeros, takes the same step */
        LANES from[ROWS];
        for (int t = 0; t < high; t++) from[t] = NAME(some)(x + t * d_in + at, d_in - at);
        for (int r = 0; r < broad; r++) {
            LANES factor = NAME(some)(a + r * d_in + at, d_in - at);
            for (int t = 0; t < high; t++) total[t][r] = DOT(total[t][r], from[t], factor);
        }
    }
    float sums[ROWS * ALONE];
#ifdef __AVX512F__
    vector every[16];
    for (int i = 0; i < 16; i++) {
        if (i < high * broad) every[i] = total[i / broad][i % broad];
        else memset(&every[i], 0, sizeof(vector));
    }
    if (high * broad > 4) store_floats(sums, added_16(every));
    else
#endif
    for (int i = 0; i < high * broad; i++) sums[i] = added(total[i / broad][i % broad]);
    for (int t = 0; t < high; t++)
        for (int r = 0; r < broad; r++) h[t * rank + r] = sums[t * broad + r];
}

/* 32 columns of y (high, D_out) += h (high, R) B */
static inline __attribute__((always_inline)) void NAME(block)(T *y, long ldy, const float *h, const T *b, long ldb, long rank, const int high)
{
    vector sum[ROWS][COLUMNS];
    for (int t = 0; t < high; t++)
        for (int w = 0; w < COLUMNS; w++) sum[t][w] = LOADS(y + t * ldy + ACROSS * w);
    for (long r = 0; r < rank; r++) {
        vector factor[COLUMNS];
        for (int w = 0; w < COLUMNS; w++) {
            factor[w] = LOADS(b + r * ldb + ACROSS * w);
            STAY(factor[w]);
        }
        for (int t = 0; t < high; t++) {
            vector by = spread(h[t * rank + r]);
            for (int w = 0; w < COLUMNS; w++) sum[t][w] = dot(sum[t][w], by, factor[w]);
        }
    }
    for (int t = 0; t < high; t++)
        for (int w = 0; w < COLUMNS; w++) STORES(y + t * ldy + ACROSS * w, sum[t][w]);
}

static inline __attribute__((always_inline)) void NAME(outer)(T *y, const float *h, const T *b, long d_out, long rank, const int high)
{
    long at = 0;
    for (; at + 32 <= d_out; at += 32) NAME(block)(y + at, d_out, h, b + at, d_out, rank, high);
    if (at == d_out) return;
    long left = d_out - at; /* one more block, of which only the columns that are there come back */
    T own[ROWS * 32], factors[32 * rank];
    memset(own, 0, sizeof(own));
    memset(factors, 0, sizeof(T) * 32 * rank);
    for (int t = 0; t < high; t++) memcpy(own + 32 * t, y + t * d_out + at, sizeof(T) * left);
    for (long r = 0; r < rank; r++) memcpy(factors + 32 * r, b + r * d_out + at, sizeof(T) * left);
    NAME(block)(own, 32, h, factors, 32, rank, high);
    for (int t = 0; t < high; t++) memcpy(y + t * d_out + at, own + 32 * t, sizeof(T) * left);
}

/* h (tokens, ldh) of a span: ROWS tokens at a time, the rest one by one */
static inline __attribute__((always_inline)) void NAME(hidden)(float *h, long ldh, const T *x, const T *a, long tokens, long d_in, long rank)
{
    for (long t = 0; t < tokens;) {
        const T *from = x + t * d_in;
        float *to = h + t * ldh;
        long r = 0;
#define OF(high, broad) \
    for (; r + broad <= rank; r += broad) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, high, broad, 0, 0)
        if (tokens - t >= ROWS) {
            OF(ROWS, RANKS);
            OF(ROWS, 1);
            t += ROWS;
        } else {
            OF(1, ALONE);
            OF(1, RANKS);
            OF(1, 1);
            t += 1;
        }
#undef OF
    }
}

static void NAME(few)(const T *x, T *y, const T *a, const T *b, long tokens, long d_in, long d_out, long rank)
{
    float h[ROWS * rank];
    ahead(b, sizeof(T) * rank * d_out);
    for (long t = 0; t < tokens;) {
        long some = tokens - t >= ROWS ? ROWS : 1;
        NAME(hidden)(h, rank, x + t * d_in, a, some, d_in, rank);
        if (some == ROWS) NAME(outer)(y + t * d_out, h, b, d_out, rank, ROWS);
        else NAME(outer)(y + t * d_out, h, b, d_out, rank, 1);
        t += some;
    }
}

/* --- the buffer of one adapter ------------------------------------------------------------------------------------- */

/* Writes A (R, D_in) and by B^T (R, D_out) of each layer to `run`, one after another. factors: (count, 2), addresses of A and of
   B (D_out, R), both float. sizes: (count, 2), D_in and D_out. */
void NAME(lay_out)(const uint64_t *factors, const int64_t *sizes, long count, long rank, float by, T *run)
{
    for (long i = 0; i < count; i++) {
        const float *a = (const float *)(uintptr_t)factors[2 * i], *b = (const float *)(uintptr_t)factors[2 * i + 1];
        long d_in = sizes[2 * i], d_out = sizes[2 * i + 1];
        for (long e = 0; e < rank * d_in; e++) run[e] = STORE(a[e]);
        run += rank * d_in;
        for (long o = 0; o < d_out; o++)
            for (long r = 0; r < rank; r++) run[r * d_out + o] = STORE(b[o * rank + r] * by);
        run += rank * d_out;
    }
}

/* --- all spans of a pass, in one layer ---------------------------------------------------------------------------- */

/* Each thread takes one contiguous range of equal work. A library divides the base's product in the same way, so most of y is
   still in the thread's own cache. */
void NAME(low_rank)(const struct spans *spans, long layer, const T *x, T *y, long d_in, long d_out, int threads)
{
    long work = 0;
    for (long i = 0; i < spans->count; i++)
        if (spans->factors[2 * (i * spans->layers + layer)]) work += (spans->ends[i] - spans->starts[i]) * spans->ranks[i];
    if (!work) return;
#pragma omp parallel num_threads(threads) if (work * (d_in + d_out) > 8 * SERIAL)
    {
        long first = work * omp_get_thread_num() / omp_get_num_threads(), last = work * (omp_get_thread_num() + 1) / omp_get_num_threads();
        for (long i = 0, before = 0; i < spans->count && before < last; i++) {
            const uint64_t *factors = spans->factors + 2 * (i * spans->layers + layer);
            const T *a = (const T *)(uintptr_t)factors[0], *b = (const T *)(uintptr_t)factors[1];
            if (!a) continue;
            long rank = spans->ranks[i], tokens = spans->ends[i] - spans->starts[i];
            long from = before_work(first - before, rank, tokens), end = before_work(last - before, rank, tokens), start = spans->starts[i] + from;
            before += tokens * rank;
            if (end <= from) continue;
            if (i + 1 < spans->count && tokens <= ROWS)
                ahead((const void *)(uintptr_t)factors[2 * spans->layers], sizeof(T) * spans->ranks[i + 1] * d_in);
#ifdef MANY
            if (tokens >= TILED && MANY(x, y, a, b, start, end - from, spans->tokens, d_in, d_out, rank)) continue;
#endif
            NAME(few)(x + start * d_in, y + start * d_out, a, b, end - from, d_in, d_out, rank);
        }
    }
}
