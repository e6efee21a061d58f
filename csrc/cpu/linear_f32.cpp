/* Linear layers in float32 on AMX: out = residual + act(x · weightᵀ + bias), worked out as (weight · xᵀ)ᵀ.
 *
 * A float32 value is the sum of three bfloat16 ones, of 8 bits each. Of the nine products of two such sums six are taken;
 * the others are below 2⁻²⁶ of the value's (Henry, Tang and Heinecke, 2019). The unit adds 32 columns' products up before
 * it adds them to a sum, so there are fewer roundings than in a chain of float32's. Six products are still less than half
 * of what AVX-512 takes for one.
 *
 * A block of x's tokens, and of its columns where there are many, is split and rearranged by all threads and stays in L2.
 * Then each thread takes panels of 32 features; while the tile unit is at one, the next one's rows are split, and bias,
 * activation and residual of the last 32 × 32 sums worked out.
 */
#include "amx.h"
#include "float32.h"
#include "linear.h"

namespace rf {
namespace {

using namespace amx;

constexpr int PANEL = 32;             // features; of SwiGLU 16 of each half
constexpr int PARTS = 3;              // bfloat16 values that make up a float32 one
constexpr int64_t STEP = 2 * PARTS * TILE;  // bytes of 32 columns of 32 rows, or tokens: part by part two tiles
constexpr int64_t CHUNK = 768;        // columns of x that are rearranged at once
constexpr int64_t X_BYTES = 5 << 18;  // of rearranged x: what L2 has beside two panels
constexpr int AHEAD = 16;             // rows of 32 columns that are asked for before they are split

struct Problem : Linear {
    int64_t token, tokens;  // the block of x
    int64_t column, count;  // and the columns
    char *packed;           // of 32 tokens after 32, step by step
    // What no thread has taken yet: a panel, 16 of the tokens; and how many of these are rearranged, so many sixteens.
    std::atomic<int64_t> *next, *next_tokens, *ready;

    int64_t steps() const { return (count + 31) / 32; }
    int64_t sixteens() const { return (tokens + 15) / 16; }
};

/* 32 values, `left` of them there and else zeros → their three parts, `apart` bytes from each other. */
inline __attribute__((always_inline)) void split(const float *from, int64_t left, char *to, int64_t apart) {
    __m512 low, high;
    if (left >= 32)
        low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
    else
        low = _mm512_maskz_loadu_ps(lanes(left), from), high = _mm512_maskz_loadu_ps(left > 16 ? lanes(left - 16) : 0, from + 16);
    for (int part = 0; part < PARTS; part++) {
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_store_si512(to + part * apart, rounded);
        low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(rounded)));
        high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64(rounded, 1)));
    }
}

/* 16 tokens → their tiles. */
void pack_tokens(const Problem &p, int64_t sixteen) {
    const int64_t left = p.tokens - 16 * sixteen;
    const int rows = left < 16 ? (int)left : 16;
    const float *from = (const float *)p.x + (p.token + 16 * sixteen) * p.stride_x + p.column;
    char *to = p.packed + sixteen / 2 * p.steps() * STEP + sixteen % 2 * TILE;
    for (int64_t k = 0; k < p.count; k += 32, to += STEP) {
        alignas(64) char parts[PARTS * TILE];
        for (int row = 0; row < rows; row++) split(from + row * p.stride_x + k, p.count - k, parts + 64 * row, TILE);
        for (int part = 0; part < PARTS; part++) {
            __m512i words[16];
            transpose_words(parts + part * TILE, 64, rows, words);
            store_tile(words, to + part * 2 * TILE);
        }
    }
}

/* A panel's rows, a row's 32 columns at a time. */
struct Splitting {
    const Problem &p;
    const int width;
    int64_t n = 0;
    int row = PANEL;
    int64_t step = 0;
    const float *from = nullptr, *later = nullptr;
    char *to = nullptr;

    Splitting(const Problem &problem, int panel_width) : p(problem), width(panel_width) {}

    /* Where a panel's row lies, or null. SwiGLU's second half is that of b. */
    const float *at(int i) const {
        const int64_t feature = n + (i < width ? i : i - width);
        if (i >= PANEL || feature >= p.N) return nullptr;
        return (const float *)p.weight + (i < width ? feature : p.N + feature) * p.stride_w + p.column;
    }

    void start(int64_t first, char *tiles) {
        n = first, to = tiles, row = 0, step = 0;
        settle();
    }

    void settle() {
        while (row < PANEL && !(from = at(row))) row++;
        later = at(row + 1);
    }

    inline __attribute__((always_inline)) void advance(int count) {
        const int64_t steps = p.steps();
        for (; count > 0 && row < PANEL; count--) {
            // Memory is waited for otherwise: what is split in a while, of this row or the next.
            const int64_t soon = step + AHEAD;
            const float *ask = soon < steps ? from + 32 * soon : later ? later + 32 * (soon - steps) : from;
            _mm_prefetch(ask, _MM_HINT_T0);
            _mm_prefetch(ask + 16, _MM_HINT_T0);
            split(from + 32 * step, p.count - 32 * step, to + step * STEP + (row >> 4) * TILE + (row & 15) * 64, 2 * TILE);
            if (++step == steps) step = 0, row++, settle();
        }
    }
};

/* 32 features × 32 tokens of sums on their way to memory: units of four tokens and 16 features. */
template <int ACT>
struct Epilogue {
    static constexpr int WIDTH = ACT == RF_CPU_SWIGLU ? PANEL / 2 : PANEL, UNITS = WIDTH / 2;
    const Problem &p;
    const float *sums = nullptr;  // tiles: features 0…15 × tokens 0…15, × tokens 16…31, features 16…31 × …
    int unit = UNITS;
    int64_t token = 0, n = 0;

    explicit Epilogue(const Problem &problem) : p(problem) {}

    void start(const float *tiles, int64_t first_token, int64_t first_feature) {
        sums = tiles, token = first_token, n = first_feature, unit = 0;
    }

    void run(int u) {
        // Both halves of a row, one after the other: they are two lines of one page.
        const int half = ACT == RF_CPU_SWIGLU ? 0 : u & 1, quarter = ACT == RF_CPU_SWIGLU ? u : u >> 1, right = quarter >> 2;
        const int64_t m = token + 4 * quarter, at = n + 16 * half;
        if (m >= p.tokens || at >= p.N) return;
        const bool first = p.column == 0, last = p.column + p.count == p.K;
        const __mmask16 mask = lanes(p.N - at);
        __m512i words[4], others[4];
        transpose_quarter((const char *)(sums + (2 * half + right) * 256), 64, quarter & 3, words);
        if (ACT == RF_CPU_SWIGLU) transpose_quarter((const char *)(sums + (2 + right) * 256), 64, quarter & 3, others);
        const __m512 none = _mm512_setzero_ps(), bias = p.bias && last ? _mm512_maskz_loadu_ps(mask, p.bias + at) : none;
        for (int i = 0; i < 4 && m + i < p.tokens; i++) {
            float *to = (float *)p.out + (p.token + m + i) * p.stride_o + at;
            __m512 y = _mm512_add_ps(_mm512_castsi512_ps(words[i]), bias);
            if (!first) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to));
            if (last && ACT == RF_CPU_GELU) y = f32::gelu(y);
            if (ACT == RF_CPU_SWIGLU) {
                __m512 gated = _mm512_castsi512_ps(others[i]);
                if (p.bias) gated = _mm512_add_ps(gated, _mm512_maskz_loadu_ps(mask, p.bias + p.N + at));
                y = _mm512_mul_ps(f32::silu(y), gated);
            }
            if (last && p.residual)
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, (const float *)p.residual + (p.token + m + i) * p.stride_r + at));
            _mm512_mask_storeu_ps(to, mask, y);
        }
    }

    inline __attribute__((always_inline)) void advance(int count) {
        for (; count > 0 && unit < UNITS; count--) run(unit++);
    }
};

template <int ACT>
struct Body {
    static constexpr int WIDTH = Epilogue<ACT>::WIDTH;
    const Problem &p;

    void give_up() { p.ready->fetch_add(int64_t(1) << 40); }  // nobody waits for what this thread should have packed

    struct Local {
        const Problem &p;
        Tiles tiles;
        Epilogue<ACT> before;
        Splitting following;
        char *weights[2];  // of this panel and the next
        float *sums[2];

        explicit Local(Body &body) : p(body.p), before(body.p), following(body.p, WIDTH) {
            const int64_t panel = p.steps() * STEP;
            char *memory = (char *)scratch(0, 2 * panel + 8 * TILE);
            weights[0] = memory, weights[1] = memory + panel;
            sums[0] = (float *)(memory + 2 * panel), sums[1] = sums[0] + 4 * 256;
        }
        bool ready() const { return weights[0] != nullptr; }

        /* 32 features × 16 or 32 tokens. The parts that meet, the weight's first: 1 and 3, 1 and 2, 2 and 2, 2 and 1, 3 and 1,
         * so that each time but one operand is another; and 1 and 1 when all of these are added up, as what is added to a
         * large sum costs a rounding of its size. */
        template <int COLUMNS>
        void multiply(const char *w, const char *x, float *c, int units, int rows) {
            auto weight = [&](int part) __attribute__((always_inline)) {
                _tile_loadd(4, w + (2 * part) * TILE, 64);
                _tile_loadd(5, w + (2 * part + 1) * TILE, 64);
            };
            auto tokens = [&](int part) __attribute__((always_inline)) {
                _tile_loadd(6, x + (2 * part) * TILE, 64);
                if (COLUMNS == 2) _tile_loadd(7, x + (2 * part + 1) * TILE, 64);
            };
            auto products = [&]() __attribute__((always_inline)) {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 5, 6);
                if (COLUMNS == 2) {
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            };
            zero_sums();
            for (int64_t step = p.steps(); step > 0; step--, w += STEP, x += STEP) {
                weight(0), tokens(2), products();
                tokens(1), products();
                following.advance(rows);
                weight(1), products();
                tokens(0), products();
                before.advance(units);
                weight(2), products();
            }
            for (int64_t step = p.steps(); step > 0; step--) {
                w -= STEP, x -= STEP;
                weight(0), tokens(0), products();
            }
            before.advance(Epilogue<ACT>::UNITS);
            store_sums(c);
        }

        int64_t take() const { return p.next->fetch_add(1) * WIDTH; }

        void run(int64_t) {
            for (int64_t mine; (mine = p.next_tokens->fetch_add(1)) < p.sixteens();) {
                pack_tokens(p, mine);
                p.ready->fetch_add(1, std::memory_order_release);
            }
            const int64_t pairs = (p.tokens + 31) / 32;
            const int units = (int)((Epilogue<ACT>::UNITS + p.steps() - 1) / p.steps()), rows = (int)((PANEL + pairs - 1) / pairs);
            int64_t n = take();
            if (n >= p.N) return;
            following.start(n, weights[0]);
            following.advance(1 << 30);
            while (p.ready->load(std::memory_order_acquire) < p.sixteens()) _mm_pause();
            for (int odd = 0, other = 0; n < p.N; odd ^= 1) {
                const int64_t after = take();
                if (after < p.N) following.start(after, weights[!odd]);
                order_memory();
                for (int64_t pair = 0; pair < pairs; pair++, other ^= 1) {
                    const char *x = p.packed + pair * p.steps() * STEP;
                    if (p.tokens - 32 * pair > 16)
                        multiply<2>(weights[odd], x, sums[other], units, rows);
                    else
                        multiply<1>(weights[odd], x, sums[other], units, rows);
                    before.start(sums[other], 32 * pair, n);
                }
                n = after;  // all of it is split: pairs · rows are PANEL or more
            }
            before.advance(Epilogue<ACT>::UNITS);
        }
    };
};

}  // namespace

rf_cpu_status linear_f32(const Linear &layer, int activation, int threads) {
    Problem p{};
    static_cast<Linear &>(p) = layer;
    // Below that the threads take longer to start than to work.
    if (p.M * p.N * p.K < 1 << 20) threads = 1;
    // Of SwiGLU's sums there is nowhere to keep a part: out has but half of them.
    const int64_t chunks = activation == RF_CPU_SWIGLU ? 1 : (p.K + CHUNK - 1) / CHUNK;
    const int64_t chunk = ((p.K + chunks - 1) / chunks + 31) / 32 * 32, pair = chunk / 32 * STEP;
    const int64_t most = X_BYTES / pair > 1 ? X_BYTES / pair * 32 : 32;
    const int64_t blocks = (p.M + most - 1) / most, block = ((p.M + blocks - 1) / blocks + 31) / 32 * 32;
    p.packed = (char *)scratch(1, (size_t)(block / 32 * pair));
    bool done = p.packed != nullptr;
    for (p.token = 0; done && p.token < p.M; p.token += block) {
        p.tokens = p.M - p.token < block ? p.M - p.token : block;
        for (p.column = 0; done && p.column < p.K; p.column += chunk) {
            p.count = p.K - p.column < chunk ? p.K - p.column : chunk;
            std::atomic<int64_t> next{0}, next_tokens{0}, ready{0};
            p.next = &next, p.next_tokens = &next_tokens, p.ready = &ready;
            auto run = [&](auto body) { return for_each(threads, threads, body); };
            done = activation == RF_CPU_SWIGLU ? run(Body<RF_CPU_SWIGLU>{p})
                   : activation == RF_CPU_GELU ? run(Body<RF_CPU_GELU>{p})
                                               : run(Body<RF_CPU_NONE>{p});
        }
    }
    return done ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for the rearranged input");
}

}  // namespace rf
