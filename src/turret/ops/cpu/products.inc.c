/* Small matrix products in the cache of one core: with matrix tiles (AMX) if the processor has them, else with vectors.

   C (m, n) float = A (m, k) B (k, n); m, n and k are multiples of 32. A and, for float, B are row-major. If the processor
   multiplies bfloat16, two rows of B are interleaved into one: B[2i][j], B[2i + 1][j] are neighbours. */

#define PIECE 32 /* queries at a time */
#define ROUND(n) (((n) + 31) / 32 * 32)
#define CUT(type, n) ((type *)cut(&next, sizeof(type) * (n)))

static char *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 16384) / 64 * 64); }

static char *cut(char **next, size_t bytes)
{
    char *start = *next;
    *next += (bytes + 63) / 64 * 64;
    return start;
}

/* --- vectors ----------------------------------------------------------------------------------------------------- */

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

/* ACROSS floats fill a register of the processor; GCC keeps wider vectors in memory, which is 20x slower. A block is HIGH rows by
   two vectors of sums; LAST rows for the rest of a multiple of 32. */
#ifdef __AVX512F__
#define ACROSS 16
#define HIGH 8
#define LAST 8
#else
#ifdef __AVX2__
#define ACROSS 8
#else
#define ACROSS 4
#endif
#define HIGH 6
#define LAST 4
#endif
typedef float vector __attribute__((vector_size(4 * ACROSS)));
typedef float in_memory __attribute__((vector_size(4 * ACROSS), aligned(4))); /* may start at any float */

static inline vector load_floats(const float *from) { return *(const in_memory *)from; }
static inline void store_floats(float *to, vector from) { *(in_memory *)to = from; }

#ifdef __AVX512F__
/* The transpose of 16 x 16 words whose rows are `line` words apart. */
static inline __attribute__((always_inline)) void turned(const void *from, long line, __m512i column[16])
{
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512((const uint32_t *)from + i * line);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int w = 0; w < 2; w++) {
            x[i + 2 * w] = _mm512_unpacklo_epi64(y[i + w], y[i + w + 2]);
            x[i + 2 * w + 1] = _mm512_unpackhi_epi64(y[i + w], y[i + w + 2]);
        }
    for (int w = 0; w < 4; w++) { /* x[4 i + w]: rows 4 i to 4 i + 3 of columns w, w + 4, w + 8, w + 12 */
        y[w] = _mm512_shuffle_i32x4(x[w], x[w + 4], 0x88);
        y[w + 4] = _mm512_shuffle_i32x4(x[w], x[w + 4], 0xdd);
        y[w + 8] = _mm512_shuffle_i32x4(x[w + 8], x[w + 12], 0x88);
        y[w + 12] = _mm512_shuffle_i32x4(x[w + 8], x[w + 12], 0xdd);
    }
    for (int w = 0; w < 4; w++) {
        column[w] = _mm512_shuffle_i32x4(y[w], y[w + 8], 0x88);
        column[w + 8] = _mm512_shuffle_i32x4(y[w], y[w + 8], 0xdd);
        column[w + 4] = _mm512_shuffle_i32x4(y[w + 4], y[w + 12], 0x88);
        column[w + 12] = _mm512_shuffle_i32x4(y[w + 4], y[w + 12], 0xdd);
    }
}
#endif

typedef uint32_t __attribute__((may_alias)) any_word; /* 32 bits of any type */

/* X (m, n) of words to X^T (n, m). line, high: row strides in words. m and n are multiples of 16. */
static void transposed_words(void *restrict to, long high, const void *restrict from, long line, long m, long n)
{
#ifdef __AVX512F__
    for (long i = 0; i < m; i += 16)
        for (long j = 0; j < n; j += 16) {
            __m512i column[16];
            turned((const uint32_t *)from + i * line + j, line, column);
            for (int r = 0; r < 16; r++) _mm512_storeu_si512((uint32_t *)to + (j + r) * high + i, column[r]);
        }
#else
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j++) ((any_word *)to)[j * high + i] = ((const any_word *)from)[i * line + j];
#endif
}

static void transposed_float(float *to, const float *from, long m, long n) { transposed_words(to, m, from, n, m, n); }

/* --- vectors loaded from memory and stored -------------------------------------------------------------------------- */

static inline vector load_bfloats(const bfloat16 *from)
{
#if defined(__AVX512F__)
    return (vector)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
#elif defined(__AVX2__)
    return (vector)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16));
#else
    vector y;
    for (int i = 0; i < ACROSS; i++) y[i] = wide(from[i]);
    return y;
#endif
}

static inline void store_bfloats(bfloat16 *to, vector from)
{
#ifdef __AVX512BF16__
    __m256bh both = _mm512_cvtneps_pbh((__m512)from);
    memcpy(to, &both, 32);
#else
    for (int i = 0; i < ACROSS; i++) to[i] = narrow(from[i]);
#endif
}

/* ACROSS elements of token t from column c on, a multiple of ACROSS, after dropout without its scale. */
typedef uint32_t words __attribute__((vector_size(4 * ACROSS)));

static inline __attribute__((always_inline)) vector left(long t, long c, vector x, const struct mask *mask)
{
    words at;
    for (int i = 0; i < ACROSS; i++) at[i] = (uint32_t)i;
    at += WORD(c) + FIRST(mask, t);
    SCRAMBLE(at, SECOND(mask, t));
    at = c & 16 ? at >> 16 : at & 0xffffu;
    return (vector)((words)x & (words)(at >= mask->threshold));
}

static inline void ahead(const void *from, long bytes) /* prefetch */
{
    for (long i = 0; from && i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

/* Keeps a vector in its register; otherwise the compiler loads it again at every use. */
#ifdef __AVX512F__
#define STAY(x) __asm__("" : "+v"(x))
#else
#define STAY(x)
#endif

static inline vector spread(float x)
{
#if defined(__AVX512F__)
    return (vector)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vector)_mm256_set1_ps(x);
#else
    vector y;
    for (int i = 0; i < ACROSS; i++) y[i] = x;
    return y;
#endif
}

static inline vector dot(vector sum, vector a, vector b) /* always fused, so that it rounds once everywhere */
{
#if defined(__AVX512F__)
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

static inline float added(vector x) /* the sum of all lanes, by halves, in a fixed order */
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__) && defined(__FMA__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float y[ACROSS];
    store_floats(y, x);
    for (int half = ACROSS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
    return y[0];
#endif
}

#ifdef __AVX512F__
/* The sums of the lanes of 16 vectors, in the order of `added`; lane i of the result is the sum of vector i. Each step folds two
   vectors into one, so it takes 45 operations instead of 16 reductions. */
static inline __attribute__((always_inline)) vector added_16(const vector *x)
{
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        __m512 one = (__m512)x[i], two = (__m512)x[i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x44), _mm512_shuffle_f32x4(one, two, 0xee));
    }
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++) {
        __m512d one = _mm512_castps_pd(b[i]), two = _mm512_castps_pd(b[i + 2]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, two)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, two)));
    }
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
    return (vector)_mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), all);
}
#endif

#ifdef __AVX512BF16__
static inline __m512bh take32(const bfloat16 *from)
{
    __m512bh y;
    memcpy(&y, from, 64);
    return y;
}
static inline vector dot32(vector sum, __m512bh a, __m512bh b) { return (vector)_mm512_dpbf16_ps((__m512)sum, a, b); }

#endif

/* A block of ROWS tokens by RANKS ranks keeps its sums in registers; for one token it has ALONE ranks. */
#ifdef __AVX512F__
#define ROWS 4
#else
#define ROWS 3
#endif
#define RANKS 4
#define ALONE 8
#define COLUMNS (32 / ACROSS) /* vectors */

/* --- C (m, n) = A (m, k) B (k, n), plus C if `add`: of floats, and of pairs of bfloat16 -------------------------------------

   STEP: rows of A's line and of B that DOT multiplies at a time */

#define PRODUCT_OF(KIND, TYPE, LANES, STEP, TAKE, SPREAD, DOT) \
    static inline __attribute__((always_inline)) void sums_##KIND(float *c, long ldc, const TYPE *a, long lda, const TYPE *b, long ldb, long k, int add, const int high) \
    { \
        vector sum[HIGH][2]; \
        for (int r = 0; r < high; r++) \
            for (int w = 0; w < 2; w++) sum[r][w] = add ? load_floats(c + r * ldc + ACROSS * w) : spread(0.0f); \
        for (long e = 0; e < k; e += STEP) { \
            LANES first = TAKE(b + e * ldb), second = TAKE(b + e * ldb + STEP * ACROSS); \
            PRAGMA(GCC unroll 8) \
            for (int r = 0; r < high; r++) { \
                LANES x = SPREAD(a + r * lda + e); \
                sum[r][0] = DOT(sum[r][0], x, first); \
                sum[r][1] = DOT(sum[r][1], x, second); \
            } \
        } \
        for (int r = 0; r < high; r++) \
            for (int w = 0; w < 2; w++) store_floats(c + r * ldc + ACROSS * w, sum[r][w]); \
    } \
    static void product_##KIND(float *c, long ldc, const TYPE *a, long lda, const TYPE *b, long ldb, long m, long n, long k, int add) \
    { \
        for (long j = 0; j < n; j += 2 * ACROSS) \
            for (long i = 0, left = m; left; left = m - i) { \
                int high = left == HIGH || left > 2 * LAST ? HIGH : LAST; \
                if (high == HIGH) sums_##KIND(c + i * ldc + j, ldc, a + i * lda, lda, b + STEP * j, ldb, k, add, HIGH); \
                else sums_##KIND(c + i * ldc + j, ldc, a + i * lda, lda, b + STEP * j, ldb, k, add, LAST); \
                i += high; \
            } \
    }

static inline vector spread_float(const float *x) { return spread(*x); }
PRODUCT_OF(float, float, vector, 1, load_floats, spread_float, dot)

/* --- pairs of bfloat16: two interleaved rows of B, for vectors and for tiles ------------------------------------------ */

#ifdef __AVX512BF16__
static inline __m512bh spread_pair(const bfloat16 *x)
{
    int32_t both;
    memcpy(&both, x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
PRODUCT_OF(pairs, bfloat16, __m512bh, 2, take32, spread_pair, dot32)

static void pack_row_pairs(bfloat16 *to, const float *from, long n)
{
    for (long j = 0; j < n; j += 32) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + j + 16), _mm512_loadu_ps(from + j));
        memcpy(to + j, &both, 64);
    }
}

/* B = X^T for X (n, k): pairs of a row of X become a column */
static void right_of_transposed_pairs(bfloat16 *to, const bfloat16 *from, long n, long k)
{
    transposed_words(to, n, from, k / 2, n, k / 2);
}

static const uint16_t woven[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* B = X (k, n): two rows interleaved */
static void right_of_pairs(bfloat16 *to, const bfloat16 *from, long k, long n)
{
    const __m512i order = _mm512_loadu_si512(woven);
    for (long e = 0; e < k; e += 2)
        for (long j = 0; j < n; j += 16) {
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)(from + e * n + j))),
                                              _mm256_loadu_si256((const void *)(from + (e + 1) * n + j)), 1);
            _mm512_storeu_si512(to + e * n + 2 * j, _mm512_permutexvar_epi16(order, both));
        }
}

static void right_of_float_pairs(bfloat16 *to, const float *from, long stride, long n)
{
    const __m512i order = _mm512_loadu_si512(woven);
    for (long e = 0; e < PIECE; e += 2)
        for (long j = 0; j < n; j += 16) {
            __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + (e + 1) * stride + j), _mm512_loadu_ps(from + e * stride + j));
            __m512i bits;
            memcpy(&bits, &both, 64);
            _mm512_storeu_si512(to + e * n + 2 * j, _mm512_permutexvar_epi16(order, bits));
        }
}

/* X (PIECE, n) to X^T (n, PIECE): interleave two rows, then transpose the words */
static void transposed_pairs(bfloat16 *to, const bfloat16 *from, long n)
{
    const __m512i order = _mm512_loadu_si512(woven);
    for (long j = 0; j < n; j += 16) {
        uint32_t both[PIECE / 2][16];
        for (long e = 0; e < PIECE; e += 2) {
            __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)(from + e * n + j))),
                                             _mm256_loadu_si256((const void *)(from + (e + 1) * n + j)), 1);
            _mm512_storeu_si512(both[e / 2], _mm512_permutexvar_epi16(order, two));
        }
        transposed_words(to + j * PIECE, PIECE / 2, both, 16, PIECE / 2, 16);
    }
}
#endif

/* --- tiles ------------------------------------------------------------------------------------------------------- */

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>

struct tile_config { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

static void begin_tiles(struct tile_config *before)
{
    struct tile_config mine = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(before);
    _tile_loadconfig(&mine);
}

static void end_tiles(const struct tile_config *before) /* restores the configuration of another library */
{
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

static int ask_for_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; } /* ARCH_REQ_XCOMP_PERM, tile data */

static void product_tiles(float *c, long ldc, const bfloat16 *a, long lda, const bfloat16 *b, long ldb, long m, long n, long k, int add)
{
    for (long i = 0; i < m; i += 32)
        for (long j = 0; j < n; j += 32) {
            float *c0 = c + i * ldc + j, *c1 = c0 + 16 * ldc;
            if (add) {
                _tile_loadd(0, c0, ldc * 4); _tile_loadd(1, c0 + 16, ldc * 4);
                _tile_loadd(2, c1, ldc * 4); _tile_loadd(3, c1 + 16, ldc * 4);
            } else { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
            for (long e = 0; e < k; e += 32) {
                _tile_loadd(4, a + i * lda + e, lda * 2);
                _tile_loadd(6, b + e * ldb + j * 2, ldb * 4);
                _tile_loadd(7, b + e * ldb + j * 2 + 32, ldb * 4);
                _tile_loadd(5, a + (i + 16) * lda + e, lda * 2);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c0, ldc * 4); _tile_stored(1, c0 + 16, ldc * 4);
            _tile_stored(2, c1, ldc * 4); _tile_stored(3, c1 + 16, ldc * 4);
        }
}

#define LEAD 96 /* columns by which the prefetch of a frozen matrix is ahead */

/* C (32, n) = W (32, k) X^T: 32 rows of a frozen matrix, read in place, by packed x, (k / 2, n) pairs; 16 tokens, or 32 if `broad`.
   Prefetches W, and at its end the rows at `soon`. */
static inline __attribute__((always_inline)) void product_rows(float *c, const bfloat16 *w, const bfloat16 *x, long n, long k, const int broad, const bfloat16 *soon)
{
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long e = 0; e < k; e += 32) {
        const bfloat16 *coming = e + LEAD < k ? w + e + LEAD : soon + e + LEAD - k;
        for (long i = 0; soon && i < 32; i++) __builtin_prefetch(coming + i * k, 0, 3);
        _tile_loadd(4, w + e, k * 2);
        _tile_loadd(5, w + 16 * k + e, k * 2);
        _tile_loadd(6, x + e * n, n * 4);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
        if (!broad) continue;
        _tile_loadd(7, x + e * n + 32, n * 4);
        _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, n * 4); _tile_stored(2, c + 16 * n, n * 4);
    if (!broad) return;
    _tile_stored(1, c + 16, n * 4); _tile_stored(3, c + 16 * n + 16, n * 4);
}

/* y += (x A^T) B for bfloat16, 32 tokens at a time, with packed factors. all: tokens of x, the limit of reads. Returns 0, and
   computes nothing, if a size is no multiple of 32. */
static int low_rank_tiles(const bfloat16 *x, bfloat16 *y, const bfloat16 *a, const bfloat16 *b, long start, long tokens,
                          long all, long d_in, long d_out, long rank)
{
    if (d_in % 32 || d_out % 32) return 0;
    long broad = (rank + 15) / 16 * 16, deep = ROUND(rank);
    char *memory = scratch(2 * (d_in * broad + deep * d_out + 32 * deep + 32 * d_in) + 4 * (32 * broad + 2 * 1024)), *next = memory;
    if (!memory) return 0;
    uint32_t *a_woven = (uint32_t *)CUT(bfloat16, d_in * broad); /* (D_in / 2, broad) pairs */
    bfloat16 *b_woven = CUT(bfloat16, deep * d_out), *h_narrow = CUT(bfloat16, 32 * deep), *last = CUT(bfloat16, 32 * d_in);
    float *h = CUT(float, 32 * broad), *c = CUT(float, 2 * 1024);
    const __m512i steps = _mm512_mullo_epi32(_mm512_set1_epi32((int)(d_in / 2)),
                                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (long r = 0; r < broad; r += 16) {
        __mmask16 there = rank - r >= 16 ? 0xffff : (__mmask16)((1u << (rank - r)) - 1);
        for (long e = 0; e < d_in / 2; e++)
            _mm512_storeu_si512(a_woven + e * broad + r,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, steps, (const uint32_t *)(a + r * d_in) + e, 4));
    }
    const __m512i order = _mm512_loadu_si512(woven);
    for (long r = 0; r < deep; r += 2)
        for (long j = 0; j < d_out; j += 16) {
            __m256i none = _mm256_setzero_si256();
            __m256i one = r < rank ? _mm256_loadu_si256((const void *)(b + r * d_out + j)) : none;
            __m256i two = r + 1 < rank ? _mm256_loadu_si256((const void *)(b + (r + 1) * d_out + j)) : none;
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
            _mm512_storeu_si512(b_woven + r * d_out + 2 * j, _mm512_permutexvar_epi16(order, both));
        }
    memset(h_narrow, 0, 64 * deep);
    struct tile_config before;
    begin_tiles(&before);
    for (long t = 0; t < tokens; t += 32) {
        long own = tokens - t < 32 ? tokens - t : 32;
        const bfloat16 *from = x + (start + t) * d_in;
        if (start + t + 32 > all) { /* do not read past the last token */
            memset(last + own * d_in, 0, 2 * (32 - own) * d_in);
            from = memcpy(last, from, 2 * own * d_in);
        }
        for (long r = 0; r < broad; r += 16) {
            _tile_zero(0); _tile_zero(2);
            for (long e = 0; e < d_in; e += 32) {
                _tile_loadd(6, a_woven + e / 2 * broad + r, broad * 4);
                _tile_loadd(4, from + e, d_in * 2);
                _tile_loadd(5, from + 16 * d_in + e, d_in * 2);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
            }
            _tile_stored(0, h + r, broad * 4); _tile_stored(2, h + 16 * broad + r, broad * 4);
        }
        for (long i = 0; i < 32; i++)
            for (long r = 0; r < broad; r += 16) store_bfloats(h_narrow + i * deep + r, load_floats(h + i * broad + r));
        bfloat16 *to = y + (start + t) * d_out;
        for (long j = 0; j <= d_out; j += 32) { /* tiles are one block ahead of the vectors that add their result */
            if (j < d_out) product_tiles(c + j / 32 % 2 * 1024, 32, h_narrow, deep, b_woven + 2 * j, d_out, 32, 32, deep, 0);
            if (j == 0) continue;
            const float *made = c + (j / 32 + 1) % 2 * 1024;
            for (long i = 0; i < own; i++)
                for (int w = 0; w < 32; w += 16) {
                    bfloat16 *at = to + i * d_out + j - 32 + w;
                    store_bfloats(at, load_bfloats(at) + load_floats(made + 32 * i + w));
                }
        }
    }
    end_tiles(&before);
    free(memory);
    return 1;
}
#else
#define TILES 0
static int ask_for_tiles(void) { return 1; }
#endif

/* Spans of tokens with one adapter each. factors: (count, layers, 2), addresses of A and B, 0 for none. */
struct spans {
    long count, layers, tokens; /* tokens: of the whole pass */
    const int64_t *starts, *ends, *ranks;
    const uint64_t *factors;
};

/* The number of a span's tokens in the first `work` units of work, where a token costs `rank`; rounded to whole tiles. */
static inline long before_work(long work, long rank, long tokens)
{
    if (work <= 0 || work >= tokens * rank) return work <= 0 ? 0 : tokens;
    long whole = (work / rank + 16) / 32 * 32;
    return whole < tokens ? whole : tokens;
}

/* The rows of an unpadded batch. Pointers have one entry for each row. */
struct rows {
    long rows, heads, kv_heads, dim;
    long q_token, q_head, k_token, k_head, v_token, v_head; /* strides, in elements */
    long most, most_prefix, work;
    const int64_t *query_starts, *query_lengths, *key_starts, *key_lengths, *prefix_lengths;
    const uint64_t *prefix_keys, *prefix_values; /* addresses of (H_kv, P, D), 0 for none */
    const float *bias; /* (H, bias_width) by key - query, with zero at column bias_zero; or none */
    long bias_width, bias_zero, window;
    int causal;
    struct mask mask; /* threshold 0: no dropout */
    float scale, scaling;
};

/* Rows of a KV cache: keys and values (rows, H_kv, S, D), of which the first `lengths` of each row are in use. */
struct cached {
    long rows, kv_heads, dim, row_stride, head_stride; /* strides in elements */
    long most;                                         /* length of the longest row */
    const int64_t *lengths, *prefixes;
};

/* The rows of one layer in one block of the cache. keys, values: of type T */
struct part {
    const struct cached *cached;
    void *keys, *values;
};

/* A frozen linear layer. number: its index in the factors of `struct spans` */
struct matrix {
    long d_in, d_out, number;
    const void *weight, *bias; /* (d_out, d_in), and (d_out,) or none */
};

/* A LayerNorm. */
struct layer_norm {
    const void *weight, *bias;
    float eps;
};

/* A layer of an encoder. */
struct encoder_layer {
    struct matrix q, k, v, o, up, down;
    struct layer_norm norm, norm_after;
};

/* A layer of a gated decoder. q_norm, k_norm: over a head, or none */
struct decoder_layer {
    struct matrix q, k, v, o, gate, up, down;
    const void *norm, *q_norm, *k_norm, *norm_after;
    long dim, window;
    float eps, eps_after, scaling;
};
