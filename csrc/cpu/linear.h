/* What linear.cpp hands to linear_rows.cpp and linear_f32.cpp. */
#ifndef RADIO_FAST_CPU_LINEAR_H
#define RADIO_FAST_CPU_LINEAR_H

#include "cpu.h"

namespace rf {

/* rf_cpu_linear's arguments, looked at; M and N are not 0. */
struct Linear {
    const void *x, *weight;
    const float *bias;
    const void *residual;
    void *out;
    int64_t M, N, K, stride_x, stride_w, stride_r, stride_o;
};

rf_cpu_status linear_rows(const Linear &layer, int weight_dtype, int activation, int threads);
rf_cpu_status linear_f32(const Linear &layer, int activation, int threads);

}  // namespace rf
#endif
