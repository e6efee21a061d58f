/* Every PTX instruction that the kernels use, wrapped once. Under RF_EMULATE the host emulation takes their place. */
#ifndef RADIO_FAST_MMA_CUH
#define RADIO_FAST_MMA_CUH

#include "types.h"

#ifdef RF_EMULATE
#include "emu.h"
#else

#define RF_DEVICE __device__ __forceinline__
#define RF_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
/* A kernel of THREADS threads by its plain name, so that the host finds it in the image. Registers for two
 * blocks a multiprocessor are asked for; told nothing, ptxas aims for more blocks and spills. */
#define RF_KERNEL(name, Params) \
    extern "C" __global__ void __launch_bounds__(rf::THREADS, 2) name(const __grid_constant__ Params p)

namespace rf {

RF_DEVICE int thread() { return threadIdx.x; }
RF_DEVICE int block() { return blockIdx.x; }
RF_DEVICE void sync_block() { __syncthreads(); }
RF_DEVICE void sync_warp() { __syncwarp(); }
RF_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
RF_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
RF_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

RF_DEVICE uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

/* 2ˣ, to within two units of the last place; 0 for −∞. */
RF_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 2ˣ as exact as float32 has it. */
RF_DEVICE float exp2_exact(float x) { return exp2f(x); }

/* -- conversions: two neighbours in one register, the first in its lower half ---------------------------------- */

struct F16 {
    static RF_DEVICE float to_float(uint16_t x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static RF_DEVICE uint32_t pack(float low, float high) {
        uint16_t l, h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
        return (uint32_t)h << 16 | l;
    }
};

struct BF16 { /* pack: on sm_80 and newer */
    static RF_DEVICE float to_float(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
    static RF_DEVICE uint32_t pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
        uint32_t y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
#else
        return 0;  /* no kernel for older GPUs takes bfloat16 */
#endif
    }
};

/* -- matrix products: d += a·b, lane layouts as in the PTX ISA, "Warp-level matrix instructions" ----------------- */

#if __CUDA_ARCH__ >= 800
RF_DEVICE void mma_m16n8k16(F16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

RF_DEVICE void mma_m16n8k16(BF16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* -- copies from global to shared memory that go on while the thread does ---------------------------------------- */

/* 16 bytes, or 16 zeros if not `valid`; both addresses divisible by 16. `from` is read only if valid. */
RF_DEVICE void copy_async_16(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

/* Wait for all of this thread's copies. */
RF_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

#if __CUDA_ARCH__ >= 750
RF_DEVICE void mma_m16n8k8(float *d, uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}

/* Four 8 × 8 matrices of 16-bit values; lane 8·i + j gives the address of matrix i's row j. */
RF_DEVICE void load_matrices(uint32_t *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

RF_DEVICE void load_matrices_transposed(uint32_t *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
#endif

/* Four products at once, one for each group of eight lanes (0…3 and 16…19, 4…7 and 20…23, …). b's layout: its columns
 * (row.col) or its rows (row.row) are what a lane holds four neighbours of. */
RF_DEVICE void mma_m8n8k4_col(float *d, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11},"
        " {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

RF_DEVICE void mma_m8n8k4_row(float *d, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11},"
        " {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

}  // namespace rf
#endif

#endif
