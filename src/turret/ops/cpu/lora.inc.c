/* LoRA in training; a library computes the product of the frozen layer. Included by kernels.c for each dtype.

       h = drop(x) A^T,  y += by h B^T
       dh = by dy B,  dA = dh^T drop(x),  dB = by dy^T h,  dx += drop(dh A)

   x, dx: (N, D_in) and y, dy: (N, D_out) of type T. A: (R, D_in), B: (D_out, R), h: (N, R), their gradients and all sums are float.
   `by` is the scaling times 1 / (1 - p) of dropout. `turned` is workspace for by B^T. D_in and D_out are multiples of 32. Each
   sum belongs to one thread and has one order, so results do not depend on the number of threads. */

/* OF(ranks at a time): as many as keep their sums in registers, then fewer */
#ifndef BLOCKS_OF_RANKS
#ifdef __AVX512F__
#define BLOCKS_OF_RANKS OF(8) OF(4) OF(1)
#else
#define BLOCKS_OF_RANKS OF(4) OF(1)
#endif
#endif

/* ACROSS elements of token t from column `at` on, after dropout */
static inline __attribute__((always_inline)) vector NAME(left_of)(const T *x, long d, long t, long at, const struct mask *mask)
{
    vector from = LOADS(x + t * d + at);
    return mask ? left(t, at, from, mask) : from;
}

/* h (tokens from t on, ranks from r on) = drop(x) A^T, `high` tokens by `broad` ranks */
static inline __attribute__((always_inline)) void NAME(lora_block)(float *h, const T *x, const float *a, long d, long rank, long t, long r, const struct mask *mask, const int high, const int broad)
{
    vector sum[2][8];
    for (int i = 0; i < high; i++)
        for (int j = 0; j < broad; j++) memset(&sum[i][j], 0, sizeof(vector));
    for (long at = 0; at < d; at += ACROSS) {
        vector from[2];
        for (int i = 0; i < high; i++) from[i] = NAME(left_of)(x, d, t + i, at, mask);
        for (int j = 0; j < broad; j++) {
            vector factor = load_floats(a + (r + j) * d + at);
            for (int i = 0; i < high; i++) sum[i][j] = dot(sum[i][j], from[i], factor);
        }
    }
    for (int i = 0; i < high; i++)
        for (int j = 0; j < broad; j++) h[(t + i) * rank + r + j] = added(sum[i][j]);
}

/* the same for all ranks, of one token or two */
static void NAME(lora_inner)(float *h, const T *x, const float *a, long d, long rank, long t, int two, const struct mask *mask)
{
    long r = 0;
#define OF(broad) \
    for (; r + broad <= rank; r += broad) { \
        if (two) NAME(lora_block)(h, x, a, d, rank, t, r, mask, 2, broad); \
        else NAME(lora_block)(h, x, a, d, rank, t, r, mask, 1, broad); \
    }
    BLOCKS_OF_RANKS
#undef OF
}

/* y of `high` tokens += drop(h A) */
static inline __attribute__((always_inline)) void NAME(lora_add)(T *y, const float *h, const float *a, long d, long rank, long t, const struct mask *mask, const int high)
{
    for (long at = 0; at < d; at += 2 * ACROSS) {
        vector sum[2][2];
        for (int i = 0; i < high; i++) memset(sum[i], 0, sizeof(sum[i]));
        for (long r = 0; r < rank; r++) {
            vector one = load_floats(a + r * d + at), two = load_floats(a + r * d + at + ACROSS);
            for (int i = 0; i < high; i++) {
                vector by = spread(h[(t + i) * rank + r]);
                sum[i][0] = dot(sum[i][0], by, one);
                sum[i][1] = dot(sum[i][1], by, two);
            }
        }
        for (int i = 0; i < high; i++)
            for (int w = 0; w < 2; w++) {
                long place = (t + i) * d + at + w * ACROSS;
                if (mask) sum[i][w] = left(t + i, at + w * ACROSS, sum[i][w], mask);
                STORES(y + place, LOADS(y + place) + sum[i][w]);
            }
    }
}

/* sum (broad, 32 columns) = h^T drop(x), over all tokens */
static inline __attribute__((always_inline)) void NAME(lora_strip)(float *sums, const float *h, const T *x, long d, long rank, long tokens, long at, const struct mask *mask, const int broad)
{
    for (int w = 0; w < 32 / ACROSS; w += 2) {
        vector sum[8][2];
        for (int j = 0; j < broad; j++) memset(sum[j], 0, sizeof(sum[j]));
        for (long t = 0; t < tokens; t++) {
            vector one = NAME(left_of)(x, d, t, at + w * ACROSS, mask), two = NAME(left_of)(x, d, t, at + (w + 1) * ACROSS, mask);
            for (int j = 0; j < broad; j++) {
                vector by = spread(h[t * rank + j]);
                sum[j][0] = dot(sum[j][0], by, one);
                sum[j][1] = dot(sum[j][1], by, two);
            }
        }
        for (int j = 0; j < broad; j++)
            for (int k = 0; k < 2; k++) store_floats(sums + j * 32 + (w + k) * ACROSS, sum[j][k]);
    }
}

/* to[j * row + i * column] = by sum of h[., j] drop(x)[., at + i], for every rank j and 32 columns i */
static void NAME(lora_outer)(float *to, long row, long column, float by, const float *h, const T *x, long d, long rank, long tokens, long at, const struct mask *mask)
{
    float sums[8 * 32];
    long r = 0;
#define OF(broad) \
    for (; r + broad <= rank; r += broad) { \
        NAME(lora_strip)(sums, h + r, x, d, rank, tokens, at, mask, broad); \
        for (int j = 0; j < broad; j++) \
            for (int i = 0; i < 32; i++) to[(r + j) * row + i * column] = by * sums[j * 32 + i]; \
    }
    BLOCKS_OF_RANKS
#undef OF
}

/* by B^T: (R, D_out) */
static void NAME(lora_turned)(float *turned, const float *b, float by, long d_out, long rank)
{
    for (long d = 0; d < d_out; d++)
        for (long r = 0; r < rank; r++) turned[r * d_out + d] = by * b[d * rank + r];
}

/* mask: of x, or none */
void NAME(lora)(long tokens, long d_in, long d_out, long rank, const T *x, const float *a, const float *b, float by,
                const struct mask *mask, float *turned, float *h, T *y, int threads)
{
    NAME(lora_turned)(turned, b, by, d_out, rank);
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * (d_in + d_out) > SERIAL)
    for (long t = 0; t < tokens; t += 2) {
        int two = t + 1 < tokens;
        NAME(lora_inner)(h, x, a, d_in, rank, t, two, mask);
        if (two) NAME(lora_add)(y, h, turned, d_out, rank, t, NULL, 2);
        else NAME(lora_add)(y, h, turned, d_out, rank, t, NULL, 1);
    }
}

/* dx: holds dy W, or none */
void NAME(lora_backward)(long tokens, long d_in, long d_out, long rank, const T *x, const float *a, const float *b, float by,
                         const struct mask *mask, float *turned, float *dh, const float *h, const T *dy, T *dx,
                         float *da, float *db, int threads)
{
    NAME(lora_turned)(turned, b, by, d_out, rank);
#pragma omp parallel num_threads(threads) if (tokens * (d_in + d_out) > SERIAL)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += 2) {
            int two = t + 1 < tokens;
            NAME(lora_inner)(dh, dy, turned, d_out, rank, t, two, NULL);
            if (dx && two) NAME(lora_add)(dx, dh, a, d_in, rank, t, mask, 2);
            else if (dx) NAME(lora_add)(dx, dh, a, d_in, rank, t, mask, 1);
        }
#pragma omp for schedule(dynamic, 1)
        for (long at = 0; at < d_in + d_out; at += 32) {
            if (at < d_in) NAME(lora_outer)(da + at, d_in, 1, 1.0f, dh, x, d_in, rank, tokens, at, mask);
            else NAME(lora_outer)(db + (at - d_in) * rank, 1, rank, by, h, dy, d_out, rank, tokens, at - d_in, NULL);
        }
    }
}
