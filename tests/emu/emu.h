/* CUDA on the host, as far as the kernels in csrc use it: threads are fibres, a warp's common instructions wait for all
 * 32 lanes and are then done at once, in the lane layouts that the PTX ISA documents.
 *
 * It is built to be unkind: fibres run in an order that a seed decides, asynchronous copies arrive only when they are
 * waited for, shared memory is exactly as long as asked for and full of NaN. A missing barrier of the block, wait or mask
 * shows. A missing __syncwarp need not: every common instruction is a meeting of the lanes here, on a GPU it is not.
 */
#ifndef RADIO_FAST_EMU_H
#define RADIO_FAST_EMU_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#define RF_DEVICE inline
#define RF_SHARED(name) unsigned char *const name = ::emu::shared_memory()
#define RF_KERNEL(name, Params)                                                                    \
    static void name(const Params &p);                                                             \
    static ::emu::Registered registered_##name(                                                    \
        RF_SOURCE, #name, [](const void *params) { name(*(const Params *)params); });              \
    static void name(const Params &p)

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };

namespace emu {

struct Registered {
    Registered(const char *source, const char *kernel, void (*run)(const void *));
};

int thread();
int block();
unsigned char *shared_memory();

/* Wait for all threads of the block. */
void block_barrier();

/* Wait for all lanes of the warp, each with its own operands; the last to come runs `all` on the 32 of them. Lanes that
 * wait for different instructions are an error. */
void together(const char *instruction, void *operands, void (*all)(void *const *lanes));

void queue_copy(void *to, const void *from, bool valid);
void finish_copies();

[[noreturn]] void stop(const char *reason);

float half_to_float(uint16_t x);
uint16_t float_to_half(float x);
float bfloat_to_float(uint16_t x);
uint16_t float_to_bfloat(float x);

}  // namespace emu

namespace rf {

using std::max;
using std::min;

RF_DEVICE int thread() { return emu::thread(); }
RF_DEVICE int block() { return emu::block(); }
RF_DEVICE void sync_block() { emu::block_barrier(); }
RF_DEVICE float minus_infinity() { return -INFINITY; }
RF_DEVICE float exp2_fast(float x) { return exp2f(x); }
RF_DEVICE float exp2_exact(float x) { return exp2f(x); }
RF_DEVICE void copy_async_16(void *to, const void *from, bool valid) { emu::queue_copy(to, from, valid); }
RF_DEVICE void copy_async_wait() { emu::finish_copies(); }

void sync_warp();
float shuffle_xor(float x, int mask);
float shuffle(float x, int lane);

struct F16 {
    static float to_float(uint16_t x) { return emu::half_to_float(x); }
    static uint32_t pack(float low, float high) {
        return (uint32_t)emu::float_to_half(high) << 16 | emu::float_to_half(low);
    }
};

struct BF16 {
    static float to_float(uint16_t x) { return emu::bfloat_to_float(x); }
    static uint32_t pack(float low, float high) {
        return (uint32_t)emu::float_to_bfloat(high) << 16 | emu::float_to_bfloat(low);
    }
};

void mma_m16n8k16(F16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
void mma_m16n8k16(BF16, float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
void mma_m16n8k8(float *d, uint32_t a0, uint32_t a1, uint32_t b);
void mma_m8n8k4_col(float *d, const uint32_t *a, const uint32_t *b);
void mma_m8n8k4_row(float *d, const uint32_t *a, const uint32_t *b);
void load_matrices(uint32_t *r, const void *row);
void load_matrices_transposed(uint32_t *r, const void *row);

}  // namespace rf
#endif
