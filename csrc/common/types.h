/* Integers of fixed width: NVRTC compiles without the system's headers. */
#ifndef RADIO_FAST_TYPES_H
#define RADIO_FAST_TYPES_H

#ifdef __CUDACC_RTC__
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifdef __CUDACC__
#define RF_BOTH __host__ __device__
#else
#define RF_BOTH
#endif

#endif
