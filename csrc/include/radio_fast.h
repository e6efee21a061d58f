/* The C ABI of radio_fast's CUDA kernels: raw pointers, sizes, strides, a stream. No torch, no CUDA headers.
 *
 * Every function returns RF_OK or another status; rf_last_error() then has the reason, for the calling thread. All
 * pointers but the text's are device pointers of the current CUDA context; kernels are launched on `stream` (a CUstream,
 * which is what a cudaStream_t is) and not waited for. Strides count elements.
 */
#ifndef RADIO_FAST_H
#define RADIO_FAST_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RF_ABI_VERSION 1

#if defined(__GNUC__)
#define RF_API __attribute__((visibility("default")))
#else
#define RF_API
#endif

typedef enum {
    RF_OK = 0,
    RF_BAD_ARGUMENT = 1, /* a size, stride, dtype or pointer that no kernel takes */
    RF_UNSUPPORTED = 2,  /* no kernel for this architecture, dtype or head dimension */
    RF_DRIVER = 3,       /* the CUDA driver is missing or refused */
} rf_status;

typedef enum { RF_FLOAT16 = 0, RF_BFLOAT16 = 1, RF_FLOAT32 = 2 } rf_dtype;

/* RF_ABI_VERSION of the library. */
RF_API int rf_abi_version(void);

/* Why the last call of this thread failed; "" after a success. Valid until the thread's next call. */
RF_API const char *rf_last_error(void);

/* The architectures that kernels are in the library for: "70 75 80 …", in ascending order. */
RF_API const char *rf_architectures(void);

/* softmax(q·kᵀ / √d + bias)·v for each head, among the positions of each k × k window of a feature map.
 *
 * Windows that reach past the right or bottom edge see the map continued by reflection (position W + i is W − 2 − i).
 *
 * qkv: (B, H, W, 3·heads·d), channels ordered (q, k, v) × heads × d, adjacent; other strides free.
 * bias: (heads, k², k²), query by key, rows adjacent, in qkv's dtype; or null.
 * out: (B, H, W, heads·d), contiguous.
 * d: 16, 32, 64, 72, 80 or 96. k: 1…32, at most 2·H − 1 and 2·W − 1.
 * arch: 0, or the path to take (70, 75, 80), none newer than the GPU.
 */
RF_API rf_status rf_window_attention(
    const void *qkv, const void *bias, void *out, rf_dtype dtype, int64_t B, int64_t H, int64_t W, int64_t heads,
    int64_t d, int64_t k, int64_t stride_b, int64_t stride_h, int64_t stride_w, int64_t stride_bias_head,
    int64_t stride_bias_row, int arch, void *stream);

/* softmax(q·kᵀ / √d)·v for each head of each image.
 *
 * qkv: (images, N, 3·heads·d), as above; out: (images, N, heads·d), contiguous.
 * tokens: rows that qkv has in all, images · N unless packed; nothing outside them is read or written, whatever
 * cu_seqlens says.
 * cu_seqlens: null; or images + 1 int32 on the device, where each packed image begins: qkv is then (tokens, 3·heads·d),
 * out (tokens, heads·d), N the longest image's tokens (what a longer one has beyond, rounded up to 64, is not written),
 * stride_b unused.
 * d: 16, 32, 64, 72, 80 or 96.
 */
RF_API rf_status rf_attention(
    const void *qkv, const int32_t *cu_seqlens, void *out, rf_dtype dtype, int64_t images, int64_t N, int64_t tokens,
    int64_t heads, int64_t d, int64_t stride_b, int64_t stride_n, int arch, void *stream);

#ifdef __cplusplus
}
#endif
#endif
