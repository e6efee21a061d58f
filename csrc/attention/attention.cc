/* rf_window_attention and rf_attention: arguments checked, a path chosen, one kernel launched. */
#include <math.h>
#include <stdio.h>

#include "launch.h"
#include "params.h"
#include "radio_fast.h"
#include "status.h"

namespace rf {
namespace {

constexpr int64_t MAX_BLOCKS = 2147483647;
constexpr int64_t MAX_SIZE = 1 << 30; /* of a side, a count or a row: products of two stay in 64 bits */
constexpr int HEAD_DIMS[] = {16, 32, 64, 72, 80, 96};

size_t bytes_of(rf_dtype dtype) { return dtype == RF_FLOAT32 ? 4 : 2; }

const char *name_of(rf_dtype dtype) {
    return dtype == RF_FLOAT16 ? "float16" : dtype == RF_BFLOAT16 ? "bfloat16" : "float32";
}

bool divisible(const void *pointer, size_t by) { return (uintptr_t)pointer % by == 0; }

/* What both entries check of q, k, v and the output. */
rf_status check_common(const void *qkv, const void *out, rf_dtype dtype, int64_t heads, int64_t d) {
    if (dtype != RF_FLOAT16 && dtype != RF_BFLOAT16 && dtype != RF_FLOAT32)
        return fail(RF_BAD_ARGUMENT, "dtype must be 0 (float16), 1 (bfloat16) or 2 (float32), got %d", (int)dtype);
    if (!divisible(qkv, bytes_of(dtype)))
        return fail(RF_BAD_ARGUMENT, "qkv must be aligned to its elements, %zu bytes", bytes_of(dtype));
    if (!divisible(out, 16)) return fail(RF_BAD_ARGUMENT, "out must be aligned to 16 bytes");
    if (heads < 1 || heads > 65535) return fail(RF_BAD_ARGUMENT, "heads must lie in 1…65535, got %lld", (long long)heads);
    for (int known : HEAD_DIMS)
        if (d == known) return RF_OK;
    return fail(RF_UNSUPPORTED, "head dim must be one of 16, 32, 64, 72, 80, 96, got %lld", (long long)d);
}

rf_status check_size(const char *name, int64_t value, int64_t least) {
    if (value >= least && value <= MAX_SIZE) return RF_OK;
    return fail(RF_BAD_ARGUMENT, "%s must lie in %lld…%lld, got %lld", name, (long long)least, (long long)MAX_SIZE,
                (long long)value);
}

/* Strides may be 0 (expanded tensors), never negative, which torch does not have. */
rf_status check_stride(const char *name, int64_t value) {
    if (value >= 0 && value < (int64_t)1 << 40) return RF_OK;
    return fail(RF_BAD_ARGUMENT, "%s must lie in 0…2^40, got %lld", name, (long long)value);
}

/* The path for a dtype: as asked for, else the newest that the device has. */
rf_status choose_path(rf_dtype dtype, int arch, const Device &device, int *path) {
    if (arch && arch != 70 && arch != 75 && arch != 80)
        return fail(RF_BAD_ARGUMENT, "arch must be 0, 70, 75 or 80, got %d", arch);
    if (device.arch < 70) return fail(RF_UNSUPPORTED, "kernels are for sm_70 and newer, this GPU is sm_%d", device.arch);
    const int newest = device.arch >= 80 ? 80 : device.arch >= 75 ? 75 : 70;
    *path = arch ? arch : newest;
    if (*path > newest) return fail(RF_UNSUPPORTED, "the path of sm_%d does not run on sm_%d", *path, device.arch);
    if (dtype == RF_BFLOAT16 && *path < 80)
        return fail(RF_UNSUPPORTED, "bfloat16 needs sm_80 or newer, the path is sm_%d's", *path);
    return RF_OK;
}

rf_status launch_attention(AttentionParams &p, rf_dtype dtype, int64_t images, int arch, void *stream) {
    if (!p.qkv) return fail(RF_BAD_ARGUMENT, "qkv is a null pointer");
    if (!p.out) return fail(RF_BAD_ARGUMENT, "out is a null pointer");
    Device device;
    int path = 0;
    if (rf_status status = current_device(&device)) return status;
    if (rf_status status = choose_path(dtype, arch, device, &path)) return status;
    p.tiles = (p.N + ROWS - 1) / ROWS;
    const int64_t heads = (int64_t)p.heads * p.tiles, all = images * p.windows;
    if (all > MAX_BLOCKS / heads)
        return fail(RF_BAD_ARGUMENT, "%lld windows or images of %lld blocks are more than a launch takes",
                    (long long)all, (long long)heads);
    p.scale = (float)(1.4426950408889634 / sqrt((double)p.head_dim));
    const size_t size = bytes_of(dtype);
    p.aligned = divisible(p.qkv, 16) && p.stride_b * size % 16 == 0 && p.stride_h * size % 16 == 0 &&
                p.stride_n * size % 16 == 0;
    p.bias_aligned = divisible(p.bias, 4) && p.stride_bias_head % 2 == 0 && p.stride_bias_row % 2 == 0;

    char source[8], kernel[32];
    Launch what = {source, kernel, (unsigned)(all * heads), THREADS, 0, stream};
    if (dtype == RF_FLOAT32) {
        snprintf(source, sizeof source, "plain");
        snprintf(kernel, sizeof kernel, "rf_plain_f32");
        what.shared = plain_shared_bytes_of(p.window);
    } else {
        const int dim = (p.head_dim + 15) / 16 * 16; /* 72 channels take 80's kernel, the last 8 zero */
        snprintf(source, sizeof source, "sm%d", path);
        snprintf(kernel, sizeof kernel, "rf_sm%d_%s_%d", path, dtype == RF_FLOAT16 ? "f16" : "bf16", dim);
        what.shared = shared_bytes_of(path, dim, p.window);
    }
    if ((int)what.shared > device.shared_memory)
        return fail(RF_UNSUPPORTED, "%s, head dim %d and window %d need %u bytes of shared memory, sm_%d has %d",
                    name_of(dtype), p.head_dim, p.window, what.shared, device.arch, device.shared_memory);
    return launch(what, &p, sizeof p);
}

}  // namespace
}  // namespace rf

using namespace rf;

#define RF_CHECK(call) \
    if (rf_status status = (call)) return status

rf_status rf_window_attention(
    const void *qkv, const void *bias, void *out, rf_dtype dtype, int64_t B, int64_t H, int64_t W, int64_t heads,
    int64_t d, int64_t k, int64_t stride_b, int64_t stride_h, int64_t stride_w, int64_t stride_bias_head,
    int64_t stride_bias_row, int arch, void *stream) {
    clear_error();
    RF_CHECK(check_common(qkv, out, dtype, heads, d));
    RF_CHECK(check_size("B", B, 0));
    RF_CHECK(check_size("H", H, 1));
    RF_CHECK(check_size("W", W, 1));
    if (k < 1 || k > MAX_WINDOW)
        return fail(RF_BAD_ARGUMENT, "window must lie in 1…%d, got %lld", MAX_WINDOW, (long long)k);
    if (k > 2 * H - 1 || k > 2 * W - 1)
        return fail(RF_BAD_ARGUMENT, "window %lld is too large for a map of %lld × %lld: reflection pads at most "
                    "H − 1 and W − 1 positions", (long long)k, (long long)H, (long long)W);
    RF_CHECK(check_stride("stride_b", stride_b));
    RF_CHECK(check_stride("stride_h", stride_h));
    RF_CHECK(check_stride("stride_w", stride_w));
    if (bias) {
        RF_CHECK(check_stride("stride_bias_head", stride_bias_head));
        RF_CHECK(check_stride("stride_bias_row", stride_bias_row));
        if (!divisible(bias, bytes_of(dtype))) return fail(RF_BAD_ARGUMENT, "bias must be aligned to its elements");
    }
    const int64_t across = (W + k - 1) / k, down = (H + k - 1) / k;
    if (across > MAX_BLOCKS / down) return fail(RF_BAD_ARGUMENT, "the map has too many windows");
    if (B == 0) return RF_OK;

    AttentionParams p = {};
    p.qkv = qkv;
    p.bias = bias;
    p.out = out;
    p.stride_b = stride_b;
    p.stride_h = stride_h;
    p.stride_n = stride_w;
    p.stride_bias_head = stride_bias_head;
    p.stride_bias_row = stride_bias_row;
    p.heads = (int32_t)heads;
    p.head_dim = (int32_t)d;
    p.window = (int32_t)k;
    p.H = (int32_t)H;
    p.W = (int32_t)W;
    p.across = (int32_t)across;
    p.windows = (int32_t)(across * down);
    p.N = (int32_t)(k * k);
    return launch_attention(p, dtype, B, arch, stream);
}

rf_status rf_attention(
    const void *qkv, const int32_t *cu_seqlens, void *out, rf_dtype dtype, int64_t images, int64_t N, int64_t tokens,
    int64_t heads, int64_t d, int64_t stride_b, int64_t stride_n, int arch, void *stream) {
    clear_error();
    RF_CHECK(check_common(qkv, out, dtype, heads, d));
    RF_CHECK(check_size("images", images, 0));
    RF_CHECK(check_size("N", N, 0));
    RF_CHECK(check_size("tokens", tokens, 0));
    RF_CHECK(check_stride("stride_n", stride_n));
    if (cu_seqlens)
        stride_b = 0;
    else
        RF_CHECK(check_stride("stride_b", stride_b));
    if (!divisible(cu_seqlens, 4)) return fail(RF_BAD_ARGUMENT, "cu_seqlens must be aligned to its elements, 4 bytes");
    if (images == 0 || N == 0) return RF_OK;

    AttentionParams p = {};
    p.qkv = qkv;
    p.cu_seqlens = cu_seqlens;
    p.out = out;
    p.stride_b = stride_b;
    p.stride_n = stride_n;
    p.heads = (int32_t)heads;
    p.head_dim = (int32_t)d;
    p.windows = 1;
    p.tokens = tokens;
    p.N = (int32_t)N;
    return launch_attention(p, dtype, images, arch, stream);
}
