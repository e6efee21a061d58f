/* The C ABI of radio_fast's CPU kernels: raw pointers, sizes, strides, a number of threads. No torch.
 *
 * Every function returns RF_CPU_OK or another status; rf_cpu_last_error() then has the reason, for the calling thread.
 * Strides count elements. Sums are float32. Safe to call from several threads.
 */
#ifndef RADIO_FAST_CPU_H
#define RADIO_FAST_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RF_CPU_ABI_VERSION 5

#if defined(__GNUC__)
#define RF_CPU_API __attribute__((visibility("default")))
#else
#define RF_CPU_API
#endif

typedef enum {
    RF_CPU_OK = 0,
    RF_CPU_BAD_ARGUMENT = 1, /* a size, stride or pointer that no kernel takes */
    RF_CPU_UNSUPPORTED = 2,  /* the CPU has no AMX, or the system does not let a process use it */
    RF_CPU_NO_MEMORY = 3,
} rf_cpu_status;

typedef enum { RF_CPU_BFLOAT16 = 1, RF_CPU_FLOAT32 = 2 } rf_cpu_dtype;
typedef enum { RF_CPU_NONE = 0, RF_CPU_GELU = 1, RF_CPU_SWIGLU = 2 } rf_cpu_activation;

/* RF_CPU_ABI_VERSION of the library. */
RF_CPU_API int rf_cpu_abi_version(void);

/* Why the last call of this thread failed; "" after a success. Valid until the thread's next call. */
RF_CPU_API const char *rf_cpu_last_error(void);

/* What this CPU and system let the kernels use: "amx", or "" for nothing. The first call asks the system for AMX. */
RF_CPU_API const char *rf_cpu_features(void);

/* out = residual + act(x · weightᵀ + bias), in `dtype`.
 *
 * x: (M, K), weight: (N, K), residual: (M, N) or null, out: (M, N); values adjacent, stride_* from row to row.
 * weight: in `weight_dtype`: `dtype`, or beside bfloat16 float32, which is rounded as it is read. bias: (N) float32, or
 * null. act: one of rf_cpu_activation; the GELU is the exact one. In float32 infinities, and finite values that bfloat16
 * rounds to them, give NaN. SwiGLU: silu(a)·b, of a weight (2·N, K) and bias (2·N) the first half gives a, the second b;
 * there is then no residual. out overlaps nothing else, but in bfloat16 may be the residual.
 */
RF_CPU_API rf_cpu_status rf_cpu_linear(
    const void *x, const void *weight, const float *bias, const void *residual, void *out, int64_t M, int64_t N,
    int64_t K, int64_t stride_x, int64_t stride_w, int64_t stride_r, int64_t stride_o, int dtype, int weight_dtype,
    int activation, int threads);

/* out = residual + act((q · weightᵀ) · x_scales · scales + bias), in bfloat16, with 32-bit sums of whole numbers.
 *
 * q = round(x / x_scales), x_scales = max|x| / 127 of each row, made on the way; ties go to even. A row without values
 * of 2⁻¹⁰⁰ and more counts as zeros, of one with NaN or infinity all results are NaN.
 * weight: int8, 64-byte aligned, rearranged: zeros to ⌈N / 32⌉ · 32 rows and ⌈K / 64⌉ · 64 columns, and then the value of
 * row 32·p + 16·h + f, column 64·s + 4·r + j at [p][s][h][r][4·f + j]. scales: (N) float32. K: 1…131072.
 * The rest as for rf_cpu_linear.
 */
RF_CPU_API rf_cpu_status rf_cpu_linear_int8(
    const void *x, const int8_t *weight, const float *scales, const float *bias, const void *residual, void *out,
    int64_t M, int64_t N, int64_t K, int64_t stride_x, int64_t stride_r, int64_t stride_o, int activation, int threads);

/* out = scale · ((s − mean) / √(var + eps) · weight + bias) of each row of s = x + y, which is kept in `sum`, rounded.
 *
 * x, y: (rows, D), values adjacent, stride_* from row to row; y and sum may both be null: then s = x.
 * weight, bias (or null): (D), in `weight_dtype`: `dtype`, or float32, then rounded to it. sum, out: (rows, D),
 * contiguous. All else in `dtype`, the arithmetic is float32.
 */
RF_CPU_API rf_cpu_status rf_cpu_layer_norm(
    const void *x, const void *y, const void *weight, const void *bias, void *sum, void *out, int dtype, int weight_dtype,
    int64_t rows, int64_t D, int64_t stride_x, int64_t stride_y, float eps, float scale, int threads);

/* softmax(q·kᵀ / √d + bias)·v for each head of each image, all in `dtype`.
 *
 * qkv: (images, N, 3·heads·d), channels ordered (q, k, v) × heads × d, adjacent; out: (images, N, heads·d), contiguous.
 * cu_seqlens: null; or images + 1 numbers, where each packed image begins among `tokens` rows: qkv is then
 * (tokens, 3·heads·d), out (tokens, heads·d), N and stride_b unused. Wrong numbers touch no other memory.
 * window: 0; or the N tokens are a grid, `width` of them a row, and attend inside window × window.
 * bias: null; or, with a window, (heads, window², window²), query by key, contiguous.
 * d: a multiple of 8, up to 256.
 */
RF_CPU_API rf_cpu_status rf_cpu_attention(
    const void *qkv, const int32_t *cu_seqlens, const void *bias, void *out, int dtype, int64_t images, int64_t N,
    int64_t tokens, int64_t heads, int64_t d, int64_t stride_b, int64_t stride_n, int64_t width, int64_t window,
    int threads);

/* A weight (out, in) and a bias, (out) float32 or null; or a LayerNorm's, (D) each, with its eps and scale.
 * scales: null, or the weight is rf_cpu_linear_int8's, and these are its scales. */
typedef struct {
    const void *weight, *bias;
    const float *scales;
} rf_cpu_layer;
typedef struct {
    const void *weight, *bias;
    double eps, scale;
} rf_cpu_norm;

/* A transformer block in `dtype`, and the next one's first norm:
 *     s = x + proj(attention(qkv(norm1(x)))),  out = s + fc2(act(fc1(norm2(s)))),  out_normed = after(out).
 *
 * x, out, normed, out_normed: (images, N, D), contiguous; out may be x; normed and out_normed may be one, and lie where the
 * workspace begins; they overlap nothing else. normed: norm1(x) if it is known, else null. out_normed: or null.
 * workspace: of the caller, images · N · (max(3 · D, hidden) + D) values, in float32 D more of them a token.
 * Weights but int8's (beside bfloat16 only), and the norms' parameters, in `weight_dtype`, as rf_cpu_linear takes it,
 * contiguous. activation: of fc1, one of rf_cpu_activation.
 * width, window: as for rf_cpu_attention. cu_seqlens: null; or images + 1 numbers, where each packed image begins, 0 to N:
 * x has N rows then. Every value is what the functions above give.
 */
typedef struct {
    const void *x, *normed;
    void *out, *out_normed, *workspace;
    const int32_t *cu_seqlens;
    rf_cpu_norm norm1, norm2, after;
    rf_cpu_layer qkv, proj, fc1, fc2;
    int64_t images, N, D, heads, hidden, width, window, activation, dtype, weight_dtype, threads;
} rf_cpu_block_arguments;

/* `count` blocks one after another, up to the first that fails. */
RF_CPU_API rf_cpu_status rf_cpu_blocks(const rf_cpu_block_arguments *blocks, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
