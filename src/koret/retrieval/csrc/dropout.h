/* Dropout by numbers that are a function of a seed and a place, so that no mask is kept: the backward pass draws them
 * again. They are Philox4x32-10's (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3): a block number and
 * a key of 64 bits each give four words, and a word is two draws of 16 bits. Of 128 places, which share 16 blocks, place
 * 32 w + 16 h + b takes half h (low, high) of word w of block b, whatever the width of a register. */

enum { ROUNDS = 10, BLOCKS = 16, WORDS = 4, DRAWS = 2 * WORDS * BLOCKS };

typedef uint32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint64_t products __attribute__((vector_size(4 * LANES)));

/* x * factor in each lane: its upper and its lower word. */
INLINE void
multiply_words(integers x, uint32_t factor, integers *upper, integers *lower)
{
    const products factors = (products){0} + factor, low = (products){0} + 0xffffffff;
    const products even = (products)multiply_even((products)x, factors);
    const products odd = (products)multiply_even((products)x >> 32, factors);
    *upper = (integers)(even >> 32 | (odd & ~low));
    *lower = (integers)((even & low) | odd << 32);
}

/* The words of LANES blocks from `first` on, which is a multiple of LANES. */
INLINE void
draw_words(uint64_t seed, uint64_t first, integers words[WORDS])
{
    uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
    integers x0, x1 = (integers){0} + (uint32_t)(first >> 32), x2 = {0}, x3 = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        x0[i] = (uint32_t)first + i;
    for (int r = 0; r < ROUNDS; r++) {
        integers upper_0, lower_0, upper_2, lower_2;
        multiply_words(x0, 0xd2511f53, &upper_0, &lower_0);
        multiply_words(x2, 0xcd9e8d57, &upper_2, &lower_2);
        x0 = upper_2 ^ x1 ^ key_0;
        x2 = upper_0 ^ x3 ^ key_1;
        x1 = lower_2;
        x3 = lower_0;
        key_0 += 0x9e3779b9;
        key_1 += 0xbb67ae85;
    }
    words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

/* x * factor where the draw is at least `least`, else 0. */
INLINE floats
keep_lanes(floats x, float factor, integers draws, uint32_t least)
{
    const integers kept = (integers)(draws >= least);
    return (floats)((integers)(x * fill(factor)) & kept);
}

/* From place `first` on, a multiple of DRAWS. */
TARGET static void
drop(const Numbers *all, long first, long count)
{
    const number *x = (const number *)all->x + first;
    number *y = (number *)all->y + first;
    integers words[WORDS];
    for (long at = 0; at < count; at += DRAWS) {
        number rest[DRAWS] = {0};
        const long there = count - at < DRAWS ? count - at : DRAWS;
        const number *in = x + at;
        number *out = y + at;
        if (there < DRAWS) {
            memcpy(rest, in, there * sizeof(number));
            in = out = rest;
        }
        for (int b = 0; b < BLOCKS; b += LANES) {
            draw_words(all->seed, (uint64_t)(first + at) / DRAWS * BLOCKS + b, words);
#pragma GCC unroll 4
            for (int w = 0; w < WORDS; w++) {
                const long low = 2 * BLOCKS * w + b, high = low + BLOCKS;
                write_lanes(out + low, keep_lanes(read_lanes(in + low), all->factor, words[w] & 0xffff, all->least));
                write_lanes(out + high, keep_lanes(read_lanes(in + high), all->factor, words[w] >> 16, all->least));
            }
        }
        if (there < DRAWS)
            memcpy(y + at, rest, there * sizeof(number));
    }
}
