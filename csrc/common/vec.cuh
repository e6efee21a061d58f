/* Loads and stores of several values at once. */
#ifndef RADIO_FAST_VEC_CUH
#define RADIO_FAST_VEC_CUH

#include "mma.cuh"

namespace rf {

/* 16 bytes, or 16 zeros if not `valid`; both addresses divisible by 16. */
RF_DEVICE void copy_16_now(void *to, const void *from, bool valid) {
    *(uint4 *)to = valid ? *(const uint4 *)from : uint4{0, 0, 0, 0};
}

/* 8 bytes; the address divisible by 8. */
RF_DEVICE void load_8(uint32_t *r, const void *from) {
    const uint2 both = *(const uint2 *)from;
    r[0] = both.x;
    r[1] = both.y;
}

}  // namespace rf
#endif
