/* A library as csrc's, with an images table of its own and entries that keep what they are given. As the emulation
 * (-DEMULATION), or with csrc's driver.cc. */
#include <stdint.h>

#include "images.h"
#include "launch.h"
#include "status.h"

extern "C" {
RF_API int64_t probe_seen[20];
RF_API int probe_status;
}

template <class... T> static rf_status keep(T... values) {
    const int64_t given[] = {(int64_t)(values)...};
    for (unsigned i = 0; i < sizeof...(values); ++i) probe_seen[i] = given[i];
    rf::clear_error();
    return probe_status ? rf::fail((rf_status)probe_status, "status %d on purpose", probe_status) : RF_OK;
}

rf_status rf_window_attention(
    const void *qkv, const void *bias, void *out, rf_dtype dtype, int64_t B, int64_t H, int64_t W, int64_t heads,
    int64_t d, int64_t k, int64_t stride_b, int64_t stride_h, int64_t stride_w, int64_t stride_bias_head,
    int64_t stride_bias_row, int arch, void *stream) {
    return keep(qkv, bias, out, dtype, B, H, W, heads, d, k, stride_b, stride_h, stride_w, stride_bias_head,
                stride_bias_row, arch, stream);
}

rf_status rf_attention(
    const void *qkv, const int32_t *cu_seqlens, void *out, rf_dtype dtype, int64_t images, int64_t N, int64_t tokens,
    int64_t heads, int64_t d, int64_t stride_b, int64_t stride_n, int arch, void *stream) {
    return keep(qkv, cu_seqlens, out, dtype, images, N, tokens, heads, d, stride_b, stride_n, arch, stream);
}

#ifdef EMULATION
const char *rf_architectures(void) { return "emulation"; }
#else
#define DATA(text) reinterpret_cast<const unsigned char *>(text)
const rf::Image rf::images[] = {
    {"plain", 70, DATA("plain-70")}, {"plain", 80, DATA("plain-80")}, {"plain", 90, DATA("plain-90")},
    {"sm80", 80, DATA("sm80-80")},   {"sm80", 86, DATA("sm80-86")},   {"sm80", 89, DATA("sm80-89")},
    {"sm80", 100, DATA("sm80-100")},
    {nullptr, 0, nullptr},
};

extern "C" RF_API rf_status probe_launch(const char *source, const char *kernel, unsigned shared, int parameter) {
    rf::clear_error();
    return rf::launch({source, kernel, 7, 128, shared, (void *)0x5}, &parameter, sizeof parameter);
}

extern "C" RF_API rf_status probe_device(int *arch, int *shared) {
    rf::Device device = {};
    rf::clear_error();
    rf_status status = rf::current_device(&device);
    *arch = device.arch, *shared = device.shared_memory;
    return status;
}
#endif
