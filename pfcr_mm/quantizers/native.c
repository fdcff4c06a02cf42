/* Values and gradients of quantizers, in one pass over strided float tensors.

   `native.py` calls this; `eager.py` has the same as operations of PyTorch. A tensor has four axes,
   the last without gaps. Scales have a stride of 0 along axes that share one; along the last axis 0
   or 1. `keep` is 0 where a number stays as it is (QDrop), or no pointer.

   Rounding is that of the same operations one by one (compile with -ffp-contract=off), and sums run
   in LANES lanes whatever the width of the processor's vectors. Loops are written so that the
   compiler finds vectors in them. */
#include <math.h>
#include <stdint.h>

#define LANES 64
#define CHUNK 4096   /* numbers summed in float before they go to a double */
#define FEW 32       /* levels that are compared with one after the other */
#define AHEAD 768    /* how far memory is asked for what will be needed */
#define TINY 1e-30f  /* what is less is zero, see eager.py */

/* Each loop for several generations of vector units; one is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTORS
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define PREFETCH __builtin_prefetch
#else
#define PREFETCH(address) (void)(address)
#define INLINE static inline
#define ALIGNED
#endif

typedef const float *restrict input;
typedef const uint8_t *restrict flags;
typedef float *restrict output;
typedef int64_t size[4];

/* `native.py` looks for the version of the functions' arguments that it knows. */
void pfcr_version_1(void) {}

/* ---- sums ------------------------------------------------------------------------------- */

/* What is summed for one scale. */
typedef struct {
    ALIGNED float lanes[LANES];
    int64_t count;
} Sum;

INLINE void clear(Sum *sum)
{
    for (int j = 0; j < LANES; j++)
        sum->lanes[j] = 0;
    sum->count = 0;
}

INLINE void flush(Sum *sum, double *total)
{
    double found = 0;
    for (int j = 0; j < LANES; j++)
        found += sum->lanes[j];
    *total += found;
    clear(sum);
}

/* ---- uniform ---------------------------------------------------------------------------- */

INLINE float clamp(float v, float low, float high)
{
    v = low > v ? low : v; /* NaN stays */
    return high < v ? high : v;
}

INLINE void uniform_values(
    input x, flags keep, output out, int n, float scale, float zero, float low, float high)
{
    for (int j = 0; j < n; j++) {
        const float v = x[j], value = clamp(rintf(v / scale), low - zero, high - zero) * scale;
        out[j] = !keep || keep[j] ? value : v;
    }
}

INLINE void uniform_values_each(
    input x, flags keep, output out, int64_t n, input scale, input zero, float low, float high)
{
    for (int64_t j = 0; j < n; j++) {
        const float v = x[j], s = scale[j], z = zero[j];
        const float value = clamp(rintf(v / s), low - z, high - z) * s;
        out[j] = !keep || keep[j] ? value : v;
    }
}

/* grad where the code is not clipped, else 0; for the scale, grad * values less that times x.
   Values are computed anew, which takes less time than to fetch them. */
INLINE void uniform_gradients(
    input grad, input x, flags keep, output out, output lanes, int n, float scale, float zero,
    float low, float high)
{
    const float from = ((double)low - 0.5 - zero) * scale, to = ((double)high + 0.5 - zero) * scale;
    for (int j = 0; j < n; j++) {
        const float g = grad[j], v = x[j];
        const float value = clamp(rintf(v / scale), low - zero, high - zero) * scale;
        const float inside = (v > from) & (v < to) ? g : 0.0f;
        const float counts = g * value - inside * v;
        const int kept = !keep || keep[j];
        if (out)
            out[j] = kept ? inside : g;
        lanes[j] += kept ? counts : 0.0f;
    }
}

INLINE void uniform_gradients_each(
    input grad, input x, flags keep, output out, double *restrict total, int64_t n, input scale,
    input zero, float low, float high)
{
    for (int64_t j = 0; j < n; j++) {
        const float g = grad[j], v = x[j], s = scale[j], z = zero[j];
        const float value = clamp(rintf(v / s), low - z, high - z) * s;
        const float inside = (v > (low - 0.5f - z) * s) & (v < (high + 0.5f - z) * s) ? g : 0.0f;
        const float counts = g * value - inside * v;
        const int kept = !keep || keep[j];
        if (out)
            out[j] = kept ? inside : g;
        total[j] += kept ? counts : 0.0f;
    }
}

/* ---- logarithmic ------------------------------------------------------------------------ */

/* The level behind all of the descending borders that x + shift does not exceed. */
INLINE void log_values_few(
    input x, flags keep, output out, int n, input borders, input levels, int64_t count, float shift)
{
    ALIGNED float shifted[LANES], found[LANES];
    for (int j = 0; j < n; j++) {
        shifted[j] = x[j] + shift;
        found[j] = levels[0];
    }
    for (int64_t k = 1; k < count; k++) {
        const float border = borders[k - 1], level = levels[k];
        for (int j = 0; j < n; j++)
            found[j] = shifted[j] <= border ? level : found[j];
    }
    for (int j = 0; j < n; j++) {
        const float v = x[j], value = shifted[j] == shifted[j] ? found[j] : shifted[j];
        out[j] = !keep || keep[j] ? value : v;
    }
}

INLINE void log_values_many(
    input x, flags keep, output out, int64_t n, int64_t step, input borders, input levels,
    int64_t count, float shift)
{
    for (int64_t i = 0; i < n; i++) {
        input border = borders + i * step * (count - 1);
        const float v = x[i] + shift;
        int64_t code = 0;
        for (int64_t half = count / 2; half; half /= 2)
            code += v <= border[code + half - 1] ? half : 0;
        const float value = v == v ? levels[i * step * count + code] : v;
        out[i] = !keep || keep[i] ? value : x[i];
    }
}

/* grad * values / x where low < x < high, else 0, all shifted; for the scale, what else is in
   grad * values. */
INLINE void log_gradients(
    input grad, input x, flags keep, input values, output out, output lanes, int n, float low,
    float high, float shift)
{
    for (int j = 0; j < n; j++) {
        const float v = x[j] + shift < TINY ? TINY : x[j] + shift;
        const float g = grad[j], product = (values[j] + shift) * g;
        const float inside = (v > low) & (v < high) ? product : 0.0f;
        const float passed = inside / v, counts = product - inside;
        const int kept = !keep || keep[j];
        if (out)
            out[j] = kept ? passed : g;
        lanes[j] += kept ? counts : 0.0f;
    }
}

INLINE void log_gradients_each(
    input grad, input x, flags keep, input values, output out, double *restrict total, int64_t n,
    input low, input high, float shift)
{
    for (int64_t j = 0; j < n; j++) {
        const float v = x[j] + shift < TINY ? TINY : x[j] + shift;
        const float g = grad[j], product = (values[j] + shift) * g;
        const float inside = (v > low[j]) & (v < high[j]) ? product : 0.0f;
        const float passed = inside / v, counts = product - inside;
        const int kept = !keep || keep[j];
        if (out)
            out[j] = kept ? passed : g;
        total[j] += kept ? counts : 0.0f;
    }
}

/* ---- all rows --------------------------------------------------------------------------- */

#define AT(stride) (a * stride[0] + b * stride[1] + c * stride[2])
#define ROWS                                  \
    for (int64_t a = 0; a < n[0]; a++)        \
        for (int64_t b = 0; b < n[1]; b++)    \
            for (int64_t c = 0; c < n[2]; c++)

/* Ask for what a stream will need: the processor itself does not look beyond a page. */
INLINE void ahead(const float *p)
{
    for (int line = 0; line < LANES / 16; line++)
        PREFETCH(p + AHEAD + 16 * line);
}

/* `CALL(i, m, k)` for m numbers of a row from i on, m = LANES but at its end. With and without
   flags `k` are loops of their own, so that the compiler knows which it is. */
#define PARTS(CALL)                       \
    if (k) {                              \
        PARTS_OF(CALL, k + i)             \
    } else {                              \
        PARTS_OF(CALL, 0)                 \
    }
#define PARTS_OF(CALL, k)                 \
    int64_t i = 0;                        \
    for (; i + LANES <= n[3]; i += LANES) \
        CALL(i, LANES, k)                 \
    if (i < n[3])                         \
        CALL(i, (int)(n[3] - i), k)

/* Sum the rows that share a scale: until it changes, or the sum is long. */
#define SUMMED(CALL)                      \
    PARTS(CALL)                           \
    if (by_scale[2] || c + 1 == n[2])     \
        flush(&sum, total + AT(by_scale));

VECTORS void pfcr_uniform_values(
    const size n, const size by_x, const size by_keep, const size by_out, const size by_scale,
    const float *x, const uint8_t *keep, float *out, const float *scale, const float *zero,
    float low, float high)
{
    ROWS {
        const uint8_t *k = keep ? keep + AT(by_keep) : 0;
        const float *x_ = x + AT(by_x), *s = scale + AT(by_scale), *z = zero + AT(by_scale);
        float *o = out + AT(by_out);
        if (by_scale[3]) {
            uniform_values_each(x_, k, o, n[3], s, z, low, high);
            continue;
        }
#define CALL(i, m, k)                                                     \
    {                                                                     \
        ahead(x_ + i), ahead(o + i);                                      \
        uniform_values(x_ + i, k, o + i, m, *s, *z, low, high);           \
    }
        PARTS(CALL)
#undef CALL
    }
}

VECTORS void pfcr_uniform_gradients(
    const size n, const size by_grad, const size by_x, const size by_keep, const size by_out,
    const size by_scale, const float *grad, const float *x, const uint8_t *keep, float *out,
    const float *scale, const float *zero, double *total, float low, float high)
{
    Sum sum;
    clear(&sum);
    ROWS {
        const uint8_t *k = keep ? keep + AT(by_keep) : 0;
        const float *g = grad + AT(by_grad), *x_ = x + AT(by_x);
        const float *s = scale + AT(by_scale), *z = zero + AT(by_scale);
        float *o = out ? out + AT(by_out) : 0;
        double *t = total + AT(by_scale);
        if (by_scale[3]) {
            uniform_gradients_each(g, x_, k, o, t, n[3], s, z, low, high);
            continue;
        }
#define CALL(i, m, k)                                                     \
    {                                                                     \
        ahead(g + i), ahead(x_ + i), ahead(o + i);                        \
        if (o)                                                            \
            uniform_gradients(g + i, x_ + i, k, o + i, sum.lanes, m, *s, *z, low, high); \
        else                                                              \
            uniform_gradients(g + i, x_ + i, k, 0, sum.lanes, m, *s, *z, low, high);     \
        if ((sum.count += m) >= CHUNK)                                    \
            flush(&sum, t);                                               \
    }
        SUMMED(CALL)
#undef CALL
    }
}

VECTORS void pfcr_log_values(
    const size n, const size by_x, const size by_keep, const size by_out, const size by_scale,
    const float *x, const uint8_t *keep, float *out, const float *borders, const float *levels,
    float levels_each, float shift)
{
    const int64_t count = levels_each;
    ROWS {
        const uint8_t *k = keep ? keep + AT(by_keep) : 0;
        const float *x_ = x + AT(by_x);
        const float *border = borders + (count - 1) * AT(by_scale);
        const float *level = levels + count * AT(by_scale);
        float *o = out + AT(by_out);
        if (by_scale[3] || count > FEW) {
            log_values_many(x_, k, o, n[3], by_scale[3], border, level, count, shift);
            continue;
        }
#define CALL(i, m, k)                                                     \
    {                                                                     \
        ahead(x_ + i), ahead(o + i);                                      \
        log_values_few(x_ + i, k, o + i, m, border, level, count, shift); \
    }
        PARTS(CALL)
#undef CALL
    }
}

VECTORS void pfcr_log_gradients(
    const size n, const size by_grad, const size by_x, const size by_keep, const size by_out,
    const size by_scale, const float *grad, const float *x, const uint8_t *keep,
    const float *values, float *out, const float *low, const float *high, double *total,
    float shift)
{
    Sum sum;
    clear(&sum);
    ROWS {
        const uint8_t *k = keep ? keep + AT(by_keep) : 0;
        const float *g = grad + AT(by_grad), *x_ = x + AT(by_x), *v = values + AT(by_out);
        const float *from = low + AT(by_scale), *to = high + AT(by_scale);
        float *o = out ? out + AT(by_out) : 0;
        double *t = total + AT(by_scale);
        if (by_scale[3]) {
            log_gradients_each(g, x_, k, v, o, t, n[3], from, to, shift);
            continue;
        }
#define CALL(i, m, k)                                                     \
    {                                                                     \
        ahead(g + i), ahead(x_ + i), ahead(v + i), ahead(o + i);          \
        if (o)                                                            \
            log_gradients(g + i, x_ + i, k, v + i, o + i, sum.lanes, m, *from, *to, shift); \
        else                                                              \
            log_gradients(g + i, x_ + i, k, v + i, 0, sum.lanes, m, *from, *to, shift);     \
        if ((sum.count += m) >= CHUNK)                                    \
            flush(&sum, t);                                               \
    }
        SUMMED(CALL)
#undef CALL
    }
}
