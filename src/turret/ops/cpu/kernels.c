/* Includes every kernel twice, for float and for bfloat16, and defines what both need. */
#define _GNU_SOURCE /* for sched.h */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SERIAL 8192      /* elements below which a second thread does not pay */
#define FEW 256          /* most tokens of `linear` */
#define TILED 24         /* tokens of a span from which packing its factors for tiles pays */
#define HIDDEN (-1e30f)  /* the score of a hidden key; its probability becomes zero */

typedef uint16_t bfloat16;

static inline float wide(bfloat16 x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bfloat16 narrow(float f) /* to nearest, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* e^x for x <= 0 (and up to 88), within 2 ulp near 0 and a relative 1e-5 at -87; 0 below -87; NaN stays NaN */
static inline float exponential(float x)
{
    float bounded = x > -87.0f ? x : -87.0f; /* also for NaN, which cannot become an integer; r keeps the NaN */
    float n = floorf(bounded * 1.44269504f + 0.5f);
    float r = x - n * 0.693147181f;
    float e = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416665785f + r * (0.00833345205f + r * 0.00139171646f)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : e * power;
}

static inline float sigmoid(float x)
{
    float e = exponential(-fabsf(x)); /* never above 1 */
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

static inline float normal_cdf(float x, float bell) /* bell = exp(-x^2 / 2); Abramowitz and Stegun 7.1.26: within 1e-7 */
{
    float z = fabsf(x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float half = 0.5f * tail * bell;
    return x < 0.0f ? half : 1.0f - half;
}

/* Select with bit masks: for a ? b : 0.0f between two stores GCC emits branches, which are 2x slower. */
#define SIGN 0x80000000u
static inline uint32_t every_bit(int holds) { return 0u - (uint32_t)holds; }

static inline float bits_of(float x, uint32_t kept, uint32_t flipped)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits & kept) ^ flipped;
    memcpy(&x, &bits, 4);
    return x;
}

/* Two rounds of multiply and shift, for an integer or a vector of them: `structs.kept` is the same in torch. */
#define SCRAMBLE(x, other) \
    do { \
        (x) ^= (x) >> 16; \
        (x) *= 0x7feb352du; \
        (x) ^= ((x) >> 15) ^ (other); \
        (x) *= 0x846ca68bu; \
        (x) ^= (x) >> 16; \
    } while (0)

/* Dropout of one site in one pass. keys: of each token, so that no token's mask depends on its neighbours; threshold: p 2^16.
   One random word decides two elements of a token, 16 apart: WORD(c) is the number of the word for column c. */
struct mask { const uint64_t *keys; uint32_t seed, threshold; };
#define WORD(c) ((uint32_t)((c) / 32 * 16 + (c) % 16))
#define FIRST(mask, t) ((uint32_t)(mask)->keys[t] ^ (mask)->seed)
#define SECOND(mask, t) ((uint32_t)((mask)->keys[t] >> 32) + (mask)->seed * 0x85ebca77u)
#define OF_HEAD(h) ((uint32_t)(h) * 0xc2b2ae3du) /* apart from the other heads of attention, whose columns begin with the prefix */

static inline uint32_t random_word(uint32_t x, uint32_t other)
{
    SCRAMBLE(x, other);
    return x;
}

/* z (size, rounded up to 32) of token t: zero where the mask drops, else times scale. first: of the first column's word. */
static inline void drop(float *z, long size, long t, uint32_t first, const struct mask *mask, float scale)
{
    const uint32_t second = SECOND(mask, t), threshold = mask->threshold;
    for (long at = 0; at < size; at += 32)
#pragma omp simd
        for (long i = at; i < at + 16; i++) {
            uint32_t word = random_word(first + (uint32_t)(i - at / 2), second);
            z[i] = bits_of(z[i] * scale, every_bit((word & 0xffffu) >= threshold), 0);
            z[i + 16] = bits_of(z[i + 16] * scale, every_bit((word >> 16) >= threshold), 0);
        }
}

/* A parallel loop over n elements in chunks: EACH(n) y[i] = ...; DONE put(to + at, y, size); END. `at` is the first element of
   a chunk, i counts inside it; y and z are float buffers for its results. */
#define CHUNK 128
#define PRAGMA(x) _Pragma(#x)
#define EACH(n) \
    PRAGMA(omp parallel for num_threads(threads) schedule(static) if ((n) > SERIAL)) \
    for (long at = 0; at < (n); at += CHUNK) { \
        float y[CHUNK] = {0}, z[CHUNK]; \
        long size = (n) - at < CHUNK ? (n) - at : CHUNK; \
        (void)z; \
        for (long i = 0; i < size; i++) {
#define DONE }
#define END }

extern int omp_get_thread_num(void), omp_get_num_threads(void);
void wake(int threads);

#include "products.inc.c"

#define T float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(x) x##_float32
#include "operations.inc.c"
#define E float
#define PACK(x) (x)
#define PACKED(floats, n) (floats) /* floats need no packing, so they stay in place with their stride */
#define LINE(whole, n) (whole)
#define PACK_ROW(to, from, n) ((void)0)
#define PRODUCT product_float
#define TRANSPOSED(to, from, n) transposed_float(to, from, PIECE, n)
#define RIGHT_OF_TRANSPOSED transposed_float
#define RIGHT_OF(to, from, k, n) memcpy(to, from, sizeof(float) * (k) * (n))
#define RIGHT_OF_FLOAT(to, from, line, n) ((void)0)
#define BEGIN
#define END_PRODUCTS
#include "attention.inc.c"
#define LOADS load_floats
#define STORES store_floats
#define LANES vector /* the vector type that DOT multiplies */
#define WIDTH ACROSS
#define TAKE load_floats
#define DOT dot
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define BY_TOKENS
#endif
#include "low_rank.inc.c"
#include "step.inc.c"
#include "layer.inc.c"
#include "lora.inc.c"
#undef BY_TOKENS
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T bfloat16
#define LOAD wide
#define STORE narrow
#define NAME(x) x##_bfloat16
#ifdef __AVX512BF16__
#define PACK_CHUNK pack_row_pairs
#endif
#include "operations.inc.c"
#ifdef __AVX512BF16__
#undef E
#undef PACK
#undef PACKED
#undef LINE
#undef PACK_ROW
#undef PRODUCT
#undef TRANSPOSED
#undef RIGHT_OF_TRANSPOSED
#undef RIGHT_OF
#undef RIGHT_OF_FLOAT
#define E bfloat16
#define PACK narrow
#define PACKED(floats, n) CUT(bfloat16, n)
#define LINE(whole, n) (n)
#define PACK_ROW pack_row_pairs
#define TRANSPOSED transposed_pairs
#define RIGHT_OF_TRANSPOSED right_of_transposed_pairs
#define RIGHT_OF right_of_pairs
#define RIGHT_OF_FLOAT right_of_float_pairs
#if !TILES
#define PRODUCT product_pairs
#else
#define PRODUCT product_tiles
#undef BEGIN
#undef END_PRODUCTS
#define BEGIN struct tile_config before; begin_tiles(&before);
#define END_PRODUCTS end_tiles(&before);
#endif
#endif
#include "attention.inc.c"
#undef LOADS
#undef STORES
#define LOADS load_bfloats
#define STORES store_bfloats
#undef TAKE
#ifdef __AVX512BF16__
#undef LANES
#undef WIDTH
#undef DOT
#define LANES __m512bh
#define WIDTH 32
#define TAKE take32
#define DOT dot32
#else
#define TAKE load_bfloats
#endif
#if TILES
#define MANY low_rank_tiles
#define BY_TILES
#endif
#include "low_rank.inc.c"
#include "step.inc.c"
#include "layer.inc.c"
#include "lora.inc.c"

/* The most tokens for `linear`, up to FEW; 0 without wide enough vectors. For more tokens a library that packs its matrices is as
   fast. */
long linear_up_to_float32(void) { return ACROSS > 4 ? 128 : 0; }
long linear_up_to_bfloat16(void) { return TILES ? FEW : WIDTH == 32 ? 64 : 0; }

/* Ends the helper threads of the calling thread. GNU's runtime counts all helpers of a process: if there are more than
   processors, none of them waits awake, and every parallel region begins with a system call that wakes them. */
extern int omp_pause_resource_all(int) __attribute__((weak)); /* OpenMP 5; 1 is omp_pause_soft, unknown to older omp.h */

void rest(void)
{
    if (omp_pause_resource_all) omp_pause_resource_all(1);
}

/* Wakes the helper threads of the calling thread, each on its own processor. Linux often starts a new or woken thread on the
   processor of its waker; there it runs only after the waker has spun for 3 ms, in every region. Here the caller sleeps
   meanwhile, and a helper that finds its processor taken moves to a free one. Its affinity is restored. */
void wake(int threads)
{
    cpu_set_t taken;
    int awake = 1;
    CPU_ZERO(&taken);
    CPU_SET(sched_getcpu(), &taken);
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num()) {
#pragma omp critical
            {
                int cpu = sched_getcpu();
                cpu_set_t allowed, one;
                if (CPU_ISSET(cpu, &taken) && !sched_getaffinity(0, sizeof(allowed), &allowed)) {
                    for (cpu = 0; cpu < CPU_SETSIZE && (CPU_ISSET(cpu, &taken) || !CPU_ISSET(cpu, &allowed));) cpu++;
                    CPU_ZERO(&one);
                    CPU_SET(cpu, &one); /* does nothing if cpu is out of range, here and below */
                    if (!sched_setaffinity(0, sizeof(one), &one)) sched_setaffinity(0, sizeof(allowed), &allowed);
                }
                CPU_SET(cpu, &taken);
            }
            __atomic_add_fetch(&awake, 1, __ATOMIC_RELEASE);
        } else {
            struct timespec moment = {0, 20000};
            int all = omp_get_num_threads();
            for (int i = 0; i < 2000 && __atomic_load_n(&awake, __ATOMIC_ACQUIRE) < all; i++) continue;
            while (__atomic_load_n(&awake, __ATOMIC_ACQUIRE) < all) nanosleep(&moment, NULL);
        }
    }
}

/* 0 if the library uses matrix tiles and the system does not permit them */
int ready(void) { return ask_for_tiles(); }

int tiles(void) { return TILES; }
