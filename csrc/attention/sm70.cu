/* Attention for sm_70: mma.sync m8n8k4, four at a time; float16 alone. No ldmatrix, no cp.async.
 *
 * The warp's 32 lanes are four groups of eight (lanes 0…3 and 16…19, and so on), each of which multiplies 8 × 8. They stand
 * two by two: groups 0 and 1 above each other, 2 and 3 to their right, 16 × 16 together.
 */
#define RF_SOURCE "sm70"
#include "flash.cuh"

namespace rf {

template <int MAX_DIM>
struct Tile8 {
    using Type = F16;
    static constexpr int PATH = 70;
    static constexpr int ROW_LANES_0 = 2, ROW_LANES_1 = 8;
    static constexpr int STAGE = ROWS + 8; /* columns of a row of weights, in the place of queries */
    uint32_t queries[MAX_DIM / 4][2];

    static RF_DEVICE void copy_16(void *to, const void *from, bool valid) { copy_16_now(to, from, valid); }
    static RF_DEVICE void copy_wait() {}

    static RF_DEVICE int lane() { return thread() % 32; }
    static RF_DEVICE int group() { return lane() / 4 % 4; }
    /* The row of a left operand, or the column of a right one, whose four neighbours this lane holds. */
    static RF_DEVICE int operand(int offset) { return offset + lane() % 4 + lane() / 16 * 4; }
    static RF_DEVICE int row(int r) { return group() % 2 * 8 + (lane() & 1) + lane() / 16 * 4 + 2 * r; }
    static RF_DEVICE int column(int e) { return e / 8 * 16 + group() / 2 * 8 + (e & 4) + (lane() & 2) + (e & 1); }

    template <int DIM> RF_DEVICE void load_queries(const uint16_t *rows) {
        const uint16_t *const from = rows + operand(group() % 2 * 8) * pitch_of(DIM);
#pragma unroll
        for (int k = 0; k < DIM / 4; ++k) load_8(queries[k], from + 4 * k);
    }

    template <int DIM> RF_DEVICE void scores(const uint16_t *k_rows, float *s) {
        const uint16_t *const from = k_rows + operand(group() / 2 * 8) * pitch_of(DIM);
#pragma unroll
        for (int k = 0; k < DIM / 4; ++k) {
#pragma unroll
            for (int n = 0; n < ROWS / 16; ++n) {
                uint32_t b[2];
                load_8(b, from + 16 * n * pitch_of(DIM) + 4 * k);
                mma_m8n8k4_col(s + 8 * n, queries[k], b);
            }
        }
    }

    /* outputs += weights · V. Weights change from the layout of results to that of operands through the stage. */
    template <int DIM> RF_DEVICE void weigh(const float *w, const uint16_t *v_rows, uint16_t *stage, float *outputs) {
        sync_warp();
#pragma unroll
        for (int e = 0; e < SCORES; e += 2)
            *(uint32_t *)(stage + row((e >> 1) & 1) * STAGE + column(e)) = Type::pack(w[e], w[e + 1]);
        sync_warp();
        const uint16_t *const weights = stage + operand(group() % 2 * 8) * STAGE;
        const uint16_t *const from = v_rows + lane() % 4 * pitch_of(DIM) + group() / 2 * 8 + lane() / 16 * 4;
#pragma unroll
        for (int k = 0; k < ROWS / 4; ++k) {
            uint32_t a[2];
            load_8(a, weights + 4 * k);
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                uint32_t b[2];
                load_8(b, from + 4 * k * pitch_of(DIM) + 16 * n);
                mma_m8n8k4_row(outputs + 8 * n, a, b);
            }
        }
    }
};

}  // namespace rf

#define RF_SM70(DIM) \
    RF_KERNEL(rf_sm70_f16_##DIM, rf::AttentionParams) { rf::flash<rf::Tile8<DIM>, DIM>(p); }

RF_SM70(16)
RF_SM70(32)
RF_SM70(64)
RF_SM70(80)
RF_SM70(96)
