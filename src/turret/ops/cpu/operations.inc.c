/* The small operations between matrix products, each in one pass over memory. Included by kernels.c for each dtype T; sums and
   products are float. It is plain C, because compilers vectorize these loops well.

   Every function has a reference in torch next to its caller, and compiled.py compares the two when the library is loaded.
   Axes: N tokens, H heads, D head size. All tensors are contiguous unless strides are given. */

/* --- gated and plain activations --------------------------------------------------------------------------------- */

/* n floats to T */
static inline void NAME(put)(T *to, const float *from, long n)
{
    long i = 0;
#ifdef PACK_CHUNK
    i = n / 32 * 32;
    PACK_CHUNK(to, from, i);
#endif
    for (; i < n; i++) to[i] = STORE(from[i]);
}

/* y = silu(gate) * up */
void NAME(swiglu)(long n, const T *gate, const T *up, T *to, int threads)
{
    EACH(n)
        float g = LOAD(gate[at + i]);
        y[i] = g * sigmoid(g) * LOAD(up[at + i]);
    DONE
        NAME(put)(to + at, y, size);
    END
}

/* dgate = dy up s (1 + g (1 - s)),  dup = dy g s,  s = sigmoid(g) */
void NAME(swiglu_backward)(long n, const T *gate, const T *up, const T *dy, T *dgate, T *dup, int threads)
{
    EACH(n)
        float g = LOAD(gate[at + i]), d = LOAD(dy[at + i]), s = sigmoid(g);
        y[i] = d * LOAD(up[at + i]) * s * (1.0f + g * (1.0f - s));
        z[i] = d * g * s;
    DONE
        NAME(put)(dgate + at, y, size);
        NAME(put)(dup + at, z, size);
    END
}

/* y = x (1 + erf(x / sqrt 2)) / 2 */
void NAME(gelu)(long n, const T *x, T *to, int threads)
{
    EACH(n)
        float v = LOAD(x[at + i]);
        y[i] = v * normal_cdf(v, exponential(-0.5f * v * v));
    DONE
        NAME(put)(to + at, y, size);
    END
}

/* dx = dy (cdf(x) + x exp(-x^2 / 2) / sqrt(2 pi)) */
void NAME(gelu_backward)(long n, const T *x, const T *dy, T *dx, int threads)
{
    EACH(n)
        float v = LOAD(x[at + i]), bell = exponential(-0.5f * v * v);
        y[i] = LOAD(dy[at + i]) * (normal_cdf(v, bell) + v * 0.3989422804f * bell);
    DONE
        NAME(put)(dx + at, y, size);
    END
}

/* --- dropout ----------------------------------------------------------------------------------------------------- */

/* y = drop(x): (rows, width). The hash of an element is computed again whenever it is needed, so no mask is stored. */
void NAME(dropout)(long rows, long width, const T *x, T *y, const struct mask *mask, float scale, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++)
        for (long at = 0; at < width; at += CHUNK) {
            float z[CHUNK] = {0};
            long size = width - at < CHUNK ? width - at : CHUNK, to = row * width + at;
            for (long i = 0; i < size; i++) z[i] = LOAD(x[to + i]);
            drop(z, size, row, FIRST(mask, row) + WORD(at), mask, scale);
            NAME(put)(y + to, z, size);
        }
}

/* --- RMS norm ---------------------------------------------------------------------------------------------------- */

/* y = w round(x r),  r = 1 / sqrt(mean(x^2) + eps);  x: (rows, width), r: (rows,) float */
void NAME(rms_norm)(long rows, long width, const T *x, const T *w, float eps, T *y, float *r, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++) {
        const T *a = x + row * width;
        T *b = y + row * width;
        float sum = 0.0f;
        for (long i = 0; i < width; i++) sum += LOAD(a[i]) * LOAD(a[i]);
        float s = 1.0f / sqrtf(sum / (float)width + eps);
        r[row] = s;
        for (long at = 0; at < width; at += CHUNK) {
            float y[CHUNK];
            long size = width - at < CHUNK ? width - at : CHUNK;
            for (long i = 0; i < size; i++) y[i] = LOAD(a[at + i]) * s;
            NAME(put)(b + at, y, size);
            for (long i = 0; i < size; i++) y[i] = LOAD(w[at + i]) * LOAD(b[at + i]);
            NAME(put)(b + at, y, size);
        }
    }
}

/* dx = r (g - n mean(g n)),  g = w dy,  n = x r */
void NAME(rms_norm_backward)(long rows, long width, const T *x, const T *w, const float *r, const T *dy, T *dx, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++) {
        const T *a = x + row * width, *d = dy + row * width;
        T *b = dx + row * width;
        float s = r[row], sum = 0.0f;
        for (long i = 0; i < width; i++) sum += LOAD(w[i]) * LOAD(d[i]) * LOAD(a[i]);
        float mean = sum * s / (float)width;
        for (long at = 0; at < width; at += CHUNK) {
            float y[CHUNK];
            long size = width - at < CHUNK ? width - at : CHUNK;
            for (long i = at; i < at + size; i++) y[i - at] = s * (LOAD(w[i]) * LOAD(d[i]) - LOAD(a[i]) * s * mean);
            NAME(put)(b + at, y, size);
        }
    }
}

/* --- dropout, residual sum and LayerNorm -------------------------------------------------------------------------- */

/* y (width,) = w (s - mean) r + b. Not inlined: the compiler might choose another order of operations for each caller. */
static __attribute__((noinline)) void NAME(normed)(long width, const T *s, const T *w, const T *b, float mean, float r, T *y)
{
    for (long at = 0; at < width; at += CHUNK) {
        float z[CHUNK];
        long size = width - at < CHUNK ? width - at : CHUNK;
        for (long i = 0; i < size; i++) z[i] = LOAD(w[at + i]) * ((LOAD(s[at + i]) - mean) * r) + LOAD(b[at + i]);
        NAME(put)(y + at, z, size);
    }
}

/* y of `added_norm` again, from its s and stats */
void NAME(added_norm_again)(long rows, long width, const T *s, const T *w, const T *b, const float *stats, T *y, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++)
        NAME(normed)(width, s + row * width, w, b, stats[2 * row], stats[2 * row + 1], y + row * width);
}

/* s = drop(a) + x,  y = w (s - mean) r + b,  r = 1 / sqrt(var + eps), of the rounded s;  stats: (rows, 2) mean and r */
void NAME(added_norm)(long rows, long width, const T *a, const T *x, const T *w, const T *b, float eps,
                      const struct mask *mask, float scale, T *s, T *y, float *stats, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++) {
        const T *u = a + row * width, *v = x + row * width;
        T *to = s + row * width;
        float sum = 0.0f, squares = 0.0f;
        for (long at = 0; at < width; at += CHUNK) {
            float z[CHUNK] = {0};
            long size = width - at < CHUNK ? width - at : CHUNK;
            for (long i = 0; i < size; i++) z[i] = LOAD(u[at + i]);
            if (mask) drop(z, size, row, FIRST(mask, row) + WORD(at), mask, scale);
            for (long i = 0; i < size; i++) z[i] += LOAD(v[at + i]);
            NAME(put)(to + at, z, size);
            for (long i = 0; i < size; i++) sum += LOAD(to[at + i]);
        }
        float mean = sum / (float)width;
        for (long i = 0; i < width; i++) squares += (LOAD(to[i]) - mean) * (LOAD(to[i]) - mean);
        float r = 1.0f / sqrtf(squares / (float)width + eps);
        stats[2 * row] = mean;
        stats[2 * row + 1] = r;
        NAME(normed)(width, to, w, b, mean, r, y + row * width);
    }
}

/* dx = r (g - mean(g) - n mean(g n)),  g = w dy,  n = (s - mean) r;  da = drop(dx) */
void NAME(added_norm_backward)(long rows, long width, const T *s, const T *w, const float *stats, const T *dy,
                               const struct mask *mask, float scale, T *da, T *dx, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > SERIAL)
    for (long row = 0; row < rows; row++) {
        const T *from = s + row * width, *d = dy + row * width;
        float mean = stats[2 * row], r = stats[2 * row + 1], first = 0.0f, second = 0.0f;
        for (long i = 0; i < width; i++) {
            float g = LOAD(w[i]) * LOAD(d[i]);
            first += g;
            second += g * (LOAD(from[i]) - mean) * r;
        }
        first /= (float)width;
        second /= (float)width;
        for (long at = 0; at < width; at += CHUNK) {
            float z[CHUNK] = {0};
            long size = width - at < CHUNK ? width - at : CHUNK, to = row * width + at;
            for (long i = 0; i < size; i++)
                z[i] = r * (LOAD(w[at + i]) * LOAD(d[at + i]) - first - (LOAD(from[at + i]) - mean) * r * second);
            NAME(put)(dx + to, z, size);
            if (mask) drop(z, size, row, FIRST(mask, row) + WORD(at), mask, scale);
            NAME(put)(da + to, z, size);
        }
    }
}

/* --- rotary positions -------------------------------------------------------------------------------------------- */

/* y = x cos + rotate_half(x) sin, or its transpose (sign = -1).  x: (N, H, D) with strides; cos, sin: (N, D); y: (N, H, D) */
void NAME(rotate)(long tokens, long heads, long dim, const T *x, long token_stride, long head_stride, const T *cosine,
                  const T *sine, float sign, T *y, int threads)
{
    long half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * dim > SERIAL)
    for (long n = 0; n < tokens; n++) {
        float turned[dim];
        const T *c = cosine + n * dim, *s = sine + n * dim;
        for (long h = 0; h < heads; h++) {
            const T *a = x + n * token_stride + h * head_stride;
            if (sign > 0.0f)
                for (long i = 0; i < half; i++) {
                    float u = LOAD(a[i]), v = LOAD(a[i + half]);
                    turned[i] = u * LOAD(c[i]) - v * LOAD(s[i]);
                    turned[i + half] = v * LOAD(c[i + half]) + u * LOAD(s[i + half]);
                }
            else
                for (long i = 0; i < half; i++) {
                    float u = LOAD(a[i]), v = LOAD(a[i + half]);
                    turned[i] = u * LOAD(c[i]) + v * LOAD(s[i + half]);
                    turned[i + half] = v * LOAD(c[i + half]) - u * LOAD(s[i]);
                }
            NAME(put)(y + (n * heads + h) * dim, turned, dim);
        }
    }
}
