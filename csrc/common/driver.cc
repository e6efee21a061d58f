/* The way to a kernel on a GPU: the CUDA driver, found at run time, and the images in this library.
 *
 * No CUDA header and nothing of libstdc++ is needed, so that one build serves every torch, CUDA and Python. The
 * prototypes are those of cuda.h 12.0…13.0; the types are spelled as what they are in the ABI.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "images.h"
#include "launch.h"
#include "status.h"

namespace {

using rf::fail;

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;

enum { CUDA_ERROR_INVALID_CONTEXT = 201 };
enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97 };
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
void *const LAUNCH_PARAM_END = nullptr;
void *const LAUNCH_PARAM_BUFFER_POINTER = reinterpret_cast<void *>(1);
void *const LAUNCH_PARAM_BUFFER_SIZE = reinterpret_cast<void *>(2);

struct Driver {
    CUresult (*cuGetErrorName)(CUresult, const char **);
    CUresult (*cuGetErrorString)(CUresult, const char **);
    CUresult (*cuCtxGetDevice)(CUdevice *);
    CUresult (*cuCtxSetCurrent)(CUcontext);
    CUresult (*cuDevicePrimaryCtxGetState)(CUdevice, unsigned *flags, int *active);
    CUresult (*cuDevicePrimaryCtxRetain)(CUcontext *, CUdevice);
    CUresult (*cuDeviceGetAttribute)(int *, int attribute, CUdevice);
    CUresult (*cuLibraryLoadData)(
        CUlibrary *, const void *code, int *jit_options, void **jit_values, unsigned jit_count, int *options,
        void **values, unsigned count);
    CUresult (*cuLibraryGetKernel)(CUkernel *, CUlibrary, const char *name);
    CUresult (*cuKernelSetAttribute)(int attribute, int value, CUkernel, CUdevice);
    CUresult (*cuLaunchKernel)(
        CUkernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
        unsigned block_z, unsigned shared, void *stream, void **params, void **extra);
} driver;

char driver_missing[512]; /* why the driver can't be used; "" if it can */

void load_driver() {
    void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *why = dlerror();
        snprintf(driver_missing, sizeof driver_missing, "no CUDA driver: %s", why ? why : "libcuda.so.1 not found");
        return;
    }
#define FIND(name)                                                                                            \
    if (!(*reinterpret_cast<void **>(&driver.name) = dlsym(handle, #name))) {                                 \
        snprintf(driver_missing, sizeof driver_missing,                                                       \
                 "the CUDA driver has no " #name ": it is older than CUDA 12.0, update it");                  \
        return;                                                                                               \
    }
    FIND(cuGetErrorName)
    FIND(cuGetErrorString)
    FIND(cuCtxGetDevice)
    FIND(cuCtxSetCurrent)
    FIND(cuDevicePrimaryCtxGetState)
    FIND(cuDevicePrimaryCtxRetain)
    FIND(cuDeviceGetAttribute)
    FIND(cuLibraryLoadData)
    FIND(cuLibraryGetKernel)
    FIND(cuKernelSetAttribute)
    FIND(cuLaunchKernel)
#undef FIND
}

rf_status have_driver() {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load_driver);
    return driver_missing[0] ? fail(RF_DRIVER, "%s", driver_missing) : RF_OK;
}

/* "cuX of what: CUDA_ERROR_… (its meaning)" */
rf_status refused(const char *call, const char *what, CUresult error) {
    const char *name = nullptr, *meaning = nullptr;
    driver.cuGetErrorName(error, &name);
    driver.cuGetErrorString(error, &meaning);
    return fail(RF_DRIVER, "%s%s%s: %s (%d%s%s)", call, *what ? " of " : "", what, name ? name : "CUDA error", error,
                meaning ? ", " : "", meaning ? meaning : "");
}

rf_status current_ordinal(CUdevice *ordinal) {
    CUresult error = driver.cuCtxGetDevice(ordinal);
    if (error == CUDA_ERROR_INVALID_CONTEXT) {
        /* A thread in which the CUDA runtime has done nothing yet has no context. The runtime, and so torch, takes it
         * to be on device 0 and would make that context current with its first call: the same is done here. */
        unsigned flags;
        int active = 0;
        CUcontext context;
        if (!driver.cuDevicePrimaryCtxGetState(0, &flags, &active) && active &&
            !driver.cuDevicePrimaryCtxRetain(&context, 0) && !driver.cuCtxSetCurrent(context))
            error = driver.cuCtxGetDevice(ordinal);
    }
    return error ? refused("cuCtxGetDevice", "", error) : RF_OK;
}

std::atomic<uint64_t> known[64]; /* by ordinal: arch << 32 | shared memory, 0 where not asked yet */

rf_status properties(CUdevice ordinal, rf::Device *device) {
    bool keep = ordinal >= 0 && ordinal < 64;
    uint64_t packed = keep ? known[ordinal].load(std::memory_order_relaxed) : 0;
    if (!packed) {
        int major = 0, minor = 0, shared = 0;
        CUresult error = driver.cuDeviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, ordinal);
        if (!error) error = driver.cuDeviceGetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, ordinal);
        if (!error) error = driver.cuDeviceGetAttribute(&shared, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, ordinal);
        if (error) return refused("cuDeviceGetAttribute", "", error);
        packed = uint64_t(10 * major + minor) << 32 | uint32_t(shared);
        if (keep) known[ordinal].store(packed, std::memory_order_relaxed);
    }
    device->arch = int(packed >> 32);
    device->shared_memory = int(uint32_t(packed));
    return RF_OK;
}

/* -- kernels: found once per device, then read without a lock ------------------------------------------------ */

struct Kernel {
    CUdevice ordinal;
    char *source, *name; /* copies: a caller may build names in a buffer */
    CUkernel handle;
    std::atomic<unsigned> shared; /* dynamic shared memory it has been allowed */
    Kernel *next;
};

std::atomic<Kernel *> buckets[256];
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* for everything that is written below */
CUlibrary *libraries;                              /* of each image, null where not loaded yet */

struct Lock {
    Lock() { pthread_mutex_lock(&mutex); }
    ~Lock() { pthread_mutex_unlock(&mutex); }
};

std::atomic<Kernel *> &bucket_of(CUdevice ordinal, const rf::Launch &what) {
    uint32_t hash = 2166136261u ^ uint32_t(ordinal);
    for (const char *c = what.kernel; *c; ++c) hash = (hash ^ uint8_t(*c)) * 16777619u; /* FNV-1a */
    return buckets[(hash ^ hash >> 16) % 256];
}

Kernel *find(Kernel *kernel, CUdevice ordinal, const rf::Launch &what) {
    while (kernel && (kernel->ordinal != ordinal || strcmp(kernel->name, what.kernel) != 0 ||
                      strcmp(kernel->source, what.source) != 0))
        kernel = kernel->next;
    return kernel;
}

/* The image that a device runs: cubins are compatible upwards within a major, so the largest minor up to its own. */
const rf::Image *image_for(const char *source, int arch) {
    const rf::Image *best = nullptr;
    for (const rf::Image *image = rf::images; image->source; ++image)
        if (!strcmp(image->source, source) && image->arch / 10 == arch / 10 && image->arch <= arch &&
            (!best || image->arch > best->arch))
            best = image;
    return best;
}

/* "75 80 90": the architectures of a source, or of all (null), ascending; "none" if there are none. */
void list_architectures(const char *source, char *text, size_t size) {
    size_t used = 0;
    int last = 0;
    text[0] = '\0';
    for (;;) {
        int next = 0;
        for (const rf::Image *image = rf::images; image->source; ++image)
            if ((!source || !strcmp(image->source, source)) && image->arch > last && (!next || image->arch < next))
                next = image->arch;
        if (!next || used + 12 > size) break;
        used += size_t(snprintf(text + used, size - used, "%s%d", used ? " " : "", next));
        last = next;
    }
    if (!used) snprintf(text, size, "none");
}

rf_status add(CUdevice ordinal, const rf::Launch &what, Kernel **added) {
    rf::Device device;
    if (rf_status status = properties(ordinal, &device)) return status;
    const rf::Image *image = image_for(what.source, device.arch);
    if (!image) {
        char archs[256];
        list_architectures(what.source, archs, sizeof archs);
        return fail(RF_UNSUPPORTED, "this build has no %s kernels for sm_%d (it has them for: %s)", what.source,
                    device.arch, archs);
    }
    if (!libraries) {
        size_t count = 1;
        for (const rf::Image *i = rf::images; i->source; ++i) ++count;
        libraries = static_cast<CUlibrary *>(calloc(count, sizeof *libraries));
        if (!libraries) return fail(RF_DRIVER, "out of memory");
    }
    CUlibrary &library = libraries[image - rf::images];
    if (!library) {
        CUlibrary loaded = nullptr;
        CUresult error = driver.cuLibraryLoadData(&loaded, image->data, nullptr, nullptr, 0, nullptr, nullptr, 0);
        if (error) {
            char of[64];
            snprintf(of, sizeof of, "%s for sm_%d", image->source, image->arch);
            return refused("cuLibraryLoadData", of, error);
        }
        library = loaded;
    }
    CUkernel handle = nullptr;
    if (CUresult error = driver.cuLibraryGetKernel(&handle, library, what.kernel))
        return refused("cuLibraryGetKernel", what.kernel, error);
    Kernel *kernel = static_cast<Kernel *>(calloc(1, sizeof *kernel));
    if (kernel) kernel->source = strdup(what.source);
    if (kernel) kernel->name = strdup(what.kernel);
    if (!kernel || !kernel->source || !kernel->name) return fail(RF_DRIVER, "out of memory");
    kernel->ordinal = ordinal;
    kernel->handle = handle;
    *added = kernel;
    return RF_OK;
}

rf_status kernel_of(CUdevice ordinal, const rf::Launch &what, Kernel **kernel) {
    std::atomic<Kernel *> &bucket = bucket_of(ordinal, what);
    if ((*kernel = find(bucket.load(std::memory_order_acquire), ordinal, what))) return RF_OK;
    Lock lock;
    Kernel *first = bucket.load(std::memory_order_relaxed);
    if ((*kernel = find(first, ordinal, what))) return RF_OK; /* another thread was faster */
    if (rf_status status = add(ordinal, what, kernel)) return status;
    (*kernel)->next = first;
    bucket.store(*kernel, std::memory_order_release);
    return RF_OK;
}

/* Beyond 48 KB a block gets only what its kernel has been allowed, on this device. Only ever raised: another thread may
 * be about to launch with more. */
rf_status allow_shared(Kernel *kernel, unsigned bytes) {
    if (bytes <= kernel->shared.load(std::memory_order_acquire)) return RF_OK;
    Lock lock;
    if (bytes <= kernel->shared.load(std::memory_order_relaxed)) return RF_OK;
    CUresult error =
        driver.cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES, int(bytes), kernel->handle, kernel->ordinal);
    if (error) {
        char of[256];
        snprintf(of, sizeof of, "%s to %u bytes of shared memory", kernel->name, bytes);
        return refused("cuKernelSetAttribute", of, error);
    }
    kernel->shared.store(bytes, std::memory_order_release);
    return RF_OK;
}

char all_architectures[256];

void list_all() { list_architectures(nullptr, all_architectures, sizeof all_architectures); }

}  // namespace

namespace rf {

rf_status current_device(Device *device) {
    CUdevice ordinal;
    if (rf_status status = have_driver()) return status;
    if (rf_status status = current_ordinal(&ordinal)) return status;
    return properties(ordinal, device);
}

rf_status launch(const Launch &what, const void *params, size_t bytes) {
    CUdevice ordinal;
    Kernel *kernel;
    if (rf_status status = have_driver()) return status;
    if (rf_status status = current_ordinal(&ordinal)) return status;
    if (rf_status status = kernel_of(ordinal, what, &kernel)) return status;
    if (rf_status status = allow_shared(kernel, what.shared)) return status;
    /* As a buffer with its size, not as a list of pointers: the driver then refuses a struct of another size. */
    void *extra[] = {LAUNCH_PARAM_BUFFER_POINTER, const_cast<void *>(params), LAUNCH_PARAM_BUFFER_SIZE, &bytes,
                     LAUNCH_PARAM_END};
    CUresult error = driver.cuLaunchKernel(kernel->handle, what.grid, 1, 1, what.block, 1, 1, what.shared, what.stream,
                                           nullptr, extra);
    if (error) {
        char of[256];
        snprintf(of, sizeof of, "%s (%u blocks of %u threads, %u bytes of shared memory)", what.kernel, what.grid,
                 what.block, what.shared);
        return refused("cuLaunchKernel", of, error);
    }
    return RF_OK;
}

}  // namespace rf

const char *rf_architectures(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, list_all);
    return all_architectures;
}
