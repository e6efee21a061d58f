/* Attention for sm_80 and newer: mma.sync m16n8k16, cp.async, ldmatrix; float16 and bfloat16. */
#define RF_SOURCE "sm80"
#include "mma16.cuh"

namespace rf {

template <class T> struct Sm80 {
    using Type = T;
    static constexpr int PATH = 80;
    static RF_DEVICE void copy_16(void *to, const void *from, bool valid) { copy_async_16(to, from, valid); }
    static RF_DEVICE void copy_wait() { copy_async_wait(); }
    static RF_DEVICE void multiply(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
        mma_m16n8k16(T{}, d, a, b0, b1);
    }
};

}  // namespace rf

#define RF_SM80(DIM)                                                                               \
    RF_KERNEL(rf_sm80_f16_##DIM, rf::AttentionParams) { rf::flash<rf::Tile16<rf::Sm80<rf::F16>, DIM>, DIM>(p); } \
    RF_KERNEL(rf_sm80_bf16_##DIM, rf::AttentionParams) { rf::flash<rf::Tile16<rf::Sm80<rf::BF16>, DIM>, DIM>(p); }

RF_SM80(16)
RF_SM80(32)
RF_SM80(64)
RF_SM80(80)
RF_SM80(96)
