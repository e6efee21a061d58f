/* Transformer blocks in one call: between seven of one the caller's own work finds the caches full of weights. */
#include "cpu.h"

namespace rf {
namespace {

bool covers(const int32_t *starts, int64_t images, int64_t tokens) {
    for (int64_t i = 0; i < images; i++)
        if (starts[i] > starts[i + 1]) return false;
    return starts[0] == 0 && starts[images] == tokens;
}

rf_cpu_status run(const rf_cpu_block_arguments &b) {
    if (b.images < 0 || b.N < 0 || b.heads < 1 || b.D < 1 || b.D % b.heads || b.hidden < 1)
        return fail(RF_CPU_BAD_ARGUMENT, "%lld heads do not divide D = %lld", (long long)b.heads, (long long)b.D);
    if (b.cu_seqlens && !covers(b.cu_seqlens, b.images, b.N))
        return fail(RF_CPU_BAD_ARGUMENT, "cu_seqlens must ascend from 0 to %lld", (long long)b.N);
    const int64_t rows = b.cu_seqlens ? b.N : b.images * b.N, D = b.D;
    if (b.dtype != RF_CPU_BFLOAT16 && b.dtype != RF_CPU_FLOAT32)
        return fail(RF_CPU_BAD_ARGUMENT, "no dtype %lld", (long long)b.dtype);
    const int dtype = static_cast<int>(b.dtype), weights = static_cast<int>(b.weight_dtype), threads = static_cast<int>(b.threads);
    // Below that the threads take longer to start than to work.
    const int norm_threads = rows * D > 1 << 15 ? threads : 1;
    // What is no longer needed makes room: norm1's result for the attention's and that for norm2's, qkv for the hidden
    // values, and the sum of the first half for the second's; but in float32 `out` has unfinished sums in between.
    const int64_t bytes = (dtype == RF_CPU_FLOAT32 ? 4 : 2) * rows * D;
    char *mixed = static_cast<char *>(b.workspace), *s = mixed + bytes, *wide = s;
    if (dtype == RF_CPU_FLOAT32)
        wide += bytes;
    else
        s = static_cast<char *>(b.out);
    auto norm = [&](const rf_cpu_norm &n, const void *x, void *out) {
        return rf_cpu_layer_norm(x, nullptr, n.weight, n.bias, nullptr, out, dtype, weights, rows, D, D, 0,
                                 static_cast<float>(n.eps), static_cast<float>(n.scale), norm_threads);
    };
    auto linear = [&](const rf_cpu_layer &l, const void *x, int64_t K, const void *residual, void *out, int64_t N, int act) {
        if (l.scales && dtype != RF_CPU_BFLOAT16) return fail(RF_CPU_BAD_ARGUMENT, "int8 goes with bfloat16");
        if (l.scales)
            return rf_cpu_linear_int8(x, static_cast<const int8_t *>(l.weight), l.scales, static_cast<const float *>(l.bias),
                                      residual, out, rows, N, K, K, N, N, act, threads);
        return rf_cpu_linear(x, l.weight, static_cast<const float *>(l.bias), residual, out, rows, N, K, K, K, N, N, dtype,
                             weights, act, threads);
    };
    auto attention = [&] {
        return rf_cpu_attention(wide, b.cu_seqlens, nullptr, mixed, dtype, b.images, b.N, rows, b.heads, D / b.heads, b.N * 3 * D,
                                3 * D, b.width, b.window, threads);
    };
    rf_cpu_status status = RF_CPU_OK;
    auto done = [&](rf_cpu_status now) { return (status = now) == RF_CPU_OK; };
    (b.normed || done(norm(b.norm1, b.x, mixed))) &&
        done(linear(b.qkv, b.normed ? b.normed : mixed, D, nullptr, wide, 3 * D, RF_CPU_NONE)) && done(attention()) &&
        done(linear(b.proj, mixed, D, b.x, s, D, RF_CPU_NONE)) && done(norm(b.norm2, s, mixed)) &&
        done(linear(b.fc1, mixed, D, nullptr, wide, b.hidden, static_cast<int>(b.activation))) &&
        done(linear(b.fc2, wide, b.hidden, s, b.out, D, RF_CPU_NONE)) &&
        (!b.out_normed || done(norm(b.after, b.out, b.out_normed)));
    return status;
}

}  // namespace
}  // namespace rf

rf_cpu_status rf_cpu_blocks(const rf_cpu_block_arguments *blocks, int64_t count) {
    rf::clear_error();
    rf_cpu_status status = RF_CPU_OK;
    for (int64_t i = 0; i < count && status == RF_CPU_OK; i++) status = rf::run(blocks[i]);
    return status;
}
