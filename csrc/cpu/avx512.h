/* What bfloat16's and float32's CPU kernels share: rows and columns of registers. */
#ifndef RADIO_FAST_CPU_AVX512_H
#define RADIO_FAST_CPU_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Everything below, and in the files that include this, is compiled for a CPU with AVX-512, whatever the compiler's flags. */
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,bmi2,prfchw")

namespace rf {
namespace avx512 {

/* The first of 16 lanes, `left` of them. */
inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* Of 16 rows of 64 bytes the 4-byte words 4q…4q + 3, each as a row. The first two of a plain transposition's four passes
 * of shuffles, for which there is but one port, are loads here. `rows` ≤ 16 of them are there, the others are zeros. */
inline __attribute__((always_inline)) void transpose_quarter(
    const char *from, int64_t stride, int q, __m512i out[4], int rows = 16) {
    __m512i v[4];
    for (int i = 0; i < 4; i++) {
        const char *p = from + i * stride + 16 * q;
        __m512i x = _mm512_setzero_si512();
        if (rows > i) x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)p), 0);
        if (rows > i + 4)
            x = _mm512_mask_broadcast_i32x4(x, 0x00f0, _mm_loadu_si128((const __m128i *)(p + 4 * stride)));
        if (rows > i + 8)
            x = _mm512_mask_broadcast_i32x4(x, 0x0f00, _mm_loadu_si128((const __m128i *)(p + 8 * stride)));
        if (rows > i + 12)
            x = _mm512_mask_broadcast_i32x4(x, 0xf000, _mm_loadu_si128((const __m128i *)(p + 12 * stride)));
        v[i] = x;  // the rows i, 4 + i, 8 + i, 12 + i
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

/* All 16 of them. */
inline void transpose_words(const char *from, int64_t stride, int rows, __m512i out[16]) {
    if (rows == 16) {
        for (int q = 0; q < 4; q++) transpose_quarter(from, stride, q, out + 4 * q);
    } else {
        for (int q = 0; q < 4; q++) transpose_quarter(from, stride, q, out + 4 * q, rows);
    }
}

}  // namespace avx512
}  // namespace rf
#endif
