/* Linear layers in int8 on AMX: out = residual + act(x · weightᵀ + bias), x made int8 row by row on the way.
 *
 * The weight is the second operand here, rearranged once for good, unlike linear.cpp's: sums then are rows of tokens, and
 * finishing them, which takes as long for half the time of multiplying, has nothing to transpose. x is read twice, its
 * largest magnitude first, the second time from L2. Few rows meet the weight panel after panel, as it comes from memory.
 * Of many rows 32 at a time meet a group of panels that is in L2, with 1024 columns in L1: results are then stored in
 * longer rows, in fewer pages at once.
 */
#include "cpu.h"

#include "amx.h"
#include "rows.h"

namespace rf {
namespace {

using namespace amx;

constexpr int PANEL = 32;             // features, and tokens, of the sums that tiles hold
constexpr int64_t STEPS = 16;         // of 64 columns: 32 tokens' 32 KiB of L1
constexpr int64_t X_BYTES = 3 << 18;  // of x in int8: what L2 has beside a group of the weight's panels, and the next one
constexpr int64_t GROUP_BYTES = 1 << 19;
constexpr int64_t MOST_PANELS = 16;   // in a group, whatever K
constexpr int64_t MANY_TILES = 24;    // of 16 tokens, in a block of x: from there on the weight comes in groups
constexpr float TINY = 0x1p-100f;     // a row without larger values counts as zeros: 127 / TINY is finite

struct Problem {
    const bf16 *x;
    const char *weight;
    const float *weight_scales, *bias;
    const bf16 *residual;
    bf16 *out;
    int64_t M, N, K, stride_x, stride_r, stride_o;
    int64_t steps, panels;        // of 64 columns, of 32 features
    int64_t blocks, block_tiles;  // of x: how many, and the tiles of 16 tokens in each
    int64_t group, chunk;         // panels, and steps, that one 32 tokens meet after another
    int64_t block_panels;         // of the weight's panels, one item; all of them where x has many blocks
    float *x_scales;
    char *packed;                 // x, where it is one block for all threads
    std::atomic<int64_t> *ready;  // its tiles that are packed
};

inline __mmask32 mask_of(int64_t left) { return left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0; }

/* A row's largest magnitude, by its bits: NaN is larger than infinity there, and infinity than all numbers. */
float magnitude(const bf16 *row, int64_t K) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += 32) {
        __m512i values = _mm512_maskz_loadu_epi16(mask_of(K - k), row + k);
        most = _mm512_max_epu16(most, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
    }
    __m512i wide = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    uint32_t bits = _mm512_reduce_max_epu32(wide) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* round(32 values · by), in the lower two bytes of each four. */
inline __m512i quantised(__m512i values, __m512 by) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32((int)0xffff0000)));
    __m512i low = _mm512_cvt_roundps_epi32(_mm512_mul_ps(even, by), NEAREST);
    __m512i high = _mm512_cvt_roundps_epi32(_mm512_mul_ps(odd, by), NEAREST);
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xff)), _mm512_slli_epi32(high, 8));
}

/* 16 tokens → their scales, and the first operand's tiles, one for each step, 2 KiB apart. */
void pack_tokens(const Problem &p, int64_t token, char *tiles) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(2 * i);
    const __m512i lower = _mm512_load_si512(order);
    for (int row = 0; row < 16; row++) {
        const bool there = token + row < p.M;
        const bf16 *from = p.x + (there ? token + row : 0) * p.stride_x;
        const float largest = there ? magnitude(from, p.K) : 0;
        const bool some = largest >= TINY && largest < __builtin_inff();
        p.x_scales[token + row] = some ? largest / 127 : largest < TINY ? 0 : __builtin_nanf("");
        const __m512 by = _mm512_set1_ps(some ? 127 / largest : 0);
        for (int64_t step = 0; step < p.steps; step++) {
            const int64_t left = there ? p.K - 64 * step : 0;
            __m512i a = quantised(_mm512_maskz_loadu_epi16(mask_of(left), from + 64 * step), by);
            __m512i b = quantised(_mm512_maskz_loadu_epi16(mask_of(left - 32), from + 64 * step + 32), by);
            _mm512_store_si512(tiles + step * 2 * TILE + 64 * row, _mm512_permutex2var_epi16(a, lower, b));
        }
    }
    order_memory();
}

/* `gelu` to 2e-4, a fortieth of what int8 leaves of values up to 1: with seven terms instead of twelve. */
inline __m512 short_gelu(__m512 x) {
    constexpr float END = 4;
    constexpr float P[] = {0.175966473f, -0.0844306871f, 0.0554116741f, -0.0354310982f,
                           0.024066519f, -0.0165929906f, 0.00601011002f};
    __m512 t = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(END)), _mm512_set1_ps(-END));
    __m512 u = _mm512_fmsub_ps(_mm512_mul_ps(t, t), _mm512_set1_ps(2 / (END * END)), _mm512_set1_ps(1));
    __m512 r = _mm512_set1_ps(P[6]);
    for (int i = 5; i >= 0; i--) r = _mm512_fmadd_ps(r, u, _mm512_set1_ps(P[i]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(t, r, _mm512_set1_ps(0.5f)));
}

/* From sums to results. */
template <int ACT, bool RESIDUAL>
struct Epilogue : Rows<Epilogue<ACT, RESIDUAL>> {
    const Problem &p;
    int64_t first = 0, token = 0;

    explicit Epilogue(const Problem &problem) : p(problem) {}

    /* `left`: tokens there are in the block of x from m on, or more. */
    void start(const float *from, int64_t m, int64_t left, int64_t n, int64_t panels) {
        this->begin(from, panels, p.M - m < left ? p.M - m : left);
        token = m, first = n;
    }

    inline __attribute__((always_inline)) __m512 finish_half(const float *at, int64_t n, __mmask16 mask, __m512 x_scale) {
        const __m512 scale = _mm512_maskz_loadu_ps(mask, p.weight_scales + n);
        __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), x_scale);
        y = p.bias ? _mm512_fmadd_ps(y, scale, _mm512_maskz_loadu_ps(mask, p.bias + n)) : _mm512_mul_ps(y, scale);
        return ACT == RF_CPU_GELU ? short_gelu(y) : y;
    }

    inline __attribute__((always_inline)) void finish() {
        const float *sums = this->sums;
        const int64_t n = first + this->panel * PANEL, m = token + this->row;
        const __mmask32 mask = mask_of(p.N - n);
        const __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
        const __m512 x_scale = _mm512_set1_ps(p.x_scales[m]);
        __m512 a = finish_half(sums, n, low, x_scale), b = finish_half(sums + 256, n + 16, high, x_scale);
        if (RESIDUAL) {
            const bf16 *from = p.residual + m * p.stride_r + n;
            a = _mm512_add_ps(a, widen(_mm256_maskz_loadu_epi16(low, from)));
            b = _mm512_add_ps(b, widen(_mm256_maskz_loadu_epi16(high, from + 16)));
        }
        _mm512_mask_storeu_epi16(p.out + m * p.stride_o + n, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        this->move();
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
        char *packed;
        float *sums[2];  // of a group's panels, 4 tiles each: of tokens that are even and odd in number

        explicit Local(Body &body) : p(body.p), before(body.p) {
            const size_t pairs = (p.block_tiles + 1) / 2, x = p.packed ? 0 : pairs * p.steps * 2 * TILE;
            packed = (char *)scratch(0, x + 2 * p.group * 4 * TILE);
            sums[0] = (float *)(packed + x), sums[1] = sums[0] + p.group * 1024;
        }

        bool ready() const { return packed != nullptr; }

        /* x, w: two tiles for each step. `next`: of the weight, asked for, or it would be waited for. */
        template <int COLUMNS>
        void multiply(
            const char *x, const char *w, float *c, int64_t steps, bool fresh, const char *&next, int lines) {
            if (fresh)
                zero_sums();
            else
                load_sums(c);
            for (int64_t step = 0; step < steps; step++, w += 2 * TILE, x += 2 * TILE) {
                _tile_stream_loadd(4, x, 64);
                _tile_loadd(6, w, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, w + TILE, 64);
                _tile_dpbssd(1, 4, 7);
                if (COLUMNS == 2) {
                    _tile_stream_loadd(5, x + TILE, 64);
                    _tile_dpbssd(2, 5, 6);
                    _tile_dpbssd(3, 5, 7);
                }
                before.advance(p.steps);
                for (int line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
            }
            store_sums(c);
        }

        char *at(char *base, int64_t tile) const { return base + (tile / 2 * p.steps * 2 + tile % 2) * TILE; }

        void run(int64_t item) {
            int64_t t0 = 0, t1 = p.block_tiles, n0 = 0, n1 = p.panels;
            char *x = p.packed;
            if (p.packed) {
                const int64_t to_pack = p.block_tiles;
                if (item < to_pack) {
                    pack_tokens(p, 16 * item, at(p.packed, item));
                    p.ready->fetch_add(1, std::memory_order_release);
                    return;
                }
                while (p.ready->load(std::memory_order_acquire) < to_pack) _mm_pause();
                n0 = (item - to_pack) * p.block_panels;
                n1 = n0 + p.block_panels < p.panels ? n0 + p.block_panels : p.panels;
            } else {
                const int64_t all = (p.M + 15) / 16;
                t0 = all * item / p.blocks, t1 = all * (item + 1) / p.blocks;
                for (int64_t t = t0; t < t1; t++) pack_tokens(p, 16 * t, at(packed, t - t0));
                x = packed;
            }
            const int64_t pairs = (t1 - t0 + 1) / 2, bytes = p.steps * 2 * TILE;
            const int lines = (int)((2 * TILE / 64 + pairs - 1) / pairs);
            int64_t turn = 0;
            for (int64_t n = n0; n < n1; n += p.group) {
                const int64_t count = n1 - n < p.group ? n1 - n : p.group;
                const char *w = p.weight + n * bytes, *next = w + count * bytes;
                for (int64_t t = t0; t < t1; t += 2, turn++) {
                    const int pair = t + 1 < t1 ? 2 : 1;
                    float *c = sums[turn & 1];
                    for (int64_t step = 0; step < p.steps; step += p.chunk) {
                        const int64_t steps = p.steps - step < p.chunk ? p.steps - step : p.chunk;
                        const char *tokens = x + ((t - t0) * p.steps + 2 * step) * TILE;
                        for (int64_t i = 0; i < count; i++) {
                            const char *features = w + i * bytes + 2 * step * TILE;
                            if (pair == 2)
                                multiply<2>(tokens, features, c + i * 1024, steps, step == 0, next, lines);
                            else
                                multiply<1>(tokens, features, c + i * 1024, steps, step == 0, next, lines);
                        }
                    }
                    before.end();
                    before.start(c, 16 * t, 16 * pair, n * PANEL, count);
                }
            }
            before.end();
        }
    };
};

template <int ACT, bool RESIDUAL>
rf_cpu_status launch(Problem &p, int threads) {
    const int64_t tiles = (p.M + 15) / 16, most = X_BYTES / (p.steps * TILE) > 2 ? X_BYTES / (p.steps * TILE) : 2;
    p.blocks = (tiles + most - 1) / most;
    const bool one = p.blocks < 2 || p.blocks < threads;
    char *shared = (char *)scratch(1, tiles * 64 + (one ? (tiles + 1) / 2 * p.steps * 2 * TILE : 0));
    if (!shared) return fail(RF_CPU_NO_MEMORY, "no memory for the input in int8");
    std::atomic<int64_t> packed{0};
    p.x_scales = (float *)shared;
    if (one) {
        p.blocks = 1, p.block_tiles = tiles;
        p.ready = &packed;
        p.packed = shared + tiles * 64;
        const int64_t shares = 4 * threads < p.panels ? 4 * threads : p.panels;
        p.block_panels = (p.panels + shares - 1) / shares;
    } else {
        p.blocks = (p.blocks + threads - 1) / threads * threads;
        if (p.blocks > tiles) p.blocks = tiles;
        p.block_tiles = (tiles + p.blocks - 1) / p.blocks;
        p.block_panels = p.panels;
    }
    const bool many = p.block_tiles >= MANY_TILES;
    const int64_t fit = many ? GROUP_BYTES / (p.steps * 2 * TILE) : 1, chunks = (p.steps + STEPS - 1) / STEPS;
    p.group = fit < 1 ? 1 : fit < MOST_PANELS ? fit : MOST_PANELS;
    p.chunk = many ? (p.steps + chunks - 1) / chunks : p.steps;
    Body<ACT, RESIDUAL> body{p};
    const int64_t items = p.packed ? tiles + (p.panels + p.block_panels - 1) / p.block_panels : p.blocks;
    return for_each(items, threads, body) ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for the input in int8");
}

}  // namespace
}  // namespace rf

rf_cpu_status rf_cpu_linear_int8(
    const void *x, const int8_t *weight, const float *scales, const float *bias, const void *residual, void *out,
    int64_t M, int64_t N, int64_t K, int64_t stride_x, int64_t stride_r, int64_t stride_o, int activation, int threads) {
    using namespace rf;
    clear_error();
    if (M < 0 || N < 0 || K < 1 || K > 1 << 17 || threads < 1)
        return fail(RF_CPU_BAD_ARGUMENT, "K must lie in 1...131072, where 32 bits hold the sums, got %lld", (long long)K);
    if (activation != RF_CPU_NONE && activation != RF_CPU_GELU)
        return fail(RF_CPU_BAD_ARGUMENT, "no activation %d", activation);
    if (!*rf_cpu_features()) return fail(RF_CPU_UNSUPPORTED, "this CPU, or the system, has no AMX");
    if (!M || !N) return RF_CPU_OK;
    Problem p{};
    p.x = (const bf16 *)x, p.weight = (const char *)weight, p.weight_scales = scales, p.bias = bias;
    p.residual = (const bf16 *)residual, p.out = (bf16 *)out, p.M = M, p.N = N, p.K = K;
    p.stride_x = stride_x, p.stride_r = stride_r, p.stride_o = stride_o;
    p.steps = (K + 63) / 64, p.panels = (N + PANEL - 1) / PANEL;
    if (activation == RF_CPU_GELU)
        return residual ? launch<RF_CPU_GELU, true>(p, threads) : launch<RF_CPU_GELU, false>(p, threads);
    return residual ? launch<RF_CPU_NONE, true>(p, threads) : launch<RF_CPU_NONE, false>(p, threads);
}
