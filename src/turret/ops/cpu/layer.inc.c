/* Several whole layers in one call, for passes of few tokens, where Python between the products takes longer than they do. Included
   by kernels.c for each dtype, after step.inc.c. A layer calls the kernels that its modules call, in the same order and with the
   same roundings, so results are bit-equal. `room` is the workspace; if it is 0, the call computes nothing and returns the bytes
   that it needs. y may be x. */

/* y = x + a */
static void NAME(sum)(long n, const T *x, const T *a, T *to, int threads)
{
    EACH(n)
        y[i] = LOAD(x[at + i]) + LOAD(a[at + i]);
    DONE
        NAME(put)(to + at, y, size);
    END
}

/* A layer of a gated decoder (Llama, Mistral, Qwen) on one new token of each row. x, y: (N, D); cosine, sine: (N, head size).
   `parts`: the `count` blocks of the KV cache that hold the rows, in order.

     h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
     y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h) */
static long NAME(decoder_layer)(const struct decoder_layer *l, long tokens, const T *x,
                                const T *cosine, const T *sine, const struct spans *spans, long count,
                                const struct part *parts, T *y, void *room, int threads)
{
    long width = l->q.d_in, inner = l->up.d_out, dim = l->dim, heads = l->q.d_out / dim, kv_heads = l->k.d_out / dim;
    char *start = room ? room : (void *)64, *next = start; /* any address but 0, to count the bytes */
    float *r = CUT(float, tokens * heads);
    T *normed = CUT(T, tokens * width), *added = CUT(T, tokens * width), *h = CUT(T, tokens * width);
    T *q = CUT(T, tokens * heads * dim), *turned_q = CUT(T, tokens * heads * dim), *seen = CUT(T, tokens * heads * dim);
    T *k = CUT(T, tokens * kv_heads * dim), *turned_k = CUT(T, tokens * kv_heads * dim), *v = CUT(T, tokens * kv_heads * dim);
    T *gate = CUT(T, tokens * inner), *up = CUT(T, tokens * inner), *both = CUT(T, tokens * inner);
    if (!room) return next - start;
    struct NAME(products) in = {3, {&l->q, &l->k, &l->v}, {q, k, v}}, out = {1, {&l->o}, {added}};
    struct NAME(products) wider = {2, {&l->gate, &l->up}, {gate, up}}, down = {1, {&l->down}, {added}};

    NAME(rms_norm)(tokens, width, x, l->norm, l->eps, normed, r, threads);
    NAME(multiply)(&in, normed, tokens, spans, threads);
    if (l->q_norm) NAME(rms_norm)(tokens * heads, dim, q, l->q_norm, l->eps, q, r, threads);
    if (l->k_norm) NAME(rms_norm)(tokens * kv_heads, dim, k, l->k_norm, l->eps, k, r, threads);
    NAME(rotate)(tokens, heads, dim, q, heads * dim, dim, cosine, sine, 1.0f, turned_q, threads);
    NAME(rotate)(tokens, kv_heads, dim, k, kv_heads * dim, dim, cosine, sine, 1.0f, turned_k, threads);
    for (long i = 0, from = 0; i < count; from += parts[i].cached->rows, i++) {
        const struct part *p = parts + i;
        NAME(keep_step)(p->cached, turned_k + from * kv_heads * dim, v + from * kv_heads * dim, kv_heads * dim, dim, p->keys, p->values);
        NAME(attend_step)(p->cached, turned_q + from * heads * dim, heads * dim, dim, heads, p->keys, p->values, l->scaling, l->window,
                          seen + from * heads * dim, threads);
    }
    NAME(multiply)(&out, seen, tokens, spans, threads);
    NAME(sum)(tokens * width, x, added, h, threads);

    NAME(rms_norm)(tokens, width, h, l->norm_after, l->eps_after, normed, r, threads);
    NAME(multiply)(&wider, normed, tokens, spans, threads);
    NAME(swiglu)(tokens * inner, gate, up, both, threads);
    NAME(multiply)(&down, both, tokens, spans, threads);
    NAME(sum)(tokens * width, h, added, y, threads);
    return 0;
}

/* The body of a function that calls ONE for each of `layers` consecutive layers: y of one is x of the next */
#define ALL_LAYERS(ONE) \
    long most = 0; \
    if (room) wake(threads); /* or a helper that slept may share this thread's processor for the whole call */ \
    for (long i = 0; i < layers; i++, x = y) { \
        long bytes = ONE; \
        most = bytes > most ? bytes : most; \
    } \
    return most;

/* parts: `count` for each layer */
long NAME(decoder_layers)(const struct decoder_layer *const *l, long layers, long tokens, const T *x, const T *cosine, const T *sine,
                          const struct spans *spans, long count, const struct part *parts, T *y, void *room, int threads)
{
    ALL_LAYERS(NAME(decoder_layer)(l[i], tokens, x, cosine, sine, spans, count, parts + i * count, y, room, threads))
}

/* y = LayerNorm(a + x) */
static void NAME(normed_sum)(const struct layer_norm *norm, long tokens, long width, const T *a, const T *x, T *sum, T *y, float *stats, int threads)
{
    NAME(added_norm)(tokens, width, a, x, norm->weight, norm->bias, norm->eps, 0, 1.0f, sum, y, stats, threads);
}

/* A layer of an encoder (BERT, RoBERTa) on all tokens of a pass, without dropout. x, y: (N, D)

     h = norm(W_o attention(W_q x, W_k x, W_v x) + x),    y = norm(W_down gelu(W_up h) + h) */
static long NAME(encoder_layer)(const struct encoder_layer *l, const struct rows *rows, long tokens, const T *x, const struct spans *spans, T *y,
                         void *room, int threads)
{
    long width = l->q.d_in, inner = l->up.d_out, all = l->q.d_out;
    char *start = room ? room : (void *)64, *next = start; /* any address but 0, to count the bytes */
    float *log_sum = CUT(float, tokens * rows->heads), *stats = CUT(float, 2 * tokens);
    T *q = CUT(T, tokens * all), *k = CUT(T, tokens * all), *v = CUT(T, tokens * all), *seen = CUT(T, tokens * all);
    T *added = CUT(T, tokens * width), *sum = CUT(T, tokens * width), *h = CUT(T, tokens * width);
    T *up = CUT(T, tokens * inner), *active = CUT(T, tokens * inner);
    if (!room) return next - start;
    struct NAME(products) in = {3, {&l->q, &l->k, &l->v}, {q, k, v}}, out = {1, {&l->o}, {added}};
    struct NAME(products) wider = {1, {&l->up}, {up}}, down = {1, {&l->down}, {added}};

    NAME(multiply)(&in, x, tokens, spans, threads);
    NAME(attention)(rows, q, k, v, seen, log_sum, threads);
    NAME(multiply)(&out, seen, tokens, spans, threads);
    NAME(normed_sum)(&l->norm, tokens, width, added, x, sum, h, stats, threads);
    NAME(multiply)(&wider, h, tokens, spans, threads);
    NAME(gelu)(tokens * inner, up, active, threads);
    NAME(multiply)(&down, active, tokens, spans, threads);
    NAME(normed_sum)(&l->norm_after, tokens, width, added, h, sum, y, stats, threads);
    return 0;
}

/* rows: one struct for each layer */
long NAME(encoder_layers)(const struct encoder_layer *const *l, const struct rows *const *rows, long layers, long tokens, const T *x,
                          const struct spans *spans, T *y, void *room, int threads)
{
    ALL_LAYERS(NAME(encoder_layer)(l[i], rows[i], tokens, x, spans, y, room, threads))
}
#undef ALL_LAYERS
