/* SGMV: y += (x A^T) B for spans of tokens, each with the factors of one adapter. Included by kernels.c for each dtype.
   The reference in torch is engine/sgmv.py.

   x: (N, D_in), y: (N, D_out), A: (R, D_in), B: (R, D_out) including the scaling; all contiguous. h = x A^T and y are summed in
   float, and y is rounded once. In between, processors with bfloat16 products round h to bfloat16. With AVX-512 or AVX2 the
   result of a token is bit-equal whatever the other tokens are, except in spans of at least TILED tokens on processors with
   tiles. Without these vectors the compiler chooses the order of some additions. */

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
#ifdef PAIRS
/* ... for processors that multiply pairs of bfloat16: a step takes two ranks, and a word of h2 has two of them. Unpacking interleaves
   rows of B within each eighth of a vector. So it does with y: the low half has columns 0-3 of every 8, the high half 4-7. */
#define H uint32_t
static inline __attribute__((always_inline)) void NAME(block)(T *y, long ldy, const H *h2, const T *b, long ldb, long rank, const int high)
{
    const __m512i none = _mm512_setzero_si512(), order = _mm512_loadu_si512(unwoven);
    long pairs = (rank + 1) / 2;
    __m512 sum[ROWS][2];
    for (int t = 0; t < high; t++) {
        __m512i own = _mm512_loadu_si512(y + t * ldy);
        sum[t][0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, own));
        sum[t][1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, own));
    }
    for (long p = 0; p < pairs; p++) {
        __m512i one = _mm512_loadu_si512(b + 2 * p * ldb);
        __m512i two = 2 * p + 1 < rank ? _mm512_loadu_si512(b + (2 * p + 1) * ldb) : none;
        STAY(one);
        STAY(two);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two), above = (__m512bh)_mm512_unpackhi_epi16(one, two);
        for (int t = 0; t < high; t++) {
            __m512bh by = (__m512bh)_mm512_set1_epi32((int)h2[t * pairs + p]);
            sum[t][0] = _mm512_dpbf16_ps(sum[t][0], by, low);
            sum[t][1] = _mm512_dpbf16_ps(sum[t][1], by, above);
        }
    }
    for (int t = 0; t < high; t++) {
        __m512i narrowed = (__m512i)_mm512_cvtne2ps_pbh(sum[t][1], sum[t][0]);
        _mm512_storeu_si512(y + t * ldy, _mm512_permutexvar_epi16(order, narrowed));
    }
}
#else
#define H float
static inline __attribute__((always_inline)) void NAME(block)(T *y, long ldy, const H *h, const T *b, long ldb, long rank, const int high)
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
#endif

static inline __attribute__((always_inline)) void NAME(outer)(T *y, const float *h, const T *b, long d_out, long rank, const int high)
{
#ifdef PAIRS
    long pairs = (rank + 1) / 2;
    H ready[ROWS * pairs];
    for (int t = 0; t < high; t++)
        for (long p = 0; p < pairs; p++) {
            uint32_t second = 2 * p + 1 < rank ? narrow(h[t * rank + 2 * p + 1]) : 0;
            ready[t * pairs + p] = narrow(h[t * rank + 2 * p]) | second << 16;
        }
#else
    const H *ready = h;
#endif
    long at = 0;
    for (; at + 32 <= d_out; at += 32) NAME(block)(y + at, d_out, ready, b + at, d_out, rank, high);
    if (at == d_out) return;
    long left = d_out - at; /* one more block, of which only the columns that are there come back */
    T own[ROWS * 32], factors[32 * rank];
    memset(own, 0, sizeof(own));
    memset(factors, 0, sizeof(T) * 32 * rank);
    for (int t = 0; t < high; t++) memcpy(own + 32 * t, y + t * d_out + at, sizeof(T) * left);
    for (long r = 0; r < rank; r++) memcpy(factors + 32 * r, b + r * d_out + at, sizeof(T) * left);
    NAME(block)(own, 32, ready, factors, 32, rank, high);
    for (int t = 0; t < high; t++) memcpy(y + t * d_out + at, own + 32 * t, sizeof(T) * left);
}
#undef H

/* h (tokens, ldh) of a span: ROWS tokens at a time, the rest one by one; with the first of them `soon`, A of the next span, is asked for */
static inline __attribute__((always_inline)) void NAME(hidden)(float *h, long ldh, const T *x, const T *a, long tokens, long d_in, long rank, const T *soon)
{
    for (long t = 0; t < tokens; soon = 0) {
        const T *from = x + t * d_in;
        float *to = h + t * ldh;
        long r = 0, on = soon ? 1 : 0;
        if (tokens - t >= ROWS) {
            for (; r + RANKS <= rank; r += RANKS) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, ROWS, RANKS, soon + r * d_in, on * RANKS);
            for (; r < rank; r++) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, ROWS, 1, soon + r * d_in, on);
            t += ROWS;
        } else {
            for (; r + ALONE <= rank; r += ALONE) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, 1, ALONE, soon + r * d_in, on * ALONE);
            for (; r + RANKS <= rank; r += RANKS) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, 1, RANKS, soon + r * d_in, on * RANKS);
            for (; r < rank; r++) NAME(inner)(to + r, from, a + r * d_in, d_in, ldh, 1, 1, soon + r * d_in, on);
            t += 1;
        }
    }
}

static void NAME(few)(const T *x, T *y, const T *a, const T *b, long tokens, long d_in, long d_out, long rank)
{
    float h[ROWS * rank];
    ahead(b, sizeof(T) * rank * d_out);
    for (long t = 0; t < tokens;) {
        long some = tokens - t >= ROWS ? ROWS : 1;
        NAME(hidden)(h, rank, x + t * d_in, a, some, d_in, rank, 0);
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
