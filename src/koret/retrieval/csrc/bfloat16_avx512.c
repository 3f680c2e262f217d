/* The kernels in bfloat16 with AVX-512's products of pairs: sums, softmax and GELU in float32, P and dS rounded. */

#include "kernel.h"

#ifdef KORET_HAS_KERNELS

#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

#include "avx512.h"

typedef uint16_t number;
typedef uint32_t word;
typedef __m512bh words_of;
enum { PER_WORD = 2 };

#define load_words(from) ((__m512bh)_mm512_load_si512(from))
#define fill_words(x) ((__m512bh)_mm512_set1_epi32((int)(x)))
#define multiply_add(a, b, sum) _mm512_dpbf16_ps(sum, a, b)

INLINE floats
read_lanes(const number *from)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE void
write_lanes(number *to, floats x)
{
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* count floats -> numbers, in words. */
INLINE const word *
round_rows(const float *rows, long count, number *narrow)
{
    for (long i = 0; i < count; i += LANES)
        _mm256_store_si256((void *)(narrow + i), (__m256i)_mm512_cvtneps_pbh(load(rows + i)));
    return (const word *)narrow;
}

/* 16 words: numbers of one row low, of another high. */
INLINE __m512i
join(__m256i low, __m256i high)
{
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* PER_WORD rows of n floats -> n words. */
INLINE void
join_rows(const float *rows, long n, word *out)
{
    for (long i = 0; i < n; i += LANES)
        _mm512_store_si512(out + i, join((__m256i)_mm512_cvtneps_pbh(load(rows + i)),
                                         (__m256i)_mm512_cvtneps_pbh(load(rows + n + i))));
}

/* PER_WORD rows of n numbers, of which `there` are (maybe none) and the rest are zeros -> n words. */
INLINE void
join_numbers(const number *rows, long step, long there, long n, word *out)
{
    const __m256i none = _mm256_setzero_si256();
    for (long i = 0; i < n; i += LANES)
        _mm512_store_si512(out + i, join(there > 0 ? _mm256_loadu_si256((const void *)(rows + i)) : none,
                                         there > 1 ? _mm256_loadu_si256((const void *)(rows + step + i)) : none));
}

/* A slope of GELU, of -0.13 to 1.13, is kept in a byte, in steps of 1 / 200 from -27 / 200 on: 0 and 1 are kept as they
 * are, others to 0.0025, where bfloat16 keeps those above 1 to 0.0039 and those from a half to 1 to 0.002. What is no
 * number is kept as 255. */
typedef uint8_t slope;

INLINE void
write_slopes(slope *to, floats x)
{
    const __m512i code = _mm512_cvtps_epi32(add_product(x, fill(200), fill(27))); /* NaN: the largest of all */
    _mm_storeu_si128((void *)to, _mm512_cvtusepi32_epi8(code));
}

INLINE floats
read_slopes(const slope *from)
{
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
    const __mmask16 none = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
    const floats x = (_mm512_cvtepi32_ps(code) - fill(27)) * fill(0.005f);
    return _mm512_mask_blend_ps(none, x, fill(__builtin_nanf("")));
}

#include "exponential.h"
#include "attention.h"
#include "activation.h"
#include "dropout.h"
#include "norm.h"

static int
is_supported(void)
{
    return supports_avx512() && __builtin_cpu_supports("avx512bf16");
}

const Kernel koret_bfloat16_avx512 = {
    "bfloat16, AVX-512", is_supported, count_bytes, run, sizeof(slope), activate, descend, draw, drop, normalize, descend_norm,
};

#endif
