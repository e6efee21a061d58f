/* Linear layers in bfloat16, on AMX: out = residual + act(x · weightᵀ + bias), worked out as (weight · xᵀ)ᵀ. Of few rows:
 * many go to linear_rows.cpp.
 *
 * Tiles of the weight are loaded from where it lies: there is no second copy of it, nor time spent on one. (A float32
 * weight is rounded 32 rows × 768 columns at a time, which stay in L1, and the last columns copied there where K is no
 * multiple of 32.) What has to be rearranged for the tile unit is x, which is small; its tiles stream past L1, where
 * they would push out the weight's rows and the sums. 32 features × 32 tokens of sums are in tiles for 768 of K: spilled
 * every 384 they cost 20 %. Bias, activation, residual and the way back to rows of tokens are worked out between the tile
 * instructions of the next 32 × 32, and the weight's next rows may be asked for.
 */
#include "linear.h"

#include "amx.h"

namespace rf {
namespace {

using namespace amx;

constexpr int PANEL = 32;             // features, and tokens, of the sums that tiles hold; half of both halves' for SwiGLU
constexpr int64_t STEPS = 24;         // of 32 columns: 32 features' 48 KiB are L1
constexpr int64_t X_BYTES = 1 << 20;  // of rearranged x: half of L2, the other half is for the weight's rows
constexpr int64_t MANY = 384;         // rows of x, from which on linear_rows.cpp is the faster one

struct Problem {
    const bf16 *x;
    const char *weight;
    const float *bias;
    const bf16 *residual;
    bf16 *out;
    int64_t M, N, K, stride_x, stride_w, stride_r, stride_o;
    int64_t value;                // bytes of one of the weight's values: 2 or 4
    int64_t steps, panels;        // of 32 columns, of `width` results
    int64_t width, lower;         // lower: rows of the weight from a panel's first to its 17th
    int64_t blocks, block_tiles;  // of x: how many, and the tiles of 16 tokens in each
    int64_t block_panels;         // of the weight's panels, one item; all of them where x has many blocks
    char *packed;                 // x, where it is one block for all threads
    std::atomic<int64_t> *ready;  // its tiles that are packed
};

/* Of the last 32 columns those that are there. */
inline __mmask32 rest(const Problem &p) { return p.K % 32 ? (1u << p.K % 32) - 1 : 0xffffffffu; }

/* 16 tokens → the second operand's tiles, one for each step, 2 KiB apart: rows of 16 pairs of columns. */
void pack_tokens(const Problem &p, int64_t token, char *tiles) {
    int rows = p.M - token < 16 ? (int)(p.M - token) : 16;
    const char *from = (const char *)(p.x + token * p.stride_x);
    __m512i words[16];
    int64_t step = 0;
    for (; step < p.K / 32; step++) {
        transpose_words(from + 64 * step, 2 * p.stride_x, rows, words);
        store_tile(words, tiles + step * 2 * TILE);
    }
    if (step == p.steps) return;
    alignas(64) char padded[16 * 64];
    for (int row = 0; row < rows; row++)
        _mm512_store_si512(padded + 64 * row, _mm512_maskz_loadu_epi16(rest(p), from + 64 * step + row * 2 * p.stride_x));
    transpose_words(padded, 64, rows, words);
    store_tile(words, tiles + step * 2 * TILE);
}

/* The weight's next 32 rows, asked for a few lines at a time: from L3 or memory they would be waited for. */
struct Ahead {
    const char *at = nullptr, *below = nullptr;
    int64_t stride = 0, row_bytes = 0, offset = 0, rows = 0;

    void start(const char *first, const char *second, int64_t stride_bytes, int64_t bytes) {
        at = first, below = second, rows = PANEL, stride = stride_bytes, row_bytes = bytes, offset = 0;
    }

    inline __attribute__((always_inline)) void advance(int count) {
        for (; count > 0 && rows > 0; count--) {
            _mm_prefetch(at + offset, _MM_HINT_T1);
            offset += 64;
            if (offset >= row_bytes) offset = 0, at = --rows == 16 ? below : at + stride;
        }
    }
};

/* Rows of a panel of `left` results, `steps` × 32 columns from `first` on → bfloat16 tiles: 32 rows of 64 bytes for each
 * step. Rows that are not there stay what they are: nothing of theirs is stored. */
void round_panel(const Problem &p, const char *from, int64_t left, int64_t first, int64_t steps, char *tiles) {
    const int64_t stride = p.stride_w * p.value;
    for (int64_t step = 0; step < steps; step++, from += 32 * p.value, tiles += 2 * TILE) {
        const __mmask32 mask = first + step + 1 < p.steps ? 0xffffffffu : rest(p);
        for (int64_t row = 0; row < PANEL; row++) {
            if (row % p.width >= left) continue;
            const char *at = from + (row < 16 ? row : p.lower + row - 16) * stride;
            __m512i values;
            if (p.value == 4)
                values = (__m512i)_mm512_cvtne2ps_pbh(
                    _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), at + 64), _mm512_maskz_loadu_ps((__mmask16)mask, at));
            else
                values = _mm512_maskz_loadu_epi16(mask, at);
            _mm512_store_si512(tiles + 64 * row, values);
        }
    }
    order_memory();
}

/* Sums of 32 features × 16 or 32 tokens on their way to memory, in units of a few instructions: for each 16 tokens 16
 * units (of SwiGLU 8) that finish two results each, then 4 that store four tokens each. */
template <int ACT, bool RESIDUAL>
struct Epilogue {
    static constexpr int WIDTH = ACT == RF_CPU_SWIGLU ? PANEL / 2 : PANEL, PAIRS = WIDTH / 2, UNITS = PAIRS + 4;
    const Problem &p;
    const float *sums = nullptr;  // tiles: features 0…15 × tokens 0…15, × tokens 16…31, features 16…31 × …
    alignas(64) uint32_t pairs[16 * 16];
    alignas(64) uint32_t others[16 * 16];  // of the residual
    int unit = 0, units = 0;
    int64_t token = 0, first = 0;
    __mmask32 mask = 0;

    explicit Epilogue(const Problem &problem) : p(problem) {}

    void start(const float *tiles, int64_t m, int columns, int64_t n) {
        sums = tiles, token = m, first = n, unit = 0, units = UNITS * columns;
        int64_t left = p.N - n;
        mask = 0xffffffffu >> (32 - (left < WIDTH ? left : WIDTH));
        // Where the next 32 tokens are stored and their residuals lie: lines of L3 would be waited for, up to a third of the time.
        for (int64_t row = m + PANEL; row < m + 2 * PANEL && row < p.M; row++) {
            __builtin_prefetch(p.out + row * p.stride_o + n, 1, 2);
            if (RESIDUAL) __builtin_prefetch(p.residual + row * p.stride_r + n, 0, 2);
        }
    }

    /* The panel's result `i` of 16 tokens. */
    inline __attribute__((always_inline)) __m512 finish_one(int column, int i) {
        const float *at = sums + (i >> 4) * 512 + column * 256 + (i & 15) * 16;
        const bool shifted = p.bias && first + i < p.N;
        __m512 y = _mm512_load_ps(at);
        if (shifted) y = _mm512_add_ps(y, _mm512_set1_ps(p.bias[first + i]));
        if (ACT != RF_CPU_SWIGLU) return ACT == RF_CPU_GELU ? gelu(y) : y;
        __m512 gated = _mm512_load_ps(at + 512);
        if (shifted) gated = _mm512_add_ps(gated, _mm512_set1_ps(p.bias[p.N + first + i]));
        return _mm512_mul_ps(silu(y), gated);
    }

    void load_residual(int64_t m) {
        int rows = p.M - m < 16 ? (int)(p.M - m) : 16;
        const char *from = (const char *)(p.residual + m * p.stride_r + first);
        alignas(64) char padded[16 * 64];
        if (mask != 0xffffffffu) {
            for (int row = 0; row < rows; row++)
                _mm512_store_si512(padded + 64 * row, _mm512_maskz_loadu_epi16(mask, from + row * 2 * p.stride_r));
        }
        __m512i words[16];
        if (mask == 0xffffffffu)
            transpose_words(from, 2 * p.stride_r, rows, words);
        else
            transpose_words(padded, 64, rows, words);
        store_tile(words, (char *)others);
    }

    void run(int u) {
        int column = u / UNITS, part = u % UNITS;
        int64_t m = token + 16 * column;
        if (part < PAIRS) {
            if (RESIDUAL && part == 0) load_residual(m);
            __m512 a = finish_one(column, 2 * part), b = finish_one(column, 2 * part + 1);
            if (RESIDUAL) {
                __m512i r = _mm512_load_si512(others + 16 * part);
                a = _mm512_add_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(r, 16)));
                b = _mm512_add_ps(b, _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000))));
            }
            __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
            __m512i odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b)), 16);
            _mm512_store_si512(pairs + 16 * part, _mm512_or_si512(even, odd));
            return;
        }
        __m512i words[4];
        transpose_quarter((const char *)pairs, 64, part - PAIRS, words);
        for (int i = 0; i < 4; i++) {
            int64_t row = m + 4 * (part - PAIRS) + i;
            if (row < p.M) _mm512_mask_storeu_epi16(p.out + row * p.stride_o + first, mask, words[i]);
        }
    }

    inline __attribute__((always_inline)) void advance(int count) {
        for (; count > 0 && unit < units; count--) run(unit++);
    }
};

template <int ACT, bool RESIDUAL>
struct Body {
    const Problem &p;

    void give_up() {
        if (p.ready) p.ready->fetch_add(int64_t(1) << 40);  // nobody waits for what this thread should have packed
    }

    struct Local {
        const Problem &p;
        Tiles tiles;
        Epilogue<ACT, RESIDUAL> before;
        Ahead next;
        char *packed, *panel;  // panel: what of the weight can't be loaded from where it lies
        float *sums;           // 4 tiles for each 32 tokens

        explicit Local(Body &body) : p(body.p), before(body.p) {
            size_t x = p.packed ? 0 : (p.block_tiles + 1) / 2 * p.steps * 2 * TILE;
            const size_t w = STEPS * 2 * TILE;
            packed = (char *)scratch(0, x + w + (p.block_tiles + 1) / 2 * 4 * TILE);
            panel = packed + x, sums = (float *)(panel + w);
        }

        bool ready() const { return packed != nullptr; }

        /* w: 16 rows, `stride` bytes apart, and 16 more, `below` bytes from them, of `steps` steps, `across` bytes apart. */
        template <int COLUMNS>
        void multiply(
            const char *w, int64_t stride, int64_t below, int64_t across, const char *x, float *c, int64_t steps,
            bool fresh, int units, int lines) {
            if (fresh)
                zero_sums();
            else
                load_sums(c);
            for (int64_t step = 0; step < steps; step++, w += across, x += 2 * TILE) {
                _tile_loadd(4, w, stride);
                _tile_stream_loadd(6, x, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, w + below, stride);
                _tile_dpbf16ps(2, 5, 6);
                if (COLUMNS == 2) {
                    _tile_stream_loadd(7, x + TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
                before.advance(units);
                next.advance(lines);
            }
            before.advance(2 * Epilogue<ACT, RESIDUAL>::UNITS);
            store_sums(c);
        }

        void run(int64_t item) {
            int64_t t0 = 0, t1 = p.block_tiles, n0 = 0, n1 = p.panels;
            const char *x = p.packed;
            if (p.packed) {
                const int64_t to_pack = p.block_tiles;
                if (item < to_pack) {
                    pack_tokens(p, 16 * item, p.packed + (item / 2 * p.steps * 2 + item % 2) * TILE);
                    p.ready->fetch_add(1, std::memory_order_release);
                    return;
                }
                while (p.ready->load(std::memory_order_acquire) < to_pack) _mm_pause();
                n0 = (item - to_pack) * p.block_panels;
                n1 = n0 + p.block_panels < p.panels ? n0 + p.block_panels : p.panels;
            } else {
                int64_t tiles = (p.M + 15) / 16;
                t0 = tiles * item / p.blocks, t1 = tiles * (item + 1) / p.blocks;
                for (int64_t t = t0; t < t1; t++)
                    pack_tokens(p, 16 * t, packed + ((t - t0) / 2 * p.steps * 2 + (t - t0) % 2) * TILE);
                x = packed;
            }
            const int64_t products = (t1 - t0 + 1) / 2 * p.steps;
            const int64_t some = p.steps < STEPS ? p.steps : STEPS;
            const int units = (int)((40 + some - 1) / some);
            // Of long rows, or for few tokens, asking costs more than it brings.
            const bool ask = p.steps <= 2 * STEPS && products >= 4 * p.steps;
            const int64_t row_bytes = p.K * p.value, stride = p.stride_w * p.value;
            const int lines = (int)((PANEL * row_bytes / 64 + products - 1) / products);
            for (int64_t n = n0; n < n1; n++) {
                const char *w = p.weight + n * p.width * stride, *after = w + p.width * stride;
                const int64_t left = p.N - n * p.width;
                if (ask && n + 1 < n1 && left >= 2 * p.width) next.start(after, after + p.lower * stride, stride, row_bytes);
                for (int64_t step = 0; step < p.steps; step += STEPS) {
                    const bool last = step + STEPS >= p.steps;
                    const int64_t steps = last ? p.steps - step : STEPS;
                    const bool direct = p.value == 2 && left >= p.width && !(last && p.K % 32);
                    const char *part = w + 32 * p.value * step;
                    if (!direct) round_panel(p, part, left, step, steps, panel);
                    const char *rows = direct ? part : panel;
                    const int64_t apart = direct ? stride : 64, across = direct ? 64 : 2 * TILE;
                    const int64_t below = direct ? p.lower * stride : TILE;
                    for (int64_t t = t0; t < t1; t += 2) {
                        const int pair = t + 1 < t1 ? 2 : 1;
                        const char *tokens = x + ((t - t0) * p.steps + 2 * step) * TILE;
                        float *c = sums + (t - t0) * 2 * 256;
                        if (pair == 2)
                            multiply<2>(rows, apart, below, across, tokens, c, steps, step == 0, units, lines);
                        else
                            multiply<1>(rows, apart, below, across, tokens, c, steps, step == 0, units, lines);
                        if (last) before.start(c, 16 * t, pair, n * p.width);
                    }
                }
            }
            before.advance(40);
        }
    };
};

template <int ACT, bool RESIDUAL>
rf_cpu_status launch(Problem &p, int threads) {
    int64_t tiles = (p.M + 15) / 16, most = X_BYTES / (p.steps * TILE) > 2 ? X_BYTES / (p.steps * TILE) : 2;
    p.blocks = (tiles + most - 1) / most;
    std::atomic<int64_t> packed{0};
    // Two blocks read the weight twice: where that is most of the time, a fuller L2 costs less.
    if ((threads == 1 || p.value == 4) && p.blocks == 2 && tiles * p.steps * TILE <= X_BYTES / 2 * 3) p.blocks = 1;
    if (p.blocks < 2 || p.blocks < threads) {
        p.blocks = 1, p.block_tiles = tiles;
        p.ready = &packed;
        p.packed = (char *)scratch(1, (tiles + 1) / 2 * p.steps * 2 * TILE);
        if (!p.packed) return fail(RF_CPU_NO_MEMORY, "no memory for the rearranged input");
        int64_t shares = 4 * threads < p.panels ? 4 * threads : p.panels;
        p.block_panels = (p.panels + shares - 1) / shares;
    } else {
        p.blocks = (p.blocks + threads - 1) / threads * threads;
        if (p.blocks > tiles) p.blocks = tiles;
        p.block_tiles = (tiles + p.blocks - 1) / p.blocks;
        p.block_panels = p.panels;
    }
    Body<ACT, RESIDUAL> body{p};
    int64_t items = p.packed ? tiles + (p.panels + p.block_panels - 1) / p.block_panels : p.blocks;
    bool done = for_each(items, threads, body);
    return done ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for the rearranged input");
}

}  // namespace
}  // namespace rf

rf_cpu_status rf_cpu_linear(
    const void *x, const void *weight, const float *bias, const void *residual, void *out, int64_t M, int64_t N,
    int64_t K, int64_t stride_x, int64_t stride_w, int64_t stride_r, int64_t stride_o, int dtype, int weight_dtype,
    int activation, int threads) {
    using namespace rf;
    clear_error();
    if (M < 0 || N < 0 || K < 1 || threads < 1)
        return fail(RF_CPU_BAD_ARGUMENT, "K must be at least 1, got %lld", (long long)K);
    if (activation < RF_CPU_NONE || activation > RF_CPU_SWIGLU)
        return fail(RF_CPU_BAD_ARGUMENT, "no activation %d", activation);
    if (activation == RF_CPU_SWIGLU && residual) return fail(RF_CPU_BAD_ARGUMENT, "SwiGLU takes no residual");
    if ((dtype != RF_CPU_BFLOAT16 && dtype != RF_CPU_FLOAT32) || (weight_dtype != dtype && weight_dtype != RF_CPU_FLOAT32))
        return fail(RF_CPU_BAD_ARGUMENT, "no weight of dtype %d for dtype %d", weight_dtype, dtype);
    if (!*rf_cpu_features()) return fail(RF_CPU_UNSUPPORTED, "this CPU, or the system, has no AMX");
    if (!M || !N) return RF_CPU_OK;
    const Linear layer{x, weight, bias, residual, out, M, N, K, stride_x, stride_w, stride_r, stride_o};
    if (dtype == RF_CPU_FLOAT32) return linear_f32(layer, activation, threads);
    if (M >= MANY) return linear_rows(layer, weight_dtype, activation, threads);
    Problem p{};
    p.x = (const bf16 *)x, p.weight = (const char *)weight, p.bias = bias, p.residual = (const bf16 *)residual;
    p.out = (bf16 *)out, p.M = M, p.N = N, p.K = K;
    p.stride_x = stride_x, p.stride_w = stride_w, p.stride_r = stride_r, p.stride_o = stride_o;
    p.value = weight_dtype == RF_CPU_FLOAT32 ? 4 : 2, p.steps = (K + 31) / 32;
    p.width = activation == RF_CPU_SWIGLU ? PANEL / 2 : PANEL, p.panels = (N + p.width - 1) / p.width;
    p.lower = activation == RF_CPU_SWIGLU ? N : 16;
    if (activation == RF_CPU_SWIGLU) return launch<RF_CPU_SWIGLU, false>(p, threads);
    if (activation == RF_CPU_GELU)
        return residual ? launch<RF_CPU_GELU, true>(p, threads) : launch<RF_CPU_GELU, false>(p, threads);
    return residual ? launch<RF_CPU_NONE, true>(p, threads) : launch<RF_CPU_NONE, false>(p, threads);
}
