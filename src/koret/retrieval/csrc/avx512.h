/* What a register of 16 floats can do: AVX-512. */

#include <immintrin.h>

typedef __m512 floats;
enum { LANES = 16, TILE_SUMS = 16 };
typedef uint32_t integers __attribute__((vector_size(4 * LANES)));

#define load(from) _mm512_load_ps(from)
#define store(to, x) _mm512_store_ps(to, x)
#define fill(x) _mm512_set1_ps(x)
#define largest(x, y) _mm512_max_ps(x, y)
#define add_product(x, y, z) _mm512_fmadd_ps(x, y, z)
#define find_largest(x) _mm512_reduce_max_ps(x)
#define add_lanes(x) _mm512_reduce_add_ps(x)
#define multiply_even(x, y) (_mm512_mul_epu32((__m512i)(x), (__m512i)(y))) /* 32 bits of each 64, to 64 */
#define round_lanes(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define shift_exponent(x, whole) _mm512_scalef_ps(x, whole) /* x * 2^whole */

/* x with the lanes from count on (maybe none or all) from y. */
INLINE floats
replace_lanes(floats x, long count, floats y)
{
    const unsigned kept = count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
    return _mm512_mask_blend_ps((__mmask16)kept, y, x);
}

/* Lanes of one where x has its sign set, of the other where not. */
INLINE floats
choose_by_sign(floats x, floats negative, floats positive)
{
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), positive, negative);
}

static int
supports_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

typedef uint16_t lane_bits; /* one for each lane */

INLINE lane_bits
find_kept(integers draws, uint32_t least)
{
    return (lane_bits)_mm512_cmpge_epu32_mask((__m512i)draws, _mm512_set1_epi32((int)least));
}

/* x where its bit is set, else 0. */
INLINE floats
keep_by_bits(floats x, lane_bits kept)
{
    return _mm512_maskz_mov_ps((__mmask16)kept, x);
}
