/* Errors, threads, memory, and what the CPU has. */
#include "cpu.h"

#include <cpuid.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace rf {
namespace {

thread_local char last_error[512];

struct Memory {
    void *at = nullptr;
    size_t bytes = 0;
    ~Memory() { free(at); }
};
thread_local Memory memories[2];

}  // namespace

rf_cpu_status fail(rf_cpu_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

void clear_error() { last_error[0] = '\0'; }

void *scratch(int use, size_t bytes) {
    Memory &memory = memories[use];
    if (memory.bytes >= bytes) return memory.at;
    free(memory.at);
    constexpr size_t HUGE_PAGE = 2 << 20;
    size_t whole = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    memory.at = aligned_alloc(HUGE_PAGE, whole);
    memory.bytes = memory.at ? whole : 0;
    if (memory.at) madvise(memory.at, whole, MADV_HUGEPAGE);
    return memory.at;
}

void run_parallel(int threads, void (*body)(void *), void *argument) {
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    static const Parallel parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (threads > 1 && parallel)
        parallel(body, argument, (unsigned)threads, 0);
    else
        body(argument);
}

namespace {

bool amx_works() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
    if (!(tile && bf16 && int8) || !(b >> 16 & 1) || !__builtin_cpu_supports("avx512bw")) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

}  // namespace
}  // namespace rf

int rf_cpu_abi_version(void) { return RF_CPU_ABI_VERSION; }
const char *rf_cpu_last_error(void) { return rf::last_error; }
const char *rf_cpu_features(void) {
    static const bool amx = rf::amx_works();
    return amx ? "amx" : "";
}
