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

/* The first `count` words of 32 bits of many, zeros where there are fewer than LANES. */
INLINE floats
load_first(const void *from, long count)
{
    return count >= LANES ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}

/* Row i, lane j -> row j, lane i. */
INLINE void
transpose(floats *x)
{
    __m512d pairs[LANES];
    floats fours[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = (__m512d)_mm512_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = (__m512d)_mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = (floats)_mm512_unpacklo_pd(pairs[i + j], pairs[i + 2 + j]);
            fours[i + 2 * j + 1] = (floats)_mm512_unpackhi_pd(pairs[i + j], pairs[i + 2 + j]);
        }
    /* fours[4 i + j] holds in its quarter q the lanes 4 q + j of the rows 4 i to 4 i + 3 */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const floats even_low = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
        const floats even_high = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
        const floats odd_low = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
        const floats odd_high = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
        x[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        x[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        x[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        x[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
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
