/* What the wrapped PTX instructions do, lane by lane, after the PTX ISA's "Warp-level matrix instructions". */
#include <bit>

#include "emu.h"

namespace emu {

float half_to_float(uint16_t x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                  : exponent == 0 ? ldexpf((float)mantissa, -24)
                                  : ldexpf((float)(1024 + mantissa), exponent - 25);
    return x >> 15 ? -value : value;
}

uint16_t float_to_half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = fabsf(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00; /* what rounds to 65536 */
    if (size < ldexpf(1.0f, -14)) return sign | (uint16_t)rintf(ldexpf(size, 24)); /* nearest, ties to even */
    int exponent;
    const float fraction = frexpf(size, &exponent); /* in [0.5, 1) */
    const int mantissa = (int)rintf(ldexpf(fraction, 11)); /* 1024 … 2048; 2048 carries into the exponent */
    return sign | (uint16_t)(((exponent + 14) << 10) + (mantissa - 1024));
}

float bfloat_to_float(uint16_t x) { return std::bit_cast<float>((uint32_t)x << 16); }

uint16_t float_to_bfloat(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

constexpr int WARP = 32;

struct Exchange {
    float value, result;
    int lane; /* to take from */
};

void exchange(void *const *lanes) {
    for (int i = 0; i < WARP; ++i) {
        Exchange &own = *(Exchange *)lanes[i];
        own.result = ((Exchange *)lanes[own.lane])->value;
    }
}

struct Multiply {
    float *d;
    const uint32_t *a, *b;
};

float half_of(uint32_t packed, int upper, bool bfloat) {
    const uint16_t bits = (uint16_t)(packed >> 16 * upper);
    return bfloat ? bfloat_to_float(bits) : half_to_float(bits);
}

/* m16n8kK, K = 8 or 16. With g = lane / 4 and t = lane % 4, register i of a has row g + 8·(i % 2), columns 2t + 8·(i / 2)
 * and the next; of b rows 2t + 8·i and the next, column g; d row g + 8·(i / 2), column 2t + i % 2. */
template <int K, bool BFLOAT>
void multiply_16(void *const *lanes) {
    float a[16][K], b[K][8];
    for (int lane = 0; lane < WARP; ++lane) {
        const Multiply &own = *(const Multiply *)lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < K / 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of(own.a[i], half, BFLOAT);
        for (int i = 0; i < K / 8; ++i)
            for (int half = 0; half < 2; ++half) b[2 * t + half + 8 * i][g] = half_of(own.b[i], half, BFLOAT);
    }
    for (int lane = 0; lane < WARP; ++lane) {
        float *const d = ((const Multiply *)lanes[lane])->d;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < K; ++k) d[i] += a[row][k] * b[k][column];
        }
    }
}

/* m8n8k4: lanes 4g … 4g + 3 and 16 + 4g … 16 + 4g + 3 are group g, and multiply by themselves. A lane has four neighbours
 * of row (a) or column (b, ROW false) lane % 4, + 4 in the upper half; of b by rows: row lane % 4, columns 0…3 or 4…7. */
template <bool ROW>
void multiply_8(void *const *lanes) {
    for (int group = 0; group < 4; ++group) {
        float a[8][4], b[4][8];
        for (int i = 0; i < 8; ++i) {
            const int lane = 4 * group + i % 4 + i / 4 * 16, upper = lane / 16 * 4, own = lane % 4;
            const Multiply &operands = *(const Multiply *)lanes[lane];
            for (int j = 0; j < 4; ++j) {
                a[own + upper][j] = half_of(operands.a[j / 2], j % 2, false);
                if (ROW)
                    b[own][j + upper] = half_of(operands.b[j / 2], j % 2, false);
                else
                    b[j][own + upper] = half_of(operands.b[j / 2], j % 2, false);
            }
        }
        for (int i = 0; i < 8; ++i) {
            const int lane = 4 * group + i % 4 + i / 4 * 16;
            float *const d = ((const Multiply *)lanes[lane])->d;
            for (int e = 0; e < 8; ++e) {
                const int row = (lane & 1) + (e & 2) + lane / 16 * 4, column = (e & 4) + (lane & 2) + (e & 1);
                for (int k = 0; k < 4; ++k) d[e] += a[row][k] * b[k][column];
            }
        }
    }
}

struct Matrices {
    uint32_t *r;
    const void *row;
};

template <bool TRANSPOSED>
void load_8x8(void *const *lanes) {
    for (int lane = 0; lane < WARP; ++lane) {
        const Matrices &own = *(const Matrices *)lanes[lane];
        if ((uintptr_t)own.row % 16) stop("ldmatrix of an unaligned row");
        for (int i = 0; i < 4; ++i) {
            uint32_t packed = 0;
            for (int half = 0; half < 2; ++half) {
                const int g = lane / 4, t = lane % 4 * 2 + half;
                const int row = TRANSPOSED ? t : g, column = TRANSPOSED ? g : t;
                const uint16_t *const from = (const uint16_t *)((const Matrices *)lanes[8 * i + row])->row;
                packed |= (uint32_t)from[column] << 16 * half;
            }
            own.r[i] = packed;
        }
    }
}

}  // namespace
}  // namespace emu

namespace rf {

using namespace emu;

void sync_warp() { together("__syncwarp", nullptr, [](void *const *) {}); }

float shuffle_xor(float x, int mask) {
    Exchange operands = {x, 0.0f, emu::thread() % WARP ^ mask};
    together("shfl.bfly", &operands, exchange);
    return operands.result;
}

float shuffle(float x, int lane) {
    Exchange operands = {x, 0.0f, lane};
    together("shfl.idx", &operands, exchange);
    return operands.result;
}

void mma_m16n8k16(F16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    Multiply operands = {d, a, b};
    together("mma.m16n8k16.f16", &operands, multiply_16<16, false>);
}

void mma_m16n8k16(BF16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    Multiply operands = {d, a, b};
    together("mma.m16n8k16.bf16", &operands, multiply_16<16, true>);
}

void mma_m16n8k8(float *d, uint32_t a0, uint32_t a1, uint32_t b) {
    const uint32_t a[2] = {a0, a1};
    Multiply operands = {d, a, &b};
    together("mma.m16n8k8", &operands, multiply_16<8, false>);
}

void mma_m8n8k4_col(float *d, const uint32_t *a, const uint32_t *b) {
    Multiply operands = {d, a, b};
    together("mma.m8n8k4.col", &operands, multiply_8<false>);
}

void mma_m8n8k4_row(float *d, const uint32_t *a, const uint32_t *b) {
    Multiply operands = {d, a, b};
    together("mma.m8n8k4.row", &operands, multiply_8<true>);
}

void load_matrices(uint32_t *r, const void *row) {
    Matrices operands = {r, row};
    together("ldmatrix", &operands, load_8x8<false>);
}

void load_matrices_transposed(uint32_t *r, const void *row) {
    Matrices operands = {r, row};
    together("ldmatrix.trans", &operands, load_8x8<true>);
}

}  // namespace rf
