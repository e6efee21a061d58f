/* Linear layers of many rows in bfloat16, on AMX: out = residual + act(x · weightᵀ + bias).
 *
 * linear.cpp, for few rows, streams the weight once past all of x. With many rows what counts is that the tile unit never
 * waits: with one operand in L1 and the other one, in the order of its tiles, in L2 it is twice as fast as with one from
 * memory, or from rows whose distance lets them share a few sets of L1. So a block of the weight, all of K, is put into L2
 * in the order of its tiles; past it go 32 tokens at a time, of these up to 512 columns copied in order to L1. (Asking for
 * the next ones meanwhile costs more than it brings, probably as the tile unit's loads wait for the same few buffers.)
 * 32 × 32 sums wait in L2 for their next columns, and to be finished row by row: a line of each row for panel after
 * panel would be in another page each time.
 *
 * The tile instructions add the same products in the same order as in linear.cpp, and the results are the same to the bit.
 */
#include "linear.h"

#include <new>

#include "amx.h"
#include "rows.h"

namespace rf {
namespace {

using namespace amx;

constexpr int PANEL = 32;               // features, and tokens, of the sums that tiles hold; of SwiGLU 16 of each half
constexpr int64_t STEPS = 16;           // of 32 columns: 32 tokens' 32 KiB of L1
constexpr int64_t W_BYTES = 1 << 20;    // of the weight's block: half of L2, the rest is for the sums and what passes
constexpr int64_t MOST_PANELS = 26;     // in a block, whatever K
constexpr int64_t PART = 26;            // of 32 tokens: what a thread takes at once, a block of the weight before it

struct Problem : Linear {
    int64_t value;            // bytes of one of the weight's values: 2 or 4
    int64_t steps, panels;    // of 32 columns, of `width` results
    int64_t width, lower;     // lower: rows of the weight from a panel's first to its 17th
    int64_t chunk;            // steps whose tokens are in L1 at once
    int64_t blocks, block_panels;
    int64_t pairs, parts;     // of 32 tokens; of all of them
    std::atomic<int64_t> *next;  // of each block's parts, and after them of the blocks: what nobody has taken yet
};

/* 16 rows of the weight from `from` on, `steps` × 32 columns → the second operand's tiles, 2 KiB apart: of each 16 rows
 * of pairs of columns. `rows` of them are there; what of K's last 32 is not, is zeros. */
void pack_weight(const Problem &p, const char *from, int rows, char *tiles) {
    const int64_t stride = p.stride_w * p.value;
    alignas(64) char padded[16 * 64];
    __m512i words[16];
    for (int64_t step = 0; step < p.steps; step++, from += 32 * p.value, tiles += 2 * TILE) {
        const bool last = step + 1 == p.steps;
        if (!last)
            for (int row = 0; row < rows; row++) _mm_prefetch(from + row * stride + 4 * 32 * p.value, _MM_HINT_T0);
        if (p.value == 2 && !(last && p.K % 32)) {
            transpose_words(from, stride, rows, words);
        } else {
            const __mmask32 mask = last && p.K % 32 ? (1u << p.K % 32) - 1 : 0xffffffffu;
            for (int row = 0; row < rows; row++) {
                const char *at = from + row * stride;
                const __m512i values = p.value == 2 ? _mm512_maskz_loadu_epi16(mask, at)
                                                    : (__m512i)_mm512_cvtne2ps_pbh(
                                                          _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), at + 64),
                                                          _mm512_maskz_loadu_ps((__mmask16)mask, at));
                _mm512_store_si512(padded + 64 * row, values);
            }
            transpose_words(padded, 64, rows, words);
        }
        store_tile(words, tiles);
    }
}

/* From sums to results. */
template <int ACT, bool RESIDUAL>
struct Epilogue : Rows<Epilogue<ACT, RESIDUAL>> {
    static constexpr int WIDTH = ACT == RF_CPU_SWIGLU ? PANEL / 2 : PANEL;
    const Problem &p;
    const int64_t first, count;  // the block's features and panels
    bf16 *out = nullptr;
    const bf16 *residual = nullptr;

    Epilogue(const Problem &problem, int64_t n, int64_t panels) : p(problem), first(n), count(panels) {}

    void start(const float *from, int64_t m) {
        this->begin(from, count, p.M - m);
        out = (bf16 *)p.out + m * p.stride_o + first;
        if (RESIDUAL) residual = (const bf16 *)p.residual + m * p.stride_r + first;
    }

    /* Features n to n + 15 of a sum, with their bias. */
    static inline __attribute__((always_inline)) __m512 biased(const float *at, const float *bias, __mmask16 mask) {
        const __m512 y = _mm512_load_ps(at);
        return bias ? _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias)) : y;
    }

    inline __attribute__((always_inline)) void finish() {
        const float *sums = this->sums;
        const int64_t n = this->panel * WIDTH, left = p.N - first - n;
        const float *bias = p.bias ? p.bias + first + n : nullptr;
        const __mmask32 mask = left >= WIDTH ? 0xffffffffu >> (32 - WIDTH) : (1u << left) - 1;
        const __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
        __m512 a = biased(sums, bias, low);
        if (ACT == RF_CPU_SWIGLU) {
            const __m512 b = biased(sums + 256, bias ? bias + p.N : nullptr, low);
            _mm256_mask_storeu_epi16(out + n, low, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(silu(a), b)));
        } else {
            __m512 b = biased(sums + 256, bias ? bias + 16 : nullptr, high);
            if (ACT == RF_CPU_GELU) a = gelu(a), b = gelu(b);
            if (RESIDUAL) {
                a = _mm512_add_ps(a, widen(_mm256_maskz_loadu_epi16(low, residual + n)));
                b = _mm512_add_ps(b, widen(_mm256_maskz_loadu_epi16(high, residual + n + 16)));
            }
            _mm512_mask_storeu_epi16(out + n, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        if (!this->move()) return;
        out += p.stride_o;
        if (RESIDUAL) residual += p.stride_r;
    }
};

template <int ACT, bool RESIDUAL>
struct Body {
    const Problem &p;

    void give_up() {}

    struct Local {
        const Problem &p;
        Tiles tiles;
        char *weight, *tokens;  // the block and, of 32 tokens, `chunk` steps, both in the order of tiles
        float *sums[2];         // of the block's panels, 4 tiles each; of tokens that are even and odd in number

        explicit Local(Body &body)
            : p(body.p), weight(memory(body.p)), tokens(weight + p.block_panels * p.steps * 2 * TILE),
              sums{(float *)(tokens + p.chunk * 2 * TILE), sums[0] + p.block_panels * 1024} {}

        static char *memory(const Problem &p) {
            return (char *)scratch(0, (p.block_panels * (p.steps + 4) + p.chunk) * 2 * TILE);
        }

        bool ready() const { return weight != nullptr; }

        /* 32 tokens from m on, `steps` × 32 columns from the first on → L1. Rows that are not there stay what they are:
         * nothing of theirs is stored. */
        void copy_tokens(int64_t m, int64_t first, int64_t steps) {
            const int64_t rows = p.M - m < PANEL ? p.M - m : PANEL;
            const bool tail = first + steps == p.steps && p.K % 32;
            for (int64_t row = 0; row < rows; row++) {
                const bf16 *from = (const bf16 *)p.x + (m + row) * p.stride_x + 32 * first;
                char *to = tokens + (row >> 4) * TILE + (row & 15) * 64;
                for (int64_t step = 0; step < steps - tail; step++)
                    _mm512_store_si512(to + step * 2 * TILE, _mm512_loadu_si512(from + 32 * step));
                if (tail)
                    _mm512_store_si512(
                        to + (steps - 1) * 2 * TILE,
                        _mm512_maskz_loadu_epi16((1u << p.K % 32) - 1, from + 32 * (steps - 1)));
            }
            order_memory();
        }

        inline __attribute__((always_inline)) void multiply(
            const char *w, float *c, int64_t steps, bool fresh, Epilogue<ACT, RESIDUAL> &before) {
            if (fresh)
                zero_sums();
            else
                load_sums(c);
            const char *x = tokens;
            for (int64_t step = 0; step < steps; step++, x += 2 * TILE, w += 2 * TILE) {
                _tile_loadd(4, x, 64);
                _tile_stream_loadd(6, w, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, x + TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_stream_loadd(7, w + TILE, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
                before.advance(p.steps);
            }
            store_sums(c);
        }

        /* A block nobody has, all its parts; then what is left of the others': cores shared with others differ in speed. */
        void run(int64_t) {
            for (int64_t mine; (mine = p.next[p.blocks].fetch_add(1)) < p.blocks;) take(mine);
            for (int64_t other = 0; other < p.blocks; other++) take(other);
        }

        void take(int64_t now) {
            bool packed = false;
            const int64_t n0 = p.panels * now / p.blocks, count = p.panels * (now + 1) / p.blocks - n0;
            for (int64_t part; (part = p.next[now].fetch_add(1)) < p.parts;) {
                if (!packed) pack(n0, count), packed = true;
                multiply_part(n0, count, part);
            }
        }

        void multiply_part(int64_t n0, int64_t count, int64_t part) {
            const int64_t p0 = p.pairs * part / p.parts, p1 = p.pairs * (part + 1) / p.parts;
            Epilogue<ACT, RESIDUAL> before(p, n0 * p.width, count);
            for (int64_t pair = p0; pair < p1; pair++) {
                float *c = sums[(pair - p0) & 1];
                for (int64_t first = 0, steps; first < p.steps; first += steps) {
                    steps = p.steps - first < p.chunk ? p.steps - first : p.chunk;
                    copy_tokens(pair * PANEL, first, steps);
                    for (int64_t n = 0; n < count; n++)
                        multiply(weight + (n * p.steps + first) * 2 * TILE, c + n * 1024, steps, first == 0, before);
                }
                before.start(c, pair * PANEL);
            }
            before.end();
        }

        void pack(int64_t n0, int64_t count) {
            for (int64_t n = 0; n < count; n++) {
                const int64_t feature = (n0 + n) * p.width, left = p.N - feature;
                const char *from = (const char *)p.weight + feature * p.stride_w * p.value;
                char *to = weight + n * p.steps * 2 * TILE;
                pack_weight(p, from, left < 16 ? (int)left : 16, to);
                const int64_t below = p.width == PANEL ? left - 16 : left;
                pack_weight(p, from + p.lower * p.stride_w * p.value, below < 0 ? 0 : below < 16 ? (int)below : 16, to + TILE);
            }
            order_memory();
        }
    };
};

template <int ACT, bool RESIDUAL>
rf_cpu_status launch(const Problem &p, int threads) {
    Body<ACT, RESIDUAL> body{p};
    return for_each(threads, threads, body) ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for a block of the weight");
}

}  // namespace

rf_cpu_status linear_rows(const Linear &layer, int weight_dtype, int activation, int threads) {
    Problem p{};
    (Linear &)p = layer;
    const bool swiglu = activation == RF_CPU_SWIGLU;
    p.value = weight_dtype == RF_CPU_FLOAT32 ? 4 : 2, p.steps = (p.K + 31) / 32;
    p.width = swiglu ? PANEL / 2 : PANEL, p.panels = (p.N + p.width - 1) / p.width, p.lower = swiglu ? p.N : 16;
    const int64_t chunks = (p.steps + STEPS - 1) / STEPS;
    p.chunk = (p.steps + chunks - 1) / chunks;
    int64_t most = W_BYTES / (p.steps * 2 * TILE);
    most = most < 1 ? 1 : most > MOST_PANELS ? MOST_PANELS : most;
    p.blocks = (p.panels + most - 1) / most;
    p.blocks = (p.blocks + threads - 1) / threads * threads;
    if (p.blocks > p.panels) p.blocks = p.panels;
    p.block_panels = (p.panels + p.blocks - 1) / p.blocks;
    p.pairs = (p.M + PANEL - 1) / PANEL;
    p.parts = (p.pairs + PART - 1) / PART;
    p.next = (std::atomic<int64_t> *)scratch(1, (p.blocks + 1) * sizeof *p.next);
    if (!p.next) return fail(RF_CPU_NO_MEMORY, "no memory for the numbers of blocks");
    for (int64_t i = 0; i <= p.blocks; i++) new (p.next + i) std::atomic<int64_t>(0);
    if (swiglu) return launch<RF_CPU_SWIGLU, false>(p, threads);
    if (activation == RF_CPU_GELU)
        return p.residual ? launch<RF_CPU_GELU, true>(p, threads) : launch<RF_CPU_GELU, false>(p, threads);
    return p.residual ? launch<RF_CPU_NONE, true>(p, threads) : launch<RF_CPU_NONE, false>(p, threads);
}

}  // namespace rf
