/* float32 on AVX-512: products with their sums in registers, exponentials and activations to float32's precision. */
#ifndef RADIO_FAST_CPU_FLOAT32_H
#define RADIO_FAST_CPU_FLOAT32_H

#include "avx512.h"

namespace rf {
namespace f32 {

constexpr int LANES = 16;
constexpr int WIDE = 3 * LANES;  // of the largest product's columns: with 8 rows 24 sums, 3 operands, a value: 28 registers

/* sums[f][j] (+)= Σ_k w[f · across + k · along] · x[k][j] for F rows and 16 · V columns, which are what x's rows, and the
 * sums', have. */
template <int F, int V, bool ADJACENT>
inline __attribute__((always_inline)) void multiply(
    const float *w, int64_t across, int64_t along, const float *x, int64_t steps, float *sums, bool fresh) {
    __m512 c[F][V];
    for (int f = 0; f < F; f++)
        for (int v = 0; v < V; v++) c[f][v] = _mm512_setzero_ps();
    const float *rows[F];  // each its own register: eight that are added to would take the products' ports
    for (int f = 0; f < F; f++) rows[f] = w + f * across;
    for (int64_t k = 0; k < steps; k++, x += LANES * V, w += along) {
        __m512 columns[V];
        for (int v = 0; v < V; v++) columns[v] = _mm512_load_ps(x + LANES * v);
        for (int f = 0; f < F; f++) {
            const __m512 value = _mm512_set1_ps(ADJACENT ? rows[f][k] : w[f]);
            for (int v = 0; v < V; v++) c[f][v] = _mm512_fmadd_ps(value, columns[v], c[f][v]);
        }
    }
    for (int f = 0; f < F; f++)
        for (int v = 0; v < V; v++) {
            float *to = sums + (f * V + v) * LANES;
            _mm512_store_ps(to, fresh ? c[f][v] : _mm512_add_ps(_mm512_load_ps(to), c[f][v]));
        }
}

/* 2^x to 1 ulp; 0 below 2⁻¹²⁶, where to round costs the processor a hundred cycles. NaN of NaN. */
inline __m512 exp2_of(__m512 x) {
    constexpr float P[] = {1.0f,           0.6931472f,   0.24022646f,   0.055503286f,
                           0.009618489f,   0.0013399931f, 0.00015345808f};
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole), r = _mm512_set1_ps(P[6]);
    for (int i = 5; i >= 0; i--) r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(P[i]));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ), r, whole);
}

/* e^x of a difference x: of what it is taken from, log2(e) times as large, more would be rounded off. */
inline __m512 exp_of(__m512 x) { return exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

/* x · Φ(x). Φ(−t) = e^(−t²/2) · erfcx(t/√2)/2, whose second factor is to 1.4e-8 a polynomial in 1/(1 + t/4) as far as
 * e^(−t²/2) is not 0; for x > 0 it is x − x · Φ(−x). Off by 2.4e-7 at most, where erf's usual form is by 1.1e-6. */
inline __m512 gelu(__m512 x) {
    constexpr float P[] = {0.13928581774234772f,    0.18492455780506134f,     0.11026328802108765f,
                           0.0486452542245388f,     0.014785555191338062f,    0.0023918207734823227f,
                           -0.00015337573131546378f, -0.00014486581494566053f, -4.954126325174002e-06f,
                           6.9060529312992e-06f};
    const __m512 one = _mm512_set1_ps(1);
    __m512 t = _mm512_min_ps(_mm512_set1_ps(20), _mm512_abs_ps(x));  // NaN, the second of min's operands, stays NaN
    __m512 d = _mm512_fmadd_ps(t, _mm512_set1_ps(0.25f), one), v = _mm512_rcp14_ps(d);
    v = _mm512_fmadd_ps(_mm512_fnmadd_ps(d, v, one), v, v);
    __m512 u = _mm512_fmsub_ps(v, _mm512_set1_ps(2.5714285714f), _mm512_set1_ps(1.5714285714f));
    __m512 r = _mm512_set1_ps(P[9]);
    for (int i = 8; i >= 0; i--) r = _mm512_fmadd_ps(r, u, _mm512_set1_ps(P[i]));
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_mul_ps(t, t), _mm512_set1_ps(-0.72134752044f)));
    __m512 below = _mm512_mul_ps(x, _mm512_mul_ps(r, e));
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_sub_ps(below, positive, x, below);
}

/* x · σ(x). */
inline __m512 silu(__m512 x) {
    __m512 e = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1)));
}

}  // namespace f32
}  // namespace rf
#endif
