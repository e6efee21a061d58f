/* What the attention kernels are told; the one parameter of each. */
#ifndef RADIO_FAST_ATTENTION_PARAMS_H
#define RADIO_FAST_ATTENTION_PARAMS_H

#include "types.h"

namespace rf {

constexpr int ROWS = 64;      /* queries of a block of threads, and keys of a step */
constexpr int THREADS = 128;  /* a warp for each 16 queries */
constexpr int MAX_WINDOW = 32;

struct AttentionParams {
    const void *qkv;
    const void *bias;           /* null: none */
    const int32_t *cu_seqlens;  /* null: not packed */
    void *out;
    int64_t stride_b, stride_h, stride_n; /* of qkv: image, row of the map, token; elements */
    int64_t stride_bias_head, stride_bias_row;
    int32_t heads, head_dim;
    int32_t window;    /* k, or 0: whole images */
    int32_t H, W;      /* of the map */
    int32_t across;    /* windows in a row of them */
    int32_t windows;   /* of an image; 1 for whole images */
    int64_t tokens;    /* of all packed images */
    int32_t N;         /* tokens of a window, or of the longest image */
    int32_t tiles;     /* of queries, for each head */
    int32_t aligned;   /* whether 16 bytes of qkv can be read at once */
    int32_t bias_aligned; /* whether two neighbours of bias can be */
    float scale;       /* log2(e) / sqrt(head_dim) */
};

/* Columns of a row of a head in shared memory. 8 more than channels: rows begin at odd multiples of 16 bytes, so that the
 * eight rows that ldmatrix reads at once lie in different banks. */
RF_BOTH constexpr int pitch_of(int dim) { return dim + 8; }

/* Queries' rows on sm_70 become the stage for 64 weights. */
RF_BOTH constexpr int query_pitch_of(int path, int dim) {
    return path == 70 && pitch_of(dim) < ROWS + 8 ? ROWS + 8 : pitch_of(dim);
}

/* Bytes of shared memory: Q, K and V of 64 tokens, and the offsets of a window's. */
RF_BOTH constexpr int shared_bytes_of(int path, int dim, int window) {
    return 2 * ROWS * (query_pitch_of(path, dim) + 2 * pitch_of(dim)) + 8 * window * window;
}

constexpr int MAX_PLAIN_DIM = 96;

/* The same for float32: a query of each warp, and the offsets. */
RF_BOTH constexpr int plain_shared_bytes_of(int window) { return 4 * MAX_PLAIN_DIM * THREADS / 32 + 8 * window * window; }

}  // namespace rf
#endif
