/* The kernels in float32 with AVX-512. */

#include "kernel.h"

#ifdef KORET_HAS_KERNELS

#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "avx512.h"
#include "float32.h"
#include "exponential.h"
#include "attention.h"
#include "activation.h"

static int
is_supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

const Kernel koret_float32_avx512 = {"float32, AVX-512", is_supported, count_bytes, run, activate};

#endif
