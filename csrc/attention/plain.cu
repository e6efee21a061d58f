/* Attention in float32, without tensor cores: the simple form. A warp takes one query after the other, and 32 keys at a
 * time, one a lane; then each lane has its channels of the output.
 */
#define RF_SOURCE "plain"
#include "place.cuh"

namespace rf {

constexpr int CHANNELS = MAX_PLAIN_DIM / 32; /* of a lane, at most */

RF_DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

RF_DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

RF_DEVICE void attend(
    const AttentionParams &p, const Place &place, const int64_t *offsets, float *q, int query, int64_t token) {
    const int lane = thread() % 32, N = place.N;
    const float *const queries = (const float *)p.qkv + place.q;
    const float *const keys = queries + (int64_t)p.heads * p.head_dim;
    const float *const values = keys + (int64_t)p.heads * p.head_dim;
    const int64_t own = p.window ? offsets[query] : query * p.stride_n;
    sync_warp();
    for (int c = lane; c < p.head_dim; c += 32) q[c] = queries[own + c];
    sync_warp();

    float largest = minus_infinity(), sum = 0.0f, output[CHANNELS] = {};
    for (int start = 0; start < N; start += 32) {
        const int key = start + lane, last = min(key, N - 1);
        const int64_t offset = p.window ? offsets[last] : last * p.stride_n;
        float score = 0.0f;
        for (int c = 0; c < p.head_dim; ++c) score += q[c] * keys[offset + c];
        score *= p.scale;
        if (p.bias) {
            const int64_t row = place.head * p.stride_bias_head + query * p.stride_bias_row;
            score += ((const float *)p.bias)[row + last] * 1.4426950408889634f;
        }
        if (key >= N) score = minus_infinity();
        const float highest = fmaxf(largest, warp_max(score));
        const float base = highest == minus_infinity() ? 0.0f : highest; /* a bias of −∞ may shut out all keys so far */
        const float rescale = exp2_exact(largest - base);
        const float weight = exp2_exact(score - base);
        largest = highest;
        sum = sum * rescale + warp_sum(weight);
        for (int i = 0; i < CHANNELS; ++i) output[i] *= rescale;
        for (int j = 0; j < min(32, N - start); ++j) {
            const float w = shuffle(weight, j);
            const int64_t from = p.window ? offsets[start + j] : (start + j) * p.stride_n;
            for (int i = 0; i < CHANNELS; ++i) {
                const int c = lane + 32 * i;
                if (c < p.head_dim) output[i] += w * values[from + c];
            }
        }
    }
    for (int i = 0; i < CHANNELS; ++i) {
        const int c = lane + 32 * i;
        if (c < p.head_dim) ((float *)p.out)[place.out + token * p.heads * p.head_dim + c] = sum == 0.0f ? 0.0f : output[i] / sum;
    }
}

}  // namespace rf

RF_KERNEL(rf_plain_f32, rf::AttentionParams) {
    RF_SHARED(memory);
    const rf::Place place = rf::find_place(p);
    if (place.empty) return;
    int64_t *const offsets = (int64_t *)memory;
    float *const q = (float *)(offsets + p.window * p.window) + rf::thread() / 32 * rf::MAX_PLAIN_DIM;
    if (p.window) {
        rf::fill_offsets(p, place, offsets);
        rf::sync_block();
    }
    for (int row = rf::thread() / 32; row < rf::ROWS; row += rf::THREADS / 32) {
        int64_t token;
        if (rf::find_token(p, place, place.start + row, &token))
            rf::attend(p, place, offsets, q, place.start + row, token);
    }
}
