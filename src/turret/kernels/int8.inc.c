/* A frozen layer's product in 8 bits while an adapter trains, forward and backward. Included by kernels.c once a dtype.

       y = x W^T + b,    x_te ~ s_t p_te,  W_oe ~ r_o q_oe,    y_to = s_t r_o sum_e p_te q_oe + b_o

   p, q: whole numbers from -127 to 127; s_t = max_e |x_te| / 127 of a token, r_o = max_e |W_oe| / 127 of an output. `turned`: the
   layer's matrix lies as (E, O), as it does for dx = dy W. W is rounded and laid out anew at every call, a part of it at a time,
   unless `round_int8` did it beforehand. Sums are whole numbers, so neither threads nor order change them. A token or an output that
   is not finite anywhere has nothing finite to show. E is a multiple of 64, O of 32. */

#ifdef __AVX512VNNI__
#ifndef INT8
#define INT8
#define AT_ONCE 8             /* tokens; by 32 outputs their sums fill half of the registers */
#define PART (256 * 1024)     /* bytes of the matrix that are laid out at a time: a core's own cache holds them, */
#define SHARE (128 * 1024)    /* and so many of the tokens */

/* Of magnitudes as whole numbers, among which NaN is the largest of all: 127 / most, and most / 127; what is so small that the
   first would overflow counts as zero */
static inline void scales_of(float most, float *times, float *scale)
{
    *times = most < 0x1p-120f ? 0.0f : 127.0f / most;
    *scale = most / 127.0f;
}

/* x times as a whole number, to nearest, ties to even: the last byte of a float that is 1.5 * 2^23 + `above` larger, whose bits are
   SHIFTED + above larger than it. */
#define SHIFTED 0x4b400000
static inline __m512i whole(vector x, vector times, float above)
{
    return (__m512i)dot(spread(0x1.8p23f + above), x, times);
}

/* the last bytes of four words side by side */
static inline __m512i joined(const __m512i x[4])
{
    __m512i y = x[0];
    y = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffffff00), _mm512_slli_epi32(x[1], 8), y, 0xca); /* of the mask ? a : b */
    y = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff0000), _mm512_slli_epi32(x[2], 16), y, 0xca);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff000000), _mm512_slli_epi32(x[3], 24), y, 0xca);
}

/* modulo 2^32, where _mm512_reduce_add_epi32 adds signed numbers, which must not overflow */
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

/* AT_ONCE tokens by 32 outputs: p (AT_ONCE, E), q: four numbers of 32 outputs side by side, 128 above themselves */
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

/* 16 words of four whole numbers each: numbers e, e + 16, e + 32 and e + 48 of 64 share a word, in p as in q. Returns their sums. */
static inline __m512i NAME(round_64)(void *to, const T *x, vector times, float above)
{
    __m512i y[4];
    for (int i = 0; i < 4; i++) y[i] = whole(LOADS(x + 16 * i), times, above);
    _mm512_storeu_si512(to, joined(y));
    return _mm512_add_epi32(_mm512_add_epi32(y[0], y[1]), _mm512_add_epi32(y[2], y[3]));
}

/* p of one token, its scale, and 128 times the sum of p, which q's being 128 too high adds to every output */
static void NAME(round_token)(int8_t *p, float *scale, int32_t *above, const T *x, long deep)
{
    __m512i sum = _mm512_setzero_si512();
    float times;
    scales_of(LARGEST(x, deep), &times, scale);
    for (long e = 0; e < deep; e += 64) sum = _mm512_add_epi32(sum, NAME(round_64)(p + e, x + e, spread(times), 0.0f));
    *above = (int32_t)(128u * (added_words(sum) - (uint32_t)deep * SHIFTED));
}

/* q of 32 outputs whose numbers lie in rows, and their scales; `rows` has room for 16 of them, rounded */
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

/* the same of 32 outputs whose numbers lie in columns, `line` numbers from one row to the next */
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

/* What `linear_int8` needs for so many tokens, cut from `room`, or how many bytes that is. */
struct NAME(int8_room) {
    int8_t *p;
    float *scales, *own; /* of tokens, and of the outputs of a part */
    int32_t *above;
    uint8_t *q, *rows; /* rows: one piece a thread */
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

/* q (O / 32, E / 4, 32, 4) and the scales of outputs `first` to `last`, by the threads of a region */
static void NAME(round_part)(uint8_t *q, float *scales, const T *w, long deep, long outputs, long first, long last, int turned, uint8_t *rows)
{
#pragma omp for schedule(static)
    for (long o = first; o < last; o += 32) {
        uint8_t *to = q + (o - first) * deep;
        if (turned) NAME(round_columns)(to, scales + o - first, w + o, outputs, deep);
        else NAME(round_rows)(to, scales + o - first, w + o * deep, deep, rows);
    }
}

/* W (O, E) or, turned, (E, O) as `linear_int8` takes it in W's place: q of all outputs (O E bytes) and behind it their scales (O floats).
   rows: 16 E bytes a thread */
void NAME(round_int8)(const T *w, uint8_t *rounded, uint8_t *rows, long deep, long outputs, int turned, int threads)
{
#pragma omp parallel num_threads(threads) if (outputs * deep > SERIAL)
    NAME(round_part)(rounded, (float *)(rounded + outputs * deep), w, deep, outputs, 0, outputs, turned, rows + omp_get_thread_num() * 16 * deep);
}

/* y (N, O), x (N, E), W (O, E) or, turned, (E, O), or none where it is `rounded`, b (O,) or none. Without `memory`: how many bytes of it
   are needed. */
long NAME(linear_int8)(const T *x, const T *w, const uint8_t *rounded, const T *b, T *y, long tokens, long deep, long outputs, int turned,
                       void *memory, int threads)
{
    long part = PART / deep / 32 * 32, blocks = (tokens + AT_ONCE - 1) / AT_ONCE, all = blocks * AT_ONCE;
    long rounds = (blocks * AT_ONCE * deep + (long)threads * SHARE - 1) / ((long)threads * SHARE); /* in which every thread takes as much as another */
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
#pragma omp barrier /* before the next part takes the place of this one */
            }
        }
    }
    return bytes;
}
#endif
