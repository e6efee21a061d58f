/* Attention of one tile of queries against all keys of its window or image, with an online softmax.
 *
 * One block of threads: 64 queries of one head, a warp for each 16. Keys and values come 64 at a time to shared memory,
 * while the products before need the other of the two: K, V and Q are there once each (40 KB at head dimension 96).
 * Positions of a window are read where they lie in the map, by a table of offsets; nothing is cut out beforehand.
 *
 * What depends on the tensor cores is in a Tile (sm70.cu, mma16.cuh). It holds scores and outputs in registers, so that
 * element e of a thread is in one of two rows of the warp's 16, number (e >> 1) & 1, and e and e + 1 (e even) are
 * neighbours.
 */
#ifndef RADIO_FAST_FLASH_CUH
#define RADIO_FAST_FLASH_CUH

#include "mma.cuh"
#include "params.h"
#include "place.cuh"
#include "vec.cuh"

namespace rf {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int SCORES = ROWS / 2; /* of 16 × 64, for each of 32 lanes */

/* Bring tokens start … start + 63 of q, k or v to shared memory: zeros past the last token and the last channel. */
template <class Tile, int DIM>
RF_DEVICE void load_rows(
    const AttentionParams &p, const uint16_t *from, const int64_t *offsets, int start, int N, uint16_t *to) {
    constexpr int CHUNKS = DIM / 8;
    for (int i = thread(); i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * 8, token = start + row;
        const bool valid = token < N && column < p.head_dim;
        const int64_t offset = !valid ? 0 : p.window ? offsets[token] : token * p.stride_n;
        uint16_t *target = to + row * pitch_of(DIM) + column;
        if (p.aligned) {
            Tile::copy_16(target, from + offset + (valid ? column : 0), valid);
        } else {
            for (int c = 0; c < 8; ++c) target[c] = valid ? from[offset + column + c] : (uint16_t)0;
        }
    }
}

RF_DEVICE float finite(float x) { return x == minus_infinity() ? 0.0f : x; }

/* Two neighbours of a row of the bias; nothing is read past its last column. */
template <class Type>
RF_DEVICE void load_bias(const AttentionParams &p, const uint16_t *row, int column, int N, float *low, float *high) {
    if (p.bias_aligned && column + 1 < N) {
        const uint32_t both = *(const uint32_t *)(row + column);
        *low = Type::to_float((uint16_t)both);
        *high = Type::to_float((uint16_t)(both >> 16));
    } else {
        *low = column < N ? Type::to_float(row[column]) : 0.0f;
        *high = column + 1 < N ? Type::to_float(row[column + 1]) : 0.0f;
    }
}

template <class Tile, int DIM>
RF_DEVICE void flash(const AttentionParams &p) {
    using Type = typename Tile::Type;
    constexpr int PITCH = pitch_of(DIM), OUTPUTS = DIM / 2;
    RF_SHARED(memory);
    uint16_t *const q_rows = (uint16_t *)memory;
    uint16_t *const k_rows = q_rows + ROWS * query_pitch_of(Tile::PATH, DIM);
    uint16_t *const v_rows = k_rows + ROWS * PITCH;
    int64_t *const offsets = (int64_t *)(v_rows + ROWS * PITCH);

    const Place place = find_place(p);
    if (place.empty) return;
    const int N = place.N, warp = thread() / 32;
    const uint16_t *const queries = (const uint16_t *)p.qkv + place.q;
    const uint16_t *const keys = queries + (int64_t)p.heads * p.head_dim;
    const uint16_t *const values = keys + (int64_t)p.heads * p.head_dim;
    if (p.window) {
        fill_offsets(p, place, offsets);
        sync_block();
    }
    load_rows<Tile, DIM>(p, queries, offsets, place.start, N, q_rows);
    load_rows<Tile, DIM>(p, keys, offsets, 0, N, k_rows);
    Tile::copy_wait();
    sync_block();

    Tile tile;
    tile.template load_queries<DIM>(q_rows + warp * 16 * PITCH);
    /* Queries' rows are done with; warps stage in their place what they change the layout of, each in its own 16. On
     * sm_70 these may be others' rows still: the barrier before `weigh` comes first. */
    sync_warp();
    uint16_t *const stage = q_rows + warp * 16 * query_pitch_of(Tile::PATH, DIM);

    const uint16_t *bias_rows[2] = {nullptr, nullptr};
    if (p.bias) {
        for (int r = 0; r < 2; ++r) { /* queries past the last one take its row: what comes of it is not written */
            const int query = min(place.start + warp * 16 + Tile::row(r), N - 1);
            bias_rows[r] = (const uint16_t *)p.bias + place.head * p.stride_bias_head + query * p.stride_bias_row;
        }
    }
    float outputs[OUTPUTS], largest[2], sum[2] = {0.0f, 0.0f};
    largest[0] = largest[1] = minus_infinity();
#pragma unroll
    for (int e = 0; e < OUTPUTS; ++e) outputs[e] = 0.0f;

    for (int start = 0; start < N; start += ROWS) {
        load_rows<Tile, DIM>(p, values, offsets, start, N, v_rows); /* arrives during the next products */
        float scores[SCORES];
#pragma unroll
        for (int e = 0; e < SCORES; ++e) scores[e] = 0.0f;
        tile.template scores<DIM>(k_rows, scores);

        float highest[2] = {largest[0], largest[1]};
#pragma unroll
        for (int e = 0; e < SCORES; e += 2) {
            const int r = (e >> 1) & 1, column = start + Tile::column(e);
            float low = 0.0f, high = 0.0f;
            if (p.bias) load_bias<Type>(p, bias_rows[r], column, N, &low, &high);
            scores[e] = column < N ? scores[e] * p.scale + low * LOG2E : minus_infinity();
            scores[e + 1] = column + 1 < N ? scores[e + 1] * p.scale + high * LOG2E : minus_infinity();
            highest[r] = fmaxf(highest[r], fmaxf(scores[e], scores[e + 1]));
        }
        float rescale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], Tile::ROW_LANES_0));
            highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], Tile::ROW_LANES_1));
            largest[r] -= finite(highest[r]); /* a bias of −∞ may shut out all keys so far: −∞ − −∞ would be NaN */
            rescale[r] = exp2_fast(largest[r]);
            largest[r] = highest[r];
            sum[r] *= rescale[r];
        }
#pragma unroll
        for (int e = 0; e < SCORES; ++e) {
            const int r = (e >> 1) & 1;
            scores[e] = exp2_fast(scores[e] - finite(largest[r]));
            sum[r] += scores[e];
        }
#pragma unroll
        for (int e = 0; e < OUTPUTS; ++e) outputs[e] *= rescale[(e >> 1) & 1];

        Tile::copy_wait();
        sync_block(); /* V is there for all, and no warp needs K any more */
        const bool more = start + ROWS < N;
        if (more) load_rows<Tile, DIM>(p, keys, offsets, start + ROWS, N, k_rows);
        tile.template weigh<DIM>(scores, v_rows, stage, outputs);
        if (more) {
            Tile::copy_wait();
            sync_block(); /* K is there for all, and no warp needs V any more */
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += shuffle_xor(sum[r], Tile::ROW_LANES_0);
        sum[r] += shuffle_xor(sum[r], Tile::ROW_LANES_1);
        sum[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]; /* 0: every key was shut out */
    }
    sync_warp();
#pragma unroll
    for (int e = 0; e < OUTPUTS; e += 2) {
        const int r = (e >> 1) & 1;
        *(uint32_t *)(stage + Tile::row(r) * PITCH + Tile::column(e)) =
            Type::pack(outputs[e] * sum[r], outputs[e + 1] * sum[r]);
    }
    sync_warp();
    /* Whole 16 bytes of a row at a time: head dimensions are multiples of 8, and the output is contiguous. */
    const int chunks = p.head_dim / 8, width = p.heads * p.head_dim;
    for (int i = thread() % 32; i < 16 * chunks; i += 32) {
        const int row = i / chunks, column = i % chunks * 8, query = place.start + warp * 16 + row;
        int64_t token;
        if (find_token(p, place, query, &token)) {
            copy_16_now((uint16_t *)p.out + place.out + token * width + column, stage + row * PITCH + column, true);
        }
    }
}

}  // namespace rf
#endif
