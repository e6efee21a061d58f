/* Which queries a block of threads has, and where tokens of its window or image lie. */
#ifndef RADIO_FAST_PLACE_CUH
#define RADIO_FAST_PLACE_CUH

#include "mma.cuh"
#include "params.h"

namespace rf {

/* Where this block's queries, keys and output lie. */
struct Place {
    int64_t q;             /* element of qkv: this head, at the window's corner or the image's first token */
    int64_t out;           /* element of the output for the image's first token and this head */
    int head, start, N;    /* first query; tokens */
    int y0, x0;            /* the window's corner */
    bool empty;            /* no query of this block has an output */
};

RF_DEVICE Place find_place(const AttentionParams &p) {
    Place place;
    int index = block();
    place.start = index % p.tiles * ROWS;
    index /= p.tiles;
    place.head = index % p.heads;
    index /= p.heads;
    const int64_t image = index / p.windows;
    const int window = index % p.windows;
    place.N = p.N;
    place.y0 = place.x0 = 0;
    int64_t first = image * p.N, from = image * p.stride_b;
    if (p.window) {
        place.y0 = window / p.across * p.window;
        place.x0 = window % p.across * p.window;
        first = image * p.H * p.W;
        from += place.y0 * p.stride_h + place.x0 * p.stride_n;
    } else if (p.cu_seqlens) {
        /* Wrong values must not lead out of qkv. More tokens than N are all keys, though not all queries. */
        first = max((int64_t)0, min((int64_t)p.cu_seqlens[image], p.tokens));
        const int64_t end = max(first, min((int64_t)p.cu_seqlens[image + 1], p.tokens));
        place.N = (int)(end - first);
        from = first * p.stride_n;
    }
    place.q = from + place.head * p.head_dim;
    place.out = (first * p.heads + place.head) * p.head_dim;
    place.empty = place.start >= place.N || (p.window && place.y0 + place.start / p.window >= p.H);
    return place;
}

/* The offset of each position from the window's corner, its row and column reflected at the map's edge. */
RF_DEVICE void fill_offsets(const AttentionParams &p, const Place &place, int64_t *offsets) {
    for (int i = thread(); i < place.N; i += THREADS) {
        int y = i / p.window, x = i % p.window;
        y = min(y, 2 * (p.H - 1 - place.y0) - y);
        x = min(x, 2 * (p.W - 1 - place.x0) - x);
        offsets[i] = y * p.stride_h + x * p.stride_n;
    }
}

/* Whether a query has an output, and its token's number in the image. */
RF_DEVICE bool find_token(const AttentionParams &p, const Place &place, int query, int64_t *token) {
    *token = query;
    if (query >= place.N) return false;
    if (!p.window) return true;
    const int y = place.y0 + query / p.window, x = place.x0 + query % p.window;
    *token = (int64_t)y * p.W + x;
    return y < p.H && x < p.W;
}

}  // namespace rf
#endif
