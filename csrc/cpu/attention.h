/* Which tokens attend to each other, and what attention.cpp hands to attention_f32.cpp. */
#ifndef RADIO_FAST_CPU_ATTENTION_H
#define RADIO_FAST_CPU_ATTENTION_H

#include "cpu.h"

namespace rf {

/* rf_cpu_attention's arguments, looked at, and what follows from them. */
struct Attention {
    const void *qkv, *bias;  // bias: of windows, (heads, window², window²), or null
    void *out;
    const int32_t *starts;  // of packed images, or null
    int64_t images, N, tokens, heads, d, stride_b, stride_n;
    int64_t width, windows, window;  // of a grid of tokens; 0 windows: none
    int64_t sequences, longest;      // whole images, packed ones or windows; tokens of one
    int64_t splits;                  // of a sequence's queries, for so many items

    /* How often to split the queries that several threads have enough to do, each with `least` queries or more. */
    void split(int threads, int64_t least) {
        const int64_t wanted = (4 * threads + sequences * heads - 1) / (sequences * heads), most = (longest + least - 1) / least;
        splits = wanted < most ? wanted : most > 0 ? most : 1;
    }
};

/* The tokens that attend to each other. */
struct Sequence {
    const Attention &p;
    int64_t image = 0, first = 0, count = 0;

    Sequence(const Attention &problem, int64_t index) : p(problem) {
        if (p.starts) {
            int64_t a = p.starts[index], b = p.starts[index + 1];
            a = a < 0 ? 0 : a > p.tokens ? p.tokens : a, b = b < a ? a : b > p.tokens ? p.tokens : b;
            first = a, count = b - a;
        } else if (p.windows) {
            image = index / p.windows;
            int64_t across = p.width / p.window, at = index % p.windows;
            first = at / across * p.window * p.width + at % across * p.window, count = p.window * p.window;
        } else {
            image = index, count = p.N;
        }
    }

    int64_t token(int64_t i) const {
        return p.windows ? first + i / p.window * p.width + i % p.window : first + i;
    }
    /* Of token i's values of one head, q's, k's or v's with `head` beyond the heads: where in qkv. */
    int64_t row(int64_t i, int64_t head) const { return image * p.stride_b + token(i) * p.stride_n + head * p.d; }
    int64_t result(int64_t i) const { return (image * p.N + token(i)) * p.heads * p.d; }
};

/* One item: some of a sequence's blocks of queries, in one head. A head's bias stays in L2 for all windows. */
struct Part {
    const int64_t pair, head;
    const Sequence tokens;
    const int64_t blocks, from, to;

    Part(const Attention &p, int64_t item, int64_t block)
        : pair(item / p.splits),
          head(p.bias ? pair / p.sequences : pair % p.heads),
          tokens(p, p.bias ? pair % p.sequences : pair / p.heads),
          blocks((tokens.count + block - 1) / block),
          from(blocks * (item % p.splits) / p.splits),
          to(blocks * (item % p.splits + 1) / p.splits) {}
};

rf_cpu_status attention_f32(Attention &problem, int threads);

}  // namespace rf
#endif
