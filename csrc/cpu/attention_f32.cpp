/* Attention in float32 on AVX-512: softmax(q·kᵀ / √d + bias)·v of one head at a time.
 *
 * Queries are the lanes: 48 of them meet blocks of up to 128 keys, whose scores, a row of 48 for each key, are in L1. So
 * the softmax has no sums across lanes, and its weights are as they are wanted for the product with the values. Sums are
 * rescaled when a later block has a larger score (Milakov and Gimelshein, 2018).
 */
#include "attention.h"

#include "float32.h"

namespace rf {
namespace {

using namespace avx512;
using f32::LANES;

constexpr int KEYS = 128;
constexpr int64_t DEPTH = 32;  // of a head's values, of one sum

struct Body {
    const Attention &p;

    void give_up() {}

    struct Local {
        const Attention &p;
        const __m512 scale;  // 1/√d
        float *keys, *values, *queries, *scores, *sums, *largest, *total, *gathered;
        int64_t packed = -1;

        explicit Local(Body &body)
            : p(body.p), scale(_mm512_set1_ps((float)(1 / __builtin_sqrt((double)body.p.d)))) {
            const int64_t rows = (p.longest + 7) / 8 * 8, columns = (p.d + 15) / 16 * 16;
            const int64_t each = f32::WIDE * columns, all = 2 * each + f32::WIDE * KEYS + 2 * f32::WIDE + LANES * columns;
            queries = (float *)scratch(0, (all + 2 * rows * p.d) * sizeof(float));
            sums = queries + each, scores = sums + each, largest = scores + f32::WIDE * KEYS;
            total = largest + f32::WIDE, gathered = total + f32::WIDE;
            keys = gathered + LANES * columns, values = keys + rows * p.d;
        }
        bool ready() const { return queries != nullptr; }

        void copy(const float *from, float *to) const {
            for (int64_t i = 0; i < p.d; i += LANES) {
                const __mmask16 mask = lanes(p.d - i);
                _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_loadu_ps(mask, from + i));
            }
        }

        const float *row(const Sequence &tokens, int64_t i, int64_t head) const {
            return (const float *)p.qkv + tokens.row(i, head);
        }

        /* Keys and values one row after another; zeros for the keys that fill up the last eight. */
        void pack(const Sequence &tokens, int64_t head) {
            for (int64_t i = 0; i < tokens.count; i++) {
                copy(row(tokens, i, p.heads + head), keys + i * p.d);
                copy(row(tokens, i, 2 * p.heads + head), values + i * p.d);
            }
            for (int64_t i = tokens.count * p.d; i < (tokens.count + 7) / 8 * 8 * p.d; i++) keys[i] = 0;
        }

        /* 16 · V queries as columns. Those that are not there are zeros. */
        template <int V>
        void turn(const Sequence &tokens, int64_t head, int64_t first) {
            const int64_t pitch = (p.d + 15) / 16 * 16;
            for (int v = 0; v < V; v++) {
                const int64_t from = first + v * LANES, left = tokens.count - from;
                const int rows = left <= 0 ? 0 : left < LANES ? (int)left : LANES;
                for (int i = 0; i < rows; i++) copy(row(tokens, from + i, head), gathered + i * pitch);
                for (int64_t k = 0; k < p.d; k += LANES) {
                    __m512i words[16];
                    transpose_words((const char *)(gathered + k), 4 * pitch, rows, words);
                    for (int i = 0; i < LANES && k + i < p.d; i++)
                        _mm512_store_si512(queries + ((k + i) * V + v) * LANES, words[i]);
                }
            }
        }

        /* scores → scores / √d + bias, of `there` keys from `key` on: queries are the bias' rows. */
        template <int V>
        void add_bias(int64_t head, int64_t query, int64_t key, int there) {
            const int64_t side = p.window * p.window;
            for (int v = 0; v < V; v++) {
                const int64_t first = query + v * LANES, left = side - first;
                const int rows = left <= 0 ? 0 : left < LANES ? (int)left : LANES;
                for (int k = 0; k < there; k += LANES) {
                    alignas(64) float block[LANES * LANES];
                    const __mmask16 mask = lanes(there - k);
                    const float *from = (const float *)p.bias + (head * side + first) * side + key + k;
                    for (int i = 0; i < rows; i++)
                        _mm512_store_ps(block + i * LANES, _mm512_maskz_loadu_ps(mask, from + i * side));
                    __m512i words[16];
                    transpose_words((const char *)block, 64, rows, words);
                    for (int i = 0; i < LANES && k + i < there; i++) {
                        float *s = scores + ((k + i) * V + v) * LANES;
                        _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_load_ps(s), scale, _mm512_castsi512_ps(words[i])));
                    }
                }
            }
        }

        /* scores → weights of `there` keys; sums and totals so far are rescaled. */
        template <int V>
        void soften(int there, bool fresh) {
            const __m512 factor_of_scores = p.bias ? _mm512_set1_ps(1) : scale;
            __m512 most[V], sum[V];
            for (int v = 0; v < V; v++) most[v] = _mm512_set1_ps(-INFINITY);
            for (int k = 0; k < there; k++)
                for (int v = 0; v < V; v++) most[v] = _mm512_max_ps(most[v], _mm512_load_ps(scores + (k * V + v) * LANES));
            for (int v = 0; v < V; v++) {
                // Where a mask shuts out all of these keys: −∞ less −∞ would be NaN.
                most[v] = _mm512_max_ps(_mm512_mul_ps(most[v], factor_of_scores), _mm512_set1_ps(-3e38f));
                if (!fresh) most[v] = _mm512_max_ps(most[v], _mm512_load_ps(largest + v * LANES));
                sum[v] = _mm512_setzero_ps();
            }
            for (int k = 0; k < there; k++)
                for (int v = 0; v < V; v++) {
                    float *s = scores + (k * V + v) * LANES;
                    __m512 weight = f32::exp_of(_mm512_fmsub_ps(_mm512_load_ps(s), factor_of_scores, most[v]));
                    sum[v] = _mm512_add_ps(sum[v], weight);
                    _mm512_store_ps(s, weight);
                }
            for (int v = 0; v < V; v++) {
                if (!fresh) {
                    const __m512 factor = f32::exp_of(_mm512_sub_ps(_mm512_load_ps(largest + v * LANES), most[v]));
                    sum[v] = _mm512_fmadd_ps(_mm512_load_ps(total + v * LANES), factor, sum[v]);
                    for (int64_t i = 0; i < p.d; i++) {
                        float *at = sums + (i * V + v) * LANES;
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
                    }
                }
                _mm512_store_ps(largest + v * LANES, most[v]);
                _mm512_store_ps(total + v * LANES, sum[v]);
            }
        }

        template <int V>
        void attend(const Sequence &tokens, int64_t head, int64_t query) {
            turn<V>(tokens, head, query);
            const int64_t parts = (tokens.count + KEYS - 1) / KEYS, size = ((tokens.count + parts - 1) / parts + 7) / 8 * 8;
            for (int64_t key = 0; key < tokens.count; key += size) {
                const int there = (int)(tokens.count - key < size ? tokens.count - key : size);
                for (int k = 0; k < there; k += 8)  // in sums of so few products that they are as exact as torch's
                    for (int64_t i = 0; i < p.d; i += DEPTH)
                        f32::multiply<8, V, true>(
                            keys + (key + k) * p.d + i, p.d, 1, queries + i * V * LANES, p.d - i < DEPTH ? p.d - i : DEPTH,
                            scores + k * V * LANES, i == 0);
                if (p.bias) add_bias<V>(head, query, key, there);
                soften<V>(there, key == 0);
                for (int64_t i = 0; i < p.d; i += 8)
                    f32::multiply<8, V, false>(
                        values + key * p.d + i, 1, p.d, scores, there, sums + i * V * LANES, key == 0);
            }
            for (int v = 0; v < V; v++) {
                const int64_t from = query + v * LANES;
                const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(total + v * LANES));
                for (int64_t k = 0; k < p.d; k += LANES) {
                    const int rows = p.d - k < LANES ? (int)(p.d - k) : LANES;
                    for (int i = 0; i < rows; i++) {
                        float *at = sums + ((k + i) * V + v) * LANES;
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
                    }
                    __m512i words[16];
                    transpose_words((const char *)(sums + (k * V + v) * LANES), 64 * V, rows, words);
                    for (int i = 0; i < LANES && from + i < tokens.count; i++) {
                        float *to = (float *)p.out + tokens.result(from + i) + head * p.d + k;
                        _mm512_mask_storeu_ps(to, lanes(p.d - k), _mm512_castsi512_ps(words[i]));
                    }
                }
            }
        }

        void run(int64_t item) {
            const Part part(p, item, LANES);
            const Sequence &tokens = part.tokens;
            if (part.from == part.to) return;
            if (packed != part.pair) pack(tokens, part.head);
            packed = part.pair;
            for (int64_t block = part.from; block < part.to;) {
                const int64_t left = part.to - block;
                const int width = left == 4 || left == 2 ? 2 : left > 2 ? 3 : 1;
                if (width == 3)
                    attend<3>(tokens, part.head, block * LANES);
                else if (width == 2)
                    attend<2>(tokens, part.head, block * LANES);
                else
                    attend<1>(tokens, part.head, block * LANES);
                block += width;
            }
        }
    };
};

}  // namespace

rf_cpu_status attention_f32(Attention &p, int threads) {
    p.split(threads, 256);
    Body body{p};
    bool done = for_each(p.sequences * p.heads * p.splits, threads, body);
    return done ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for the keys and values of a head");
}

}  // namespace rf
