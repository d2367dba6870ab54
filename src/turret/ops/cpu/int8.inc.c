/* The product of a frozen layer in 8 bits, forward and backward, in training. Included by kernels.c for each dtype.

       y = x W^T + b,    x_te ~ s_t p_te,  W_oe ~ r_o q_oe,    y_to = s_t r_o sum_e p_te q_oe + b_o

   p, q: integers from -127 to 127; s_t = max_e |x_te| / 127 for a token, r_o = max_e |W_oe| / 127 for an output. turned: W is stored
   as (E, O), as for dx = dy W. Each call rounds and packs W, one part at a time, unless `round_int8` did it before. Sums are
   integers, so neither threads nor order change them. If a token or an output has one number that is not finite, its whole result
   is not finite. E is a multiple of 64, O of 32. */

#ifdef __AVX512VNNI__
#ifndef INT8
#define INT8
#define AT_ONCE 8             /* tokens of a block; with 32 outputs their sums fill half of the registers */
#define PART (256 * 1024)     /* bytes of the matrix that are packed at a time: the cache of a core holds them */
#define SHARE (128 * 1024)    /* and these bytes of tokens */

/* times = 127 / most, scale = most / 127. A `most` for which `times` would overflow counts as zero. Magnitudes are compared as
   integers, so that NaN is the largest. */
static inline void scales_of(float most, float *times, float *scale)
{
    *times = most < 0x1p-120f ? 0.0f : 127.0f / most;
    *scale = most / 127.0f;
}

/* x * times as an integer, to nearest, ties to even: the last byte of the float x * times + 1.5 * 2^23 + above. Its bits, as an
   integer, are SHIFTED + above more than the result. */
#define SHIFTED 0x4b400000
static inline __m512i whole(vector x, vector times, float above)
{
    return (__m512i)dot(spread(0x1.8p23f + above), x, times);
}

/* The last bytes of four words in one word. */
static inline __m512i joined(const __m512i x[4])
{
    __m512i y = x[0];
    y = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffffff00), _mm512_slli_epi32(x[1], 8), y, 0xca); /* mask ? a : b */
    y = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff0000), _mm512_slli_epi32(x[2], 16), y, 0xca);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff000000), _mm512_slli_epi32(x[3], 24), y, 0xca);
}

/* The sum modulo 2^32. _mm512_reduce_add_epi32 adds signed integers, which must not overflow. */
static inline uint32_t added_words(__m512i x)
{
    uint32_t each[16], sum = 0;
    _mm512_storeu_si512(each, x);
    for (int i = 0; i < 16; i++) sum += each[i];
    return sum;
}

static inline float largest_of(const float *x, long n)
{
    __m512i most = _mm512_setzero_si512();
    for (long e = 0; e < n; e += 16) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + e), _mm512_set1_epi32(0x7fffffff)));
    int32_t bits = _mm512_reduce_max_epi32(most);
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline float largest_of_bfloats(const bfloat16 *x, long n)
{
    __m512i most = _mm512_setzero_si512();
    for (long e = 0; e < n; e += 32) most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + e), _mm512_set1_epi16(0x7fff)));
    __m512i both = _mm512_max_epu32(_mm512_slli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff0000)));
    uint32_t bits = _mm512_reduce_max_epu32(both);
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* AT_ONCE tokens by 32 outputs. p: (AT_ONCE, E); q: groups of four elements for 32 outputs, each 128 too high */
static inline __attribute__((always_inline)) void sums_int8(int32_t *c, const int8_t *p, const uint8_t *q, long deep)
{
    __m512i sum[AT_ONCE][2];
    for (int r = 0; r < AT_ONCE; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (long e = 0; e < deep; e += 4) {
        __m512i first = _mm512_loadu_si512(q + e * 32), second = _mm512_loadu_si512(q + e * 32 + 64);
#pragma GCC unroll 8
        for (int r = 0; r < AT_ONCE; r++) {
            int32_t four;
            memcpy(&four, p + r * deep + e, 4);
            __m512i x = _mm512_set1_epi32(four);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], first, x);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], second, x);
        }
    }
    for (int r = 0; r < AT_ONCE; r++)
        for (int w = 0; w < 2; w++) _mm512_storeu_si512(c + 32 * r + 16 * w, sum[r][w]);
}
#endif

/* 64 rounded elements in 16 words: elements e, e + 16, e + 32 and e + 48 share a word, in p as in q. Returns the sums of words. */
static inline __m512i NAME(round_64)(void *to, const T *x, vector times, float above)
{
    __m512i y[4];
    for (int i = 0; i < 4; i++) y[i] = whole(LOADS(x + 16 * i), times, above);
    _mm512_storeu_si512(to, joined(y));
    return _mm512_add_epi32(_mm512_add_epi32(y[0], y[1]), _mm512_add_epi32(y[2], y[3]));
}

/* p of one token, its scale, and 128 times the sum of p: the error of every output, because q is 128 too high */
static void NAME(round_token)(int8_t *p, float *scale, int32_t *above, const T *x, long deep)
{
    __m512i sum = _mm512_setzero_si512();
    float times;
    scales_of(LARGEST(x, deep), &times, scale);
    for (long e = 0; e < deep; e += 64) sum = _mm512_add_epi32(sum, NAME(round_64)(p + e, x + e, spread(times), 0.0f));
    *above = (int32_t)(128u * (added_words(sum) - (uint32_t)deep * SHIFTED));
}

/* q of 32 outputs that are rows of W, and their scales. rows: workspace for 16 rounded rows */
static void NAME(round_rows)(uint8_t *q, float *scales, const T *w, long deep, uint8_t *rows)
{
    for (int half = 0; half < 2; half++) {
        for (int o = 0; o < 16; o++) {
            const T *from = w + (16 * half + o) * deep;
            float times;
            scales_of(LARGEST(from, deep), &times, scales + 16 * half + o);
            for (long e = 0; e < deep; e += 64) NAME(round_64)(rows + o * deep + e, from + e, spread(times), 128.0f);
        }
        transposed_words(q + 64 * half, 32, rows, deep / 4, 16, deep / 4);
    }
}

/* the same for 32 outputs that are columns of W. line: elements from one row to the next */
static void NAME(round_columns)(uint8_t *q, float *scales, const T *w, long line, long deep)
{
    for (int half = 0; half < 2; half++) {
        const T *from = w + 16 * half;
        __m512i most = _mm512_setzero_si512();
        float largest[16], times[16];
        for (long e = 0; e < deep; e++)
            most = _mm512_max_epi32(most, _mm512_and_si512((__m512i)LOADS(from + e * line), _mm512_set1_epi32(0x7fffffff)));
        memcpy(largest, &most, 64);
        for (int o = 0; o < 16; o++) scales_of(largest[o], times + o, scales + 16 * half + o);
        vector by = load_floats(times);
        for (long e = 0; e < deep; e += 64)
            for (long word = 0; word < 16; word++) {
                __m512i y[4];
                for (int i = 0; i < 4; i++) y[i] = whole(LOADS(from + (e + 16 * i + word) * line), by, 128.0f);
                _mm512_storeu_si512(q + (e + 4 * word) * 32 + 64 * half, joined(y));
            }
    }
}

/* The workspace of `linear_int8`. */
struct NAME(int8_room) {
    int8_t *p;
    float *scales, *own; /* scales of tokens, and of the outputs of a part */
    int32_t *above;
    uint8_t *q, *rows; /* rows: a part for each thread */
};

static long NAME(int8_cut)(struct NAME(int8_room) *room, void *memory, long tokens, long deep, long part, int threads)
{
    char *next = memory;
    long all = (tokens + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    room->p = CUT(int8_t, all * deep);
    room->scales = CUT(float, all);
    room->above = CUT(int32_t, all);
    room->q = CUT(uint8_t, part * deep);
    room->own = CUT(float, part);
    room->rows = CUT(uint8_t, 16 * deep * threads);
    return next - (char *)memory;
}

/* q (O / 32, E / 4, 32, 4) and the scales of outputs `first` to `last`; called inside a parallel region */
static void NAME(round_part)(uint8_t *q, float *scales, const T *w, long deep, long outputs, long first, long last, int turned, uint8_t *rows)
{
#pragma omp for schedule(static)
    for (long o = first; o < last; o += 32) {
        uint8_t *to = q + (o - first) * deep;
        if (turned) NAME(round_columns)(to, scales + o - first, w + o, outputs, deep);
        else NAME(round_rows)(to, scales + o - first, w + o * deep, deep, rows);
    }
}

/* Rounds W once for many calls of `linear_int8`. w: (O, E), or (E, O) if turned. rounded: q of all outputs (O E bytes), then their
   scales (O floats). rows: workspace of 16 E bytes for each thread */
void NAME(round_int8)(const T *w, uint8_t *rounded, uint8_t *rows, long deep, long outputs, int turned, int threads)
{
#pragma omp parallel num_threads(threads) if (outputs * deep > SERIAL)
    NAME(round_part)(rounded, (float *)(rounded + outputs * deep), w, deep, outputs, 0, outputs, turned, rows + omp_get_thread_num() * 16 * deep);
}

/* y: (N, O), x: (N, E), b: (O,) or none. w: (O, E), or (E, O) if turned, or none if `rounded` is given. If `memory` is 0, the call
   computes nothing and returns the bytes that it needs. */
long NAME(linear_int8)(const T *x, const T *w, const uint8_t *rounded, const T *b, T *y, long tokens, long deep, long outputs, int turned,
                       void *memory, int threads)
{
    long part = PART / deep / 32 * 32, blocks = (tokens + AT_ONCE - 1) / AT_ONCE, all = blocks * AT_ONCE;
    long rounds = (blocks * AT_ONCE * deep + (long)threads * SHARE - 1) / ((long)threads * SHARE); /* of equal work for all threads */
    long share = (blocks + threads * rounds - 1) / (threads * rounds) * AT_ONCE;
    part = rounded || part > outputs ? outputs : part < 32 ? 32 : part;
    struct NAME(int8_room) room;
    long bytes = NAME(int8_cut)(&room, memory, tokens, deep, rounded ? 0 : part, threads);
    if (!memory) return bytes;
    const uint8_t *q = rounded ? rounded : room.q;
    const float *own = rounded ? (const float *)(rounded + outputs * deep) : room.own;
#pragma omp parallel num_threads(threads) if (tokens * deep * outputs > 128 * SERIAL)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < all; t++) {
            if (t < tokens) NAME(round_token)(room.p + t * deep, room.scales + t, room.above + t, x + t * deep, deep);
            else memset(room.p + t * deep, 0, deep);
        }
        for (long first = 0; first < outputs; first += part) {
            long last = first + part < outputs ? first + part : outputs;
            if (!rounded) {
                uint8_t *rows = room.rows + omp_get_thread_num() * 16 * deep;
                NAME(round_part)(room.q, room.own, w, deep, outputs, first, last, turned, rows);
            }
#pragma omp for collapse(2) schedule(static) nowait
            for (long start = 0; start < all; start += share)
                for (long o = first; o < last; o += 32)
                    for (long t = start; t < start + share && t < all; t += AT_ONCE) {
                        int32_t c[AT_ONCE * 32];
                        sums_int8(c, room.p + t * deep, q + (o - first) * deep, deep);
                        for (long i = t; i < t + AT_ONCE && i < tokens; i++)
                            for (int v = 0; v < 32; v += 16) {
                                __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(c + (i - t) * 32 + v), _mm512_set1_epi32(room.above[i]));
                                vector value = (vector)_mm512_cvtepi32_ps(sum) * spread(room.scales[i]);
                                vector bias = b ? LOADS(b + o + v) : spread(0.0f);
                                STORES(y + i * outputs + o + v, dot(bias, value, load_floats(own + o - first + v)));
                            }
                    }
            if (last < outputs) {
#pragma omp barrier /* the next part overwrites this one */
            }
        }
    }
    return bytes;
}
#endif
