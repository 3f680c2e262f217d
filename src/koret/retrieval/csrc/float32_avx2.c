/* The kernels in float32 with AVX2. */

#include "kernel.h"

#ifdef KORET_HAS_KERNELS

#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))

#include "avx2.h"
#include "float32.h"
#include "exponential.h"
#include "attention.h"
#include "activation.h"
#include "dropout.h"
#include "norm.h"

static int
is_supported(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const Kernel koret_float32_avx2 = {
    "float32, AVX2", is_supported, count_bytes, run, sizeof(slope), activate, descend, draw, drop, normalize, descend_norm,
};

#endif
