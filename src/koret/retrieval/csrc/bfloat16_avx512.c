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

/* Lanes of PER_WORD rows, rounded to numbers: written as those rows, `step` numbers apart, or as words. */
typedef __m512i rounded;
#define round_rows(rows) ((__m512i)_mm512_cvtne2ps_pbh((rows)[1], (rows)[0]))

INLINE void
write_rows(rounded x, number *to, long step)
{
    _mm256_storeu_si256((void *)to, _mm512_castsi512_si256(x));
    _mm256_storeu_si256((void *)(to + step), _mm512_extracti64x4_epi64(x, 1));
}

INLINE void
write_words(rounded x, word *to)
{
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i both = _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16));
    const __m512i places = _mm512_or_si512(both, _mm512_set1_epi32(16 << 16)); /* the second row: half a register on */
    _mm512_store_si512(to, _mm512_permutexvar_epi16(places, x));
}

/* PER_WORD rows of n numbers, of which `there` are (maybe none) and the rest are zeros -> n words. */
INLINE void
join_numbers(const number *rows, long step, long there, long n, word *out)
{
    const __m256i none = _mm256_setzero_si256();
    for (long i = 0; i < n; i += LANES)
        write_words(_mm512_inserti64x4(
                        _mm512_castsi256_si512(there > 0 ? _mm256_loadu_si256((const void *)(rows + i)) : none),
                        there > 1 ? _mm256_loadu_si256((const void *)(rows + step + i)) : none, 1),
                    out + i);
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
