/* A libcuda.so.1 without a GPU, that says what it is asked. FAKE_ARCHS="80,86": the devices; FAKE_FAIL="cuX 719": the
 * call that fails and its error; FAKE_NO_CONTEXT=1: the thread has no context yet. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int current;
static thread_local int has_context = !getenv("FAKE_NO_CONTEXT");

static int failing(const char *call) {
    const char *fail = getenv("FAKE_FAIL");
    return fail && !strncmp(fail, call, strlen(call)) && fail[strlen(call)] == ' ' ? atoi(fail + strlen(call)) : 0;
}

static int arch(int device) {
    const char *text = getenv("FAKE_ARCHS");
    while (device--) text = strchr(text, ',') + 1;
    return atoi(text);
}

extern "C" {

void fake_device(int device) { current = device; }

int cuGetErrorName(int error, const char **text) {
    *text = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : error == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : nullptr;
    return *text ? 0 : 1;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 719 ? "unspecified launch failure" : nullptr;
    return *text ? 0 : 1;
}

int cuCtxGetDevice(int *device) {
    if (!has_context) return 201;
    *device = current;
    return failing("cuCtxGetDevice");
}

int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) {
    *flags = 0;
    *active = !getenv("FAKE_NO_PRIMARY");
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    printf("retain %d\n", device);
    *context = &current;
    return 0;
}

int cuCtxSetCurrent(void *) {
    has_context = 1;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? arch(device) / 10 : attribute == 76 ? arch(device) % 10 : 101376;
    return failing("cuDeviceGetAttribute");
}

int cuLibraryLoadData(void **library, const void *code, int *, void **, unsigned, int *, void **, unsigned) {
    usleep(1000); /* time for other threads to get here too */
    printf("load %s\n", static_cast<const char *>(code));
    *library = const_cast<void *>(code);
    return failing("cuLibraryLoadData");
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    printf("kernel %s %s\n", static_cast<const char *>(library), name);
    *kernel = library;
    return failing("cuLibraryGetKernel");
}

#ifndef WITHOUT_SET_ATTRIBUTE
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    usleep(1000);
    printf("attribute %d %d %s %d\n", attribute, value, static_cast<const char *>(kernel), device);
    return failing("cuKernelSetAttribute");
}
#endif

int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    if (getenv("FAKE_QUIET")) return 0;
    int parameter;
    memcpy(&parameter, extra[1], sizeof parameter);
    printf("launch %s %u,%u,%u %u,%u,%u %u stream %p %s %d of %zu bytes\n", static_cast<const char *>(kernel), x, y, z,
           bx, by, bz, shared, stream, params ? "?" : "buffer", parameter, *static_cast<size_t *>(extra[3]));
    return failing("cuLaunchKernel");
}

} /* extern "C" */
