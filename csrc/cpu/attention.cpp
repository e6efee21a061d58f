/* Attention in bfloat16, on AMX: softmax(q·kᵀ / √d + bias)·v of one head at a time.
 *
 * A head's keys and values are rearranged for the tile unit once and stay in L2. 32 queries meet blocks of up to 256 keys:
 * scores, then weights, of such a block are in L1; sums are rescaled when a later block has a larger score (Milakov and
 * Gimelshein, 2018). Scores, softmax and sums are float32, the weights that meet the values bfloat16.
 */
#include "attention.h"

#include "amx.h"

namespace rf {
namespace {

using namespace amx;

constexpr int QUERIES = 32, KEYS = 256;
constexpr int SCORE_ROW = KEYS + 16, WEIGHT_ROW = KEYS + 32;  // rows that begin in other sets of L1

struct Problem : Attention {
    int64_t steps, columns;  // of 32 and of 16 values of a head
    float scale;             // log2(e) / √d
};

struct Body {
    const Problem &p;

    void give_up() {}

    struct Local {
        const Problem &p;
        Tiles tiles;
        char *keys, *values, *queries, *gathered;
        float *scores, *sums, *largest, *total;
        bf16 *weights;
        int64_t packed = -1;

        explicit Local(Body &body) : p(body.p) {
            const int64_t rows = (p.longest + 31) / 32 * 32;
            const size_t k = rows * p.steps * 64, v = rows / 32 * p.columns * TILE, q = 2 * p.steps * TILE;
            const size_t s = QUERIES * SCORE_ROW * 4, w = QUERIES * WEIGHT_ROW * 2, o = 2 * p.columns * TILE;
            char *memory = (char *)scratch(0, k + v + 2 * q + s + w + o + 2 * QUERIES * 4);
            queries = memory, gathered = queries + q, scores = (float *)(gathered + q);
            weights = (bf16 *)((char *)scores + s), sums = (float *)((char *)weights + w);
            largest = (float *)((char *)sums + o), total = largest + QUERIES;
            keys = (char *)(total + QUERIES), values = keys + k;
        }

        bool ready() const { return queries != nullptr; }

        __mmask32 mask(int64_t step) const {
            int64_t left = p.d - 32 * step;
            return left >= 32 ? 0xffffffffu : (1u << left) - 1;
        }

        /* 16 tokens' q, k or v → rows of 32 values, zeros beyond d and the last token: `steps` tiles. */
        void gather(const Sequence &tokens, int64_t head, int64_t first, char *to) {
            for (int row = 0; row < 16; row++) {
                const bool there = first + row < tokens.count;
                const bf16 *from = there ? (const bf16 *)p.qkv + tokens.row(first + row, head) : nullptr;
                for (int64_t step = 0; step < p.steps; step++) {
                    __m512i values = there ? _mm512_maskz_loadu_epi16(mask(step), from + 32 * step) : _mm512_setzero_si512();
                    _mm512_store_si512(to + step * TILE + row * 64, values);
                }
            }
        }

        void pack(const Sequence &tokens, int64_t head) {
            for (int64_t first = 0; first < (tokens.count + 31) / 32 * 32; first += 16) {
                gather(tokens, p.heads + head, first, gathered);
                for (int64_t step = 0; step < p.steps; step++) {
                    __m512i words[16];
                    transpose_words(gathered + step * TILE, 64, 16, words);
                    store_tile(words, keys + (first / 16 * p.steps + step) * TILE);
                }
                gather(tokens, 2 * p.heads + head, first, gathered);
                // Rows 2i and 2i + 1 of values → words of one row; of the tile's 16 these tokens have 8.
                char *to = values + first / 32 * p.columns * TILE + first % 32 / 16 * 8 * 64;
                for (int64_t step = 0; step < p.steps; step++) {
                    for (int i = 0; i < 8; i++) {
                        const char *pair = gathered + step * TILE + i * 128;
                        __m512i a = _mm512_load_si512(pair), b = _mm512_load_si512(pair + 64);
                        for (int half = 0; half < 2 && 2 * step + half < p.columns; half++) {
                            __m256i x = half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a);
                            __m256i y = half ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b);
                            __m512i both = _mm512_or_si512(
                                _mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
                            _mm512_store_si512(to + (2 * step + half) * TILE + i * 64, both);
                        }
                    }
                }
            }
            order_memory();
        }

        /* scores = q · kᵀ of `count` keys from `first` on, a multiple of 32. */
        void multiply_keys(int64_t first, int count) {
            order_memory();
            const int64_t below = p.steps * TILE;
            for (int key = 0; key < count; key += 32) {
                const char *k = keys + (first + key) / 16 * p.steps * TILE;
                zero_sums();
                for (int64_t step = 0; step < p.steps; step++) {
                    _tile_loadd(4, queries + step * TILE, 64);
                    _tile_loadd(6, k + step * TILE, 64);
                    _tile_loadd(5, queries + step * TILE + below, 64);
                    _tile_loadd(7, k + step * TILE + below, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                float *to = scores + key;
                _tile_stored(0, to, SCORE_ROW * 4);
                _tile_stored(1, to + 16, SCORE_ROW * 4);
                _tile_stored(2, to + 16 * SCORE_ROW, SCORE_ROW * 4);
                _tile_stored(3, to + 16 * SCORE_ROW + 16, SCORE_ROW * 4);
            }
            order_memory();
        }

        /* scores → log2(e) · (scores / √d + bias), of the keys from `first` on. */
        void add_bias(int64_t head, int64_t query, int rows, int64_t first, int there) {
            const int64_t side = p.window * p.window;
            const __m512 scale = _mm512_set1_ps(p.scale), log2e = _mm512_set1_ps(1.44269504f);
            const bf16 *from = (const bf16 *)p.bias + (head * side + query) * side + first;
            for (int row = 0; row < rows; row++, from += side) {
                float *s = scores + row * SCORE_ROW;
                for (int key = 0; key < there; key += 16) {
                    const __mmask16 mask = lanes(there - key);
                    __m512 b = widen(_mm256_maskz_loadu_epi16(mask, from + key));
                    _mm512_store_ps(s + key, _mm512_fmadd_ps(_mm512_load_ps(s + key), scale, _mm512_mul_ps(b, log2e)));
                }
            }
        }

        /* scores → weights, `there` of `count` keys; sums and totals so far are rescaled to the new largest score. */
        void soften(int rows, int there, int count, bool first, float factor_of_scores) {
            const __m512 low = _mm512_set1_ps(-INFINITY);
            const int whole = there / 16 * 16;
            const __mmask16 rest = (__mmask16)((1u << (there - whole)) - 1);
            for (int row = 0; row < rows; row++) {
                const float *s = scores + row * SCORE_ROW;
                bf16 *w = weights + row * WEIGHT_ROW;
                __m512 most = rest ? _mm512_mask_loadu_ps(low, rest, s + whole) : low;
                for (int key = 0; key < whole; key += 16) most = _mm512_max_ps(most, _mm512_load_ps(s + key));
                float m = _mm512_reduce_max_ps(most) * factor_of_scores;
                if (p.bias && m == -INFINITY) m = -3e38f;  // a mask, of all of these keys: −∞ less −∞ would be NaN
                if (!first && largest[row] > m) m = largest[row];
                const __m512 offset = _mm512_set1_ps(-m), scale = _mm512_set1_ps(factor_of_scores);
                __m512 sum = _mm512_setzero_ps();
                int key = 0;
                for (; key < whole; key += 16) {
                    __m512 x = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(s + key), scale, offset));
                    sum = _mm512_add_ps(sum, x);
                    _mm256_store_si256((__m256i *)(w + key), (__m256i)_mm512_cvtneps_pbh(x));
                }
                for (; key < count; key += 16) {
                    const __mmask16 mask = key == whole ? rest : 0;
                    __m512 x = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(s + key), scale, offset));
                    x = _mm512_maskz_mov_ps(mask, x);
                    sum = _mm512_add_ps(sum, x);
                    _mm256_store_si256((__m256i *)(w + key), (__m256i)_mm512_cvtneps_pbh(x));
                }
                float t = _mm512_reduce_add_ps(sum);
                if (!first) {
                    const __m512 factor = exp2_of(_mm512_set1_ps(largest[row] - m));
                    t += total[row] * _mm512_cvtss_f32(factor);
                    float *at = sums + (row >> 4) * 256 + (row & 15) * 16;
                    if (largest[row] != m)
                        for (int64_t c = 0; c < p.columns; c++, at += 512)
                            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
                }
                largest[row] = m, total[row] = t;
            }
        }

        /* sums += weights · v of `count` keys from `first` on. */
        template <int COLUMNS>
        void multiply_values(int64_t first, int count, int64_t column, bool fresh) {
            float *c = sums + column * 512;  // tiles: both halves of the queries, then the next column
            const char *v = values + (first / 32 * p.columns + column) * TILE;
            if (fresh) {
                zero_sums();
            } else {
                _tile_loadd(0, c, 64);
                _tile_loadd(2, c + 256, 64);
                if (COLUMNS == 2) {
                    _tile_loadd(1, c + 512, 64);
                    _tile_loadd(3, c + 768, 64);
                }
            }
            for (int key = 0; key < count; key += 32, v += p.columns * TILE) {
                _tile_loadd(4, weights + key, WEIGHT_ROW * 2);
                _tile_loadd(6, v, 64);
                _tile_loadd(5, weights + key + 16 * WEIGHT_ROW, WEIGHT_ROW * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 5, 6);
                if (COLUMNS == 2) {
                    _tile_loadd(7, v + TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c, 64);
            _tile_stored(2, c + 256, 64);
            if (COLUMNS == 2) {
                _tile_stored(1, c + 512, 64);
                _tile_stored(3, c + 768, 64);
            }
        }

        void store(const Sequence &tokens, int64_t head, int64_t query, int rows) {
            for (int row = 0; row < rows; row++) {
                const __m512 factor = _mm512_set1_ps(1 / total[row]);
                bf16 *to = (bf16 *)p.out + tokens.result(query + row) + head * p.d;
                const float *at = sums + (row >> 4) * 256 + (row & 15) * 16;
                for (int64_t c = 0; c < p.columns; c++, at += 512) {
                    __m512 x = _mm512_mul_ps(_mm512_load_ps(at), factor);
                    _mm256_mask_storeu_epi16(to + 16 * c, lanes(p.d - 16 * c), (__m256i)_mm512_cvtneps_pbh(x));
                }
            }
        }

        void run(int64_t item) {
            const Part part(p, item, QUERIES);
            const Sequence &tokens = part.tokens;
            if (part.from == part.to) return;
            if (packed != part.pair) pack(tokens, part.head);
            packed = part.pair;
            const int64_t parts = (tokens.count + KEYS - 1) / KEYS;
            const int size = (int)(((tokens.count + parts - 1) / parts + 31) / 32 * 32);
            for (int64_t query = part.from * QUERIES; query < part.to * QUERIES && query < tokens.count; query += QUERIES) {
                const int rows = tokens.count - query < QUERIES ? (int)(tokens.count - query) : QUERIES;
                gather(tokens, part.head, query, queries);
                gather(tokens, part.head, query + 16, queries + p.steps * TILE);
                for (int64_t key = 0; key < tokens.count; key += size) {
                    const int there = tokens.count - key < size ? (int)(tokens.count - key) : size;
                    const int count = (there + 31) / 32 * 32;
                    multiply_keys(key, count);
                    if (p.bias) add_bias(part.head, query, rows, key, there);
                    soften(rows, there, count, key == 0, p.bias ? 1 : p.scale);
                    order_memory();
                    int64_t column = 0;
                    for (; column + 1 < p.columns; column += 2) multiply_values<2>(key, count, column, key == 0);
                    if (column < p.columns) multiply_values<1>(key, count, column, key == 0);
                    order_memory();
                }
                store(tokens, part.head, query, rows);
            }
        }
    };
};

}  // namespace
}  // namespace rf

rf_cpu_status rf_cpu_attention(
    const void *qkv, const int32_t *cu_seqlens, const void *bias, void *out, int dtype, int64_t images, int64_t N,
    int64_t tokens, int64_t heads, int64_t d, int64_t stride_b, int64_t stride_n, int64_t width, int64_t window,
    int threads) {
    using namespace rf;
    clear_error();
    if (images < 0 || N < 0 || tokens < 0 || heads < 1 || d < 8 || d > 256 || d % 8 || threads < 1)
        return fail(RF_CPU_BAD_ARGUMENT, "head dim must be a multiple of 8 up to 256, got %lld", (long long)d);
    if (window < 0 || (window && (cu_seqlens || width < 1 || width % window || N % width || N / width % window)))
        return fail(RF_CPU_BAD_ARGUMENT, "windows of %lld do not tile the tokens", (long long)window);
    if (bias && !window) return fail(RF_CPU_BAD_ARGUMENT, "a bias goes with windows");
    if (dtype != RF_CPU_BFLOAT16 && dtype != RF_CPU_FLOAT32) return fail(RF_CPU_BAD_ARGUMENT, "no dtype %d", dtype);
    if (!*rf_cpu_features()) return fail(RF_CPU_UNSUPPORTED, "this CPU, or the system, has no AMX");
    if (!images || (!cu_seqlens && !N)) return RF_CPU_OK;
    Problem p{};
    p.qkv = qkv, p.bias = bias, p.out = out, p.starts = cu_seqlens, p.images = images, p.N = N, p.tokens = tokens;
    p.heads = heads, p.d = d, p.stride_b = stride_b, p.stride_n = stride_n;
    p.width = width, p.window = window, p.windows = window ? N / (window * window) : 0;
    p.longest = window ? window * window : N;
    p.sequences = window ? images * p.windows : images;
    if (cu_seqlens) {
        p.longest = 0;
        for (int64_t i = 0; i < images; i++) {
            const int64_t count = Sequence(p, i).count;
            p.longest = count > p.longest ? count : p.longest;
        }
    }
    if (dtype == RF_CPU_FLOAT32) return attention_f32(p, threads);
    p.steps = (d + 31) / 32, p.columns = (d + 15) / 16;
    p.scale = (float)(1.4426950408889634 / __builtin_sqrt((double)d));
    p.split(threads, 256);
    Body body{p};
    bool done = for_each(p.sequences * heads * p.splits, threads, body);
    return done ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for the keys and values of a head");
}
