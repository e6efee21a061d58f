/* A warp's 16 queries on tensor cores that multiply 16 × 8 tiles: sm_75 (k = 8) and sm_80 and newer (k = 16). */
#ifndef RADIO_FAST_MMA16_CUH
#define RADIO_FAST_MMA16_CUH

#include "flash.cuh"

namespace rf {

/* Device: Type, copy_16, copy_wait and multiply (a 16 × 16 of `a` times two columns of registers of b). */
template <class Device, int MAX_DIM>
struct Tile16 : Device {
    static constexpr int ROW_LANES_0 = 1, ROW_LANES_1 = 2; /* the four lanes of a row */
    uint32_t queries[MAX_DIM / 16][4];

    static RF_DEVICE int row(int r) { return thread() % 32 / 4 + 8 * r; }
    static RF_DEVICE int column(int e) { return e / 4 * 8 + thread() % 4 * 2 + (e & 1); }

    template <int DIM> RF_DEVICE void load_queries(const uint16_t *rows) {
        const int lane = thread() % 32;
        const uint16_t *const from = rows + (lane & 15) * pitch_of(DIM) + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) load_matrices(queries[k], from + 16 * k);
    }

    template <int DIM> RF_DEVICE void scores(const uint16_t *k_rows, float *s) {
        const int lane = thread() % 32;
        const uint16_t *const from = k_rows + ((lane & 7) + lane / 16 * 8) * pitch_of(DIM) + (lane & 8);
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
#pragma unroll
            for (int n = 0; n < ROWS / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, from + 16 * n * pitch_of(DIM) + 16 * k);
                Device::multiply(s + 8 * n, queries[k], b[0], b[1]);
                Device::multiply(s + 8 * n + 4, queries[k], b[2], b[3]);
            }
        }
    }

    /* outputs += weights · V. The scores' layout is that of a left operand, two tiles side by side. */
    template <int DIM> RF_DEVICE void weigh(const float *w, const uint16_t *v_rows, uint16_t *, float *outputs) {
        const int lane = thread() % 32;
        const uint16_t *const from = v_rows + (lane & 15) * pitch_of(DIM) + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < ROWS / 16; ++k) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = Device::Type::pack(w[8 * k + 2 * i], w[8 * k + 2 * i + 1]);
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, from + 16 * k * pitch_of(DIM) + 16 * n);
                Device::multiply(outputs + 8 * n, a, b[0], b[1]);
                Device::multiply(outputs + 8 * n + 4, a, b[2], b[3]);
            }
        }
    }
};

}  // namespace rf
#endif
