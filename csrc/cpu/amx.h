/* AMX tiles, and bfloat16's arithmetic on AVX-512. Include only from files that are run after `has_amx`. */
#ifndef RADIO_FAST_CPU_AMX_H
#define RADIO_FAST_CPU_AMX_H

#include <atomic>

#include "avx512.h"

/* Everything below, and in the files that include this, is compiled for a CPU with AMX. */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8,fma,avx2,bmi2,prfchw")

namespace rf {
namespace amx {

using namespace avx512;

typedef uint16_t bf16;
constexpr int TILE = 1024;  // bytes: 16 rows of 64

/* Tiles of 16 rows of 64 bytes while it lives; the state is released at the end, or every context switch would save it. */
struct Tiles {
    Tiles() {
        struct alignas(64) Config {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        };
        static const Config config = {
            1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

/* The compiler does not know that the tile instructions read and write memory. */
inline void order_memory() { std::atomic_signal_fence(std::memory_order_seq_cst); }

/* Tiles 0 to 3: 2 × 2 of sums, one after another in memory. */
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load_sums(const float *sums) {
    order_memory();
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}

inline void store_sums(float *sums) {
    order_memory();
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    order_memory();
}

inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* x · Φ(x) with Φ(x) = ½ + x · P(x²) to |x| = 4.75, where it is 1.2e-6 from its end: off by 1e-6, below −4.75, where it is
 * −5.5e-6 instead of what vanishes, by 6e-6. NaN, the second of max's operands, stays NaN. */
inline __m512 gelu(__m512 x) {
    constexpr float END = 4.75f;
    constexpr float P[] = {0.1487480103969574f,     -0.07366643846035004f,  0.05325455218553543f,
                           -0.04060446470975876f,   0.030202466994524002f,  -0.021351953968405724f,
                           0.01411155704408884f,    -0.008102214895188808f, 0.004025669768452644f,
                           -0.0025480797048658133f, 0.0017569295596331358f, -0.0005631232052110136f};
    x = _mm512_max_ps(_mm512_set1_ps(-END), x);
    __m512 t = _mm512_min_ps(x, _mm512_set1_ps(END));
    __m512 u = _mm512_fmsub_ps(_mm512_mul_ps(t, t), _mm512_set1_ps(2 / (END * END)), _mm512_set1_ps(1));
    __m512 r = _mm512_set1_ps(P[11]);
    for (int i = 10; i >= 0; i--) r = _mm512_fmadd_ps(r, u, _mm512_set1_ps(P[i]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(t, r, _mm512_set1_ps(0.5f)));
}

/* 2^x, and 2⁻¹²⁶ for less, to 2⁻¹³: what comes of it is rounded to bfloat16, 2⁻⁹. NaN of NaN, max's second operand. */
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 r = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0558265f), _mm512_set1_ps(0.2401397f));
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.6931399f));
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.9999998f));
    return _mm512_scalef_ps(r, whole);
}

/* x · σ(x). */
inline __m512 silu(__m512 x) {
    __m512 e = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1)));
}

inline void store_tile(const __m512i words[16], char *tile) {
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 64 * i, words[i]);
}

}  // namespace amx
}  // namespace rf
#endif
