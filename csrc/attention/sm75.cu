/* Attention for sm_75: mma.sync m16n8k8, ldmatrix; float16 alone. Copies are ordinary loads and stores. */
#define RF_SOURCE "sm75"
#include "mma16.cuh"

namespace rf {

struct Sm75 {
    using Type = F16;
    static constexpr int PATH = 75;
    static RF_DEVICE void copy_16(void *to, const void *from, bool valid) { copy_16_now(to, from, valid); }
    static RF_DEVICE void copy_wait() {}
    static RF_DEVICE void multiply(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
        mma_m16n8k8(d, a[0], a[1], b0);
        mma_m16n8k8(d, a[2], a[3], b1);
    }
};

}  // namespace rf

#define RF_SM75(DIM) \
    RF_KERNEL(rf_sm75_f16_##DIM, rf::AttentionParams) { rf::flash<rf::Tile16<rf::Sm75, DIM>, DIM>(p); }

RF_SM75(16)
RF_SM75(32)
RF_SM75(64)
RF_SM75(80)
RF_SM75(96)
