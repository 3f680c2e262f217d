/* What a register of 8 floats can do: AVX2 with FMA. */

#include <immintrin.h>

typedef __m256 floats;
enum { LANES = 8, TILE_SUMS = 8 };
typedef uint32_t integers __attribute__((vector_size(4 * LANES)));

#define load(from) _mm256_load_ps(from)
#define store(to, x) _mm256_store_ps(to, x)
#define fill(x) _mm256_set1_ps(x)
#define largest(x, y) _mm256_max_ps(x, y)
#define add_product(x, y, z) _mm256_fmadd_ps(x, y, z)
#define multiply_even(x, y) (_mm256_mul_epu32((__m256i)(x), (__m256i)(y))) /* 32 bits of each 64, to 64 */
#define round_lanes(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

/* x * 2^whole: added to the exponent's bits. */
INLINE floats
shift_exponent(floats x, floats whole)
{
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), bits));
}

INLINE float
find_largest(floats x)
{
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

INLINE float
add_lanes(floats x)
{
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

/* x with the lanes from count on (maybe none or all) from y. */
INLINE floats
replace_lanes(floats x, long count, floats y)
{
    const __m256 lanes = _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(lanes, fill((float)count), _CMP_LT_OQ));
}

/* The first words of 32 bits of many: never fewer than LANES. */
#define load_first(from, count) ((void)(count), _mm256_loadu_ps(from))

/* Row i, lane j -> row j, lane i. */
INLINE void
transpose(floats *x)
{
    __m256d pairs[LANES];
    floats fours[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = (__m256d)_mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = (__m256d)_mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = (floats)_mm256_unpacklo_pd(pairs[i + j], pairs[i + 2 + j]);
            fours[i + 2 * j + 1] = (floats)_mm256_unpackhi_pd(pairs[i + j], pairs[i + 2 + j]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        x[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
        x[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
    }
}

/* Lanes of one where x has its sign set, of the other where not. */
INLINE floats
choose_by_sign(floats x, floats negative, floats positive)
{
    return _mm256_blendv_ps(positive, negative, x);
}

typedef uint8_t lane_bits; /* one for each lane */

/* Draws are of 16 bits: as signed numbers they compare alike. */
INLINE lane_bits
find_kept(integers draws, uint32_t least)
{
    const __m256i kept = _mm256_cmpgt_epi32((__m256i)draws, _mm256_set1_epi32((int)least - 1));
    return (lane_bits)_mm256_movemask_ps(_mm256_castsi256_ps(kept));
}

/* x where its bit is set, else 0. */
INLINE floats
keep_by_bits(floats x, lane_bits kept)
{
    const __m256i own = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(kept), own);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own)));
}
