/* Attention over the rows of an unpadded batch, each row alone: any lengths, any prefix, no padding (Dao et al. 2022).
   Included by kernels.c for each dtype T; E, PRODUCT and the packing functions belong to one kind of matrix product.

   For PIECE queries of one head at a time: scores = Q K^T, softmax, times V, all in the cache of one core. The backward pass
   computes the scores again; it needs only the logarithm of each row's sum of exponentials (log_sum).

       P = softmax(scaling q k^T + bias),  y = drop(P) v
       dv = drop(P)^T dy,  dS = P (drop(dy v^T) - rowsum(P drop(dy v^T))),  dq = scaling dS k,  dk = scaling dS^T q

   D is padded to a multiple of 32 with zeros, keys and queries likewise; a padded column has probability zero. */

/* m rows of D as the left operand: (m_padded, Dp) */
static void NAME(take)(E *restrict to, long padded, long Dp, const T *restrict from, long stride, long m, long D, float scale)
{
    for (long i = 0; i < m; i++) {
        E *line = to + i * Dp;
        const T *x = from + i * stride;
        if (scale == 1.0f && sizeof(E) == sizeof(T)) memcpy(line, x, sizeof(T) * D);
        else for (long d = 0; d < D; d++) line[d] = PACK(scale * LOAD(x[d]));
        for (long d = D; d < Dp; d++) line[d] = PACK(0.0f);
    }
    memset(to + m * Dp, 0, sizeof(E) * (padded - m) * Dp);
}

/* The prefix and then the keys (or values) of one row, laid out as a left operand: (Sp, Dp) */
static void NAME(take_keys)(E *to, long Sp, long Dp, const T *prefix, long P, const T *from, long stride, long m, long D)
{
    NAME(take)(to, P, Dp, prefix, D, P, D, 1.0f);
    NAME(take)(to + P * Dp, Sp - P, Dp, from, stride, m, D, 1.0f);
}

/* scores[i] <- scores[i] + bias, hidden outside [0, P) and [low, high) */
static inline void NAME(mask)(const struct rows *r, float *s, long t, long n, long P, long length, const float *bias)
{
    long low = P, high = P + length;
    if (r->causal && P + t + 1 < high) high = P + t + 1;
    if (r->window && P + t + r->window < high) high = P + t + r->window;
    if (r->window && t - r->window + 1 > 0) low = P + t - r->window + 1;
    if (bias) for (long j = 0; j < high; j++) s[j] += bias[j - P - t];
    for (long j = P; j < low && j < n; j++) s[j] = HIDDEN;
    for (long j = high; j < n; j++) s[j] = HIDDEN;
}

/* The number of columns, a multiple of 32, that PIECE queries from t on may see. */
static inline long NAME(columns)(const struct rows *r, long t, long P, long length)
{
    long n = P + length;
    if (r->causal && P + t + PIECE < n) n = P + t + PIECE;
    return ROUND(n);
}

void NAME(attention)(const struct rows *r, const T *q, const T *k, const T *v, T *y, float *log_sum, int threads)
{
    const long D = r->dim, Dp = ROUND(D), H = r->heads, G = H / r->kv_heads;
    const uint32_t threshold = r->mask.threshold;
    const float scale = r->scale;
#pragma omp parallel num_threads(threads) if (r->work * r->dim > 8 * SERIAL)
    {
        long most = r->most; /* columns of the longest row, a multiple of 32 */
        char *room = scratch(sizeof(E) * (most * Dp * 4 + PIECE * (Dp + most)) + sizeof(float) * PIECE * (most + Dp) + 4096);
        char *next = room;
        E *keys = CUT(E, most * Dp), *right = CUT(E, most * Dp), *values = CUT(E, most * Dp), *sums = CUT(E, most * Dp);
        float *s = CUT(float, PIECE * most), *out = CUT(float, PIECE * Dp);
        E *left = CUT(E, PIECE * Dp), *weights = PACKED(s, PIECE * most);
        BEGIN
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (long row = 0; row < r->rows; row++)
            for (long kv = 0; kv < r->kv_heads; kv++) {
                const long P = r->prefix_lengths[row], length = r->key_lengths[row], Sp = ROUND(P + length);
                const T *prefix_k = (const T *)r->prefix_keys[row], *prefix_v = (const T *)r->prefix_values[row];
                NAME(take_keys)(keys, Sp, Dp, prefix_k ? prefix_k + kv * P * D : 0, P,
                                k + r->key_starts[row] * r->k_token + kv * r->k_head, r->k_token, length, D);
                NAME(take_keys)(values, Sp, Dp, prefix_v ? prefix_v + kv * P * D : 0, P,
                                v + r->key_starts[row] * r->v_token + kv * r->v_head, r->v_token, length, D);
                RIGHT_OF_TRANSPOSED(right, keys, Sp, Dp);
                RIGHT_OF(sums, values, Sp, Dp);
                for (long h = kv * G; h < (kv + 1) * G; h++)
                    for (long t = 0; t < r->query_lengths[row]; t += PIECE) {
                        long m = r->query_lengths[row] - t < PIECE ? r->query_lengths[row] - t : PIECE;
                        long n = NAME(columns)(r, t, P, length), first = r->query_starts[row] + t;
                        NAME(take)(left, PIECE, Dp, q + first * r->q_token + h * r->q_head, r->q_token, m, D, r->scaling);
                        PRODUCT(s, most, left, Dp, right, Sp, PIECE, n, Dp, 0);
                        for (long i = 0; i < m; i++) {
                            float *p = s + i * most, high = HIDDEN, sum = 0.0f;
                            const float *bias = r->bias ? r->bias + h * r->bias_width + r->bias_zero : 0;
                            NAME(mask)(r, p, t + i, n, P, length, bias);
#pragma omp simd reduction(max : high)
                            for (long j = 0; j < n; j++) high = p[j] > high ? p[j] : high;
                            for (long j = 0; j < n; j++) sum += p[j] = exponential(p[j] - high);
                            log_sum[(first + i) * H + h] = high + logf(sum);
                            float by = scale / sum;
                            if (threshold) drop(p, n, first + i, FIRST(&r->mask, first + i) + OF_HEAD(h), &r->mask, by);
                            else
                                for (long j = 0; j < n; j++) p[j] *= by;
                            PACK_ROW(weights + i * most, p, n);
                        }
                        for (long i = m; i < PIECE; i++) memset(weights + i * most, 0, sizeof(E) * n);
                        PRODUCT(out, Dp, weights, most, sums, Dp, PIECE, Dp, n, 0);
                        for (long i = 0; i < m; i++) NAME(put)(y + ((first + i) * H + h) * D, out + i * Dp, D);
                    }
            }
        END_PRODUCTS
        free(room);
    }
}

/* dq: (N, H, D); dk, dv: (M, H_kv, D); dprefix: (rows, 2, H_kv, most_prefix, D) float, of rows with a prefix */
void NAME(attention_backward)(const struct rows *r, const T *q, const T *k, const T *v, const T *dy, const float *log_sum,
                              T *dq, T *dk, T *dv, float *dprefix, int threads)
{
    const long D = r->dim, Dp = ROUND(D), H = r->heads, K = r->kv_heads, G = H / K;
    const uint32_t threshold = r->mask.threshold;
    const float scale = r->scale;
#pragma omp parallel num_threads(threads) if (r->work * r->dim > 8 * SERIAL)
    {
        long most = r->most;
        char *room = scratch(sizeof(E) * (most * Dp * 5 + PIECE * (4 * Dp + 3 * most)) +
                             sizeof(float) * (2 * PIECE * most + 2 * most * Dp + PIECE * Dp) + 8192);
        char *next = room;
        E *keys = CUT(E, most * Dp), *values = CUT(E, most * Dp), *right = CUT(E, most * Dp);
        E *right_v = CUT(E, most * Dp), *sums = CUT(E, most * Dp);
        E *left = CUT(E, PIECE * Dp), *left_t = CUT(E, PIECE * Dp), *up = CUT(E, PIECE * Dp), *up_t = CUT(E, PIECE * Dp);
        float *s = CUT(float, PIECE * most), *g = CUT(float, PIECE * most), *out = CUT(float, PIECE * Dp);
        E *dS = PACKED(g, PIECE * most), *dS_right = PACKED(g, PIECE * most), *P_right = PACKED(s, PIECE * most);
        float *dkeys = CUT(float, most * Dp), *dvalues = CUT(float, most * Dp); /* transposed: (Dp, Sp) */
        BEGIN
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (long row = 0; row < r->rows; row++)
            for (long kv = 0; kv < K; kv++) {
                const long P = r->prefix_lengths[row], length = r->key_lengths[row], Sp = ROUND(P + length);
                const T *prefix_k = (const T *)r->prefix_keys[row], *prefix_v = (const T *)r->prefix_values[row];
                NAME(take_keys)(keys, Sp, Dp, prefix_k ? prefix_k + kv * P * D : 0, P,
                                k + r->key_starts[row] * r->k_token + kv * r->k_head, r->k_token, length, D);
                NAME(take_keys)(values, Sp, Dp, prefix_v ? prefix_v + kv * P * D : 0, P,
                                v + r->key_starts[row] * r->v_token + kv * r->v_head, r->v_token, length, D);
                RIGHT_OF_TRANSPOSED(right, keys, Sp, Dp);
                RIGHT_OF_TRANSPOSED(right_v, values, Sp, Dp);
                RIGHT_OF(sums, keys, Sp, Dp);
                memset(dkeys, 0, sizeof(float) * Sp * Dp);
                memset(dvalues, 0, sizeof(float) * Sp * Dp);
                for (long h = kv * G; h < (kv + 1) * G; h++)
                    for (long t = 0; t < r->query_lengths[row]; t += PIECE) {
                        long m = r->query_lengths[row] - t < PIECE ? r->query_lengths[row] - t : PIECE;
                        long n = NAME(columns)(r, t, P, length), first = r->query_starts[row] + t;
                        NAME(take)(left, PIECE, Dp, q + first * r->q_token + h * r->q_head, r->q_token, m, D, r->scaling);
                        NAME(take)(up, PIECE, Dp, dy + (first * H + h) * D, H * D, m, D, 1.0f);
                        TRANSPOSED(left_t, left, Dp);
                        TRANSPOSED(up_t, up, Dp);
                        PRODUCT(s, most, left, Dp, right, Sp, PIECE, n, Dp, 0);
                        PRODUCT(g, most, up, Dp, right_v, Sp, PIECE, n, Dp, 0);
                        for (long i = 0; i < PIECE; i++) {
                            float *p = s + i * most, *d = g + i * most, sum = 0.0f;
                            if (i >= m) {
                                memset(p, 0, sizeof(float) * n);
                                memset(d, 0, sizeof(float) * n);
                                PACK_ROW(dS + i * most, d, n);
                                continue;
                            }
                            const float *bias = r->bias ? r->bias + h * r->bias_width + r->bias_zero : 0;
                            float less = log_sum[(first + i) * H + h];
                            NAME(mask)(r, p, t + i, n, P, length, bias);
                            for (long j = 0; j < n; j++) p[j] = exponential(p[j] - less);
                            if (threshold) {
                                const uint32_t place = FIRST(&r->mask, first + i) + OF_HEAD(h), second = SECOND(&r->mask, first + i);
                                float sums[16] = {0};
                                for (long at = 0; at < n; at += 32)
#pragma omp simd
                                    for (long j = at; j < at + 16; j++) {
                                        uint32_t word = random_word(place + (uint32_t)(j - at / 2), second);
                                        uint32_t keep = every_bit((word & 0xffffu) >= threshold), kept = every_bit((word >> 16) >= threshold);
                                        float a = p[j], b = p[j + 16];
                                        d[j] = bits_of(d[j] * scale, keep, 0);
                                        d[j + 16] = bits_of(d[j + 16] * scale, kept, 0);
                                        p[j] = bits_of(a, ~0u, ~keep & SIGN); /* the sign marks dropped elements */
                                        p[j + 16] = bits_of(b, ~0u, ~kept & SIGN);
                                        sums[j - at] += a * d[j] + b * d[j + 16];
                                    }
                                for (int j = 0; j < 16; j++) sum += sums[j];
                                for (long j = 0; j < n; j++) {
                                    d[j] = fabsf(p[j]) * (d[j] - sum);
                                    p[j] = p[j] > 0.0f ? p[j] * scale : 0.0f;
                                }
                            } else {
                                for (long j = 0; j < n; j++) sum += p[j] * d[j];
                                for (long j = 0; j < n; j++) d[j] = p[j] * (d[j] - sum);
                            }
                            PACK_ROW(dS + i * most, d, n);
                        }
                        RIGHT_OF_FLOAT(P_right, s, most, n);
                        RIGHT_OF_FLOAT(dS_right, g, most, n);
                        PRODUCT(out, Dp, dS, most, sums, Dp, PIECE, Dp, n, 0);
                        PRODUCT(dvalues, Sp, up_t, PIECE, P_right, LINE(most, n), Dp, n, PIECE, 1);
                        PRODUCT(dkeys, Sp, left_t, PIECE, dS_right, LINE(most, n), Dp, n, PIECE, 1);
                        for (long i = 0; i < m * Dp; i++) out[i] *= r->scaling;
                        for (long i = 0; i < m; i++) NAME(put)(dq + ((first + i) * H + h) * D, out + i * Dp, D);
                    }
                const float *made[2] = {dkeys, dvalues};
                for (int side = 0; side < 2; side++)
                    for (long j = P / 16 * 16; j < P + length; j += 16) { /* 16 keys or values at a time */
                        transposed_words(out, Dp, made[side] + j, Sp, Dp, 16);
                        for (long i = j < P ? P - j : 0; i < 16 && j + i < P + length; i++)
                            NAME(put)((side ? dv : dk) + ((r->key_starts[row] + j + i - P) * K + kv) * D, out + i * Dp, D);
                    }
                float *back = dprefix + (row * 2 * K + kv) * r->most_prefix * D;
                for (long j = 0; j < P; j++)
                    for (long d = 0; d < D; d++) {
                        back[j * D + d] = dkeys[d * Sp + j];
                        back[K * r->most_prefix * D + j * D + d] = dvalues[d * Sp + j];
                    }
            }
        END_PRODUCTS
        free(room);
    }
}
