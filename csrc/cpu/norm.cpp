/* LayerNorm over rows, alone or in one pass with the residual add before it: what plain torch reads and writes four times.
 *
 * A row is kept in float32 in L1 between the three looks at it: sum, squares about the mean, result.
 */
#include "cpu.h"

#include "amx.h"

namespace rf {
namespace {

using namespace amx;

constexpr int64_t ROWS = 16;  // one item: 16 × 768 values take 3 µs

struct Problem {
    const void *x, *y, *weight, *bias;
    void *sum, *out;
    int64_t rows, D, stride_x, stride_y;
    float eps, scale;
};

template <class T>
struct Values;

template <>
struct Values<float> {
    static __m512 load(const float *at, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at); }
    static __m512 store(float *at, __mmask16 mask, __m512 x) {
        _mm512_mask_storeu_ps(at, mask, x);
        return x;
    }
};

template <>
struct Values<bf16> {
    static __m512 load(const bf16 *at, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, at)); }
    static __m512 store(bf16 *at, __mmask16 mask, __m512 x) {
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
        _mm256_mask_storeu_epi16(at, mask, rounded);
        return widen(rounded);
    }
};

template <class T, class W>
struct Body {
    const Problem &p;

    void give_up() {}

    struct Local {
        const Problem &p;
        float *row;

        explicit Local(Body &body) : p(body.p), row((float *)scratch(0, (body.p.D + 16) * 4)) {}
        bool ready() const { return row != nullptr; }

        __mmask16 mask(int64_t i) const { return lanes(p.D - i); }

        void run(int64_t item) {
            const int64_t end = (item + 1) * ROWS < p.rows ? (item + 1) * ROWS : p.rows;
            for (int64_t r = item * ROWS; r < end; r++) normalise(r);
        }

        /* The weight's or bias' values i…i + 15, as T. */
        __m512 parameters(const void *from, int64_t i) const {
            __m512 x = Values<W>::load((const W *)from + i, mask(i));
            return sizeof(T) < sizeof(W) ? widen((__m256i)_mm512_cvtneps_pbh(x)) : x;
        }

        void normalise(int64_t r) {
            const T *x = (const T *)p.x + r * p.stride_x, *y = p.y ? (const T *)p.y + r * p.stride_y : nullptr;
            T *sum = p.sum ? (T *)p.sum + r * p.D : nullptr, *out = (T *)p.out + r * p.D;
            __m512 total = _mm512_setzero_ps();
            for (int64_t i = 0; i < p.D; i += 16) {
                __m512 s = Values<T>::load(x + i, mask(i));
                if (y) s = Values<T>::store(sum + i, mask(i), _mm512_add_ps(s, Values<T>::load(y + i, mask(i))));
                _mm512_store_ps(row + i, s);
                total = _mm512_add_ps(total, s);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / (float)p.D);
            __m512 squares = _mm512_setzero_ps();
            for (int64_t i = 0; i < p.D; i += 16) {
                __m512 d = _mm512_maskz_sub_ps(mask(i), _mm512_load_ps(row + i), mean);
                squares = _mm512_fmadd_ps(d, d, squares);
            }
            const float rstd = 1 / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / (float)p.D + p.eps);
            const __m512 by = _mm512_set1_ps(rstd), scale = _mm512_set1_ps(p.scale);
            for (int64_t i = 0; i < p.D; i += 16) {
                __m512 n = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row + i), mean), by);
                __m512 b = p.bias ? parameters(p.bias, i) : _mm512_setzero_ps();
                n = _mm512_fmadd_ps(n, parameters(p.weight, i), b);
                Values<T>::store(out + i, mask(i), _mm512_mul_ps(n, scale));
            }
        }
    };
};

}  // namespace
}  // namespace rf

rf_cpu_status rf_cpu_layer_norm(
    const void *x, const void *y, const void *weight, const void *bias, void *sum, void *out, int dtype, int weight_dtype,
    int64_t rows, int64_t D, int64_t stride_x, int64_t stride_y, float eps, float scale, int threads) {
    using namespace rf;
    clear_error();
    if (rows < 0 || D < 1 || threads < 1 || (dtype != RF_CPU_FLOAT32 && dtype != RF_CPU_BFLOAT16) || !y != !sum ||
        (weight_dtype != dtype && weight_dtype != RF_CPU_FLOAT32))
        return fail(RF_CPU_BAD_ARGUMENT, "rows of %lld in dtype %d", (long long)D, dtype);
    if (!*rf_cpu_features()) return fail(RF_CPU_UNSUPPORTED, "this CPU, or the system, has no AMX");
    if (!rows) return RF_CPU_OK;
    const Problem p{x, y, weight, bias, sum, out, rows, D, stride_x, stride_y, eps, scale};
    const int64_t items = (rows + ROWS - 1) / ROWS;
    auto run = [&](auto body) { return for_each(items, threads, body); };
    const bool done = dtype == RF_CPU_FLOAT32          ? run(Body<float, float>{p})
                      : weight_dtype == RF_CPU_FLOAT32 ? run(Body<bf16, float>{p})
                                                       : run(Body<bf16, bf16>{p});
    return done ? RF_CPU_OK : fail(RF_CPU_NO_MEMORY, "no memory for a row");
}
