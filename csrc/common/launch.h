/* The way from an entry of the ABI to a kernel: the CUDA driver, or under test the host emulation. */
#ifndef RADIO_FAST_LAUNCH_H
#define RADIO_FAST_LAUNCH_H

#include <stddef.h>

#include "radio_fast.h"

namespace rf {

struct Device {
    int arch;           /* 10·major + minor of the compute capability */
    int shared_memory;  /* the most bytes of shared memory a block may ask for */
};

/* The device of the current CUDA context. */
rf_status current_device(Device *device);

struct Launch {
    const char *source;  /* the device source that has the kernel, "sm80" for csrc/attention/sm80.cu */
    const char *kernel;  /* its extern "C" name */
    unsigned grid;       /* blocks, in x alone */
    unsigned block;      /* threads a block */
    unsigned shared;     /* bytes of dynamic shared memory */
    void *stream;
};

/* Launch a kernel whose one parameter is a struct of `bytes` at `params`, from the newest image of its source that the
 * current device runs. */
rf_status launch(const Launch &what, const void *params, size_t bytes);

}  // namespace rf
#endif
