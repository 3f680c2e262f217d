/* The kernels in float32 with AVX-512. */

#include "kernel.h"

#ifdef KORET_HAS_KERNELS

#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

#include "avx512.h"
#include "float32.h"
#include "exponential.h"
#include "attention.h"
#include "activation.h"
#include "dropout.h"
#include "norm.h"

const Kernel koret_float32_avx512 = {
    "float32, AVX-512", supports_avx512, count_bytes, run, sizeof(slope), activate, descend, draw, drop, normalize, descend_norm,
};

#endif
