/* Dropout by numbers that are a function of a seed and a place; of each, one bit is kept: whether its number stays.
 * They are Philox4x32-10's (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3): a block number and a key
 * of 64 bits each give four words, and a word is two draws of 16 bits. Of 128 places, which share 16 blocks, place
 * 32 w + 16 h + b takes half h (low, high) of word w of block b, whatever the width of a register. */

enum { ROUNDS = 10, BLOCKS = 16, WORDS = 4, DRAWS = 2 * WORDS * BLOCKS };

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

/* From place `first` on, a multiple of DRAWS: the draws of LANES places to their bits. */
INLINE void
write_bits(uint8_t *bits, long place, integers draws, uint32_t least)
{
    const lane_bits kept = find_kept(draws, least);
    memcpy(bits + place / 8, &kept, sizeof(kept));
}

/* x * factor where the bit of its place is set, else 0. */
INLINE floats
keep_lanes(floats x, float factor, const uint8_t *bits, long place)
{
    lane_bits kept;
    memcpy(&kept, bits + place / 8, sizeof(kept));
    return keep_by_bits(x * fill(factor), kept);
}

/* Bits of `count` places from place `first` on, a multiple of DRAWS. The last ones stand for no number: there is memory
 * for a whole number of DRAWS. */
TARGET static void
draw(const Numbers *all, long first, long count)
{
    integers words[WORDS];
    for (long at = first; at < first + count; at += DRAWS)
        for (int b = 0; b < BLOCKS; b += LANES) {
            draw_words(all->seed, (uint64_t)at / DRAWS * BLOCKS + b, words);
#pragma GCC unroll 4
            for (int w = 0; w < WORDS; w++) {
                const long low = at + 2 * BLOCKS * w + b, high = low + BLOCKS;
                write_bits(all->kept, low, words[w] & 0xffff, all->least);
                write_bits(all->kept, high, words[w] >> 16, all->least);
            }
        }
}

TARGET static void
drop(const Numbers *all, long first, long count)
{
    const number *x = (const number *)all->x + first;
    number *y = (number *)all->y + first;
    const long whole = count / LANES * LANES, left = count - whole;
    for (long i = 0; i < whole; i += LANES)
        write_lanes(y + i, keep_lanes(read_lanes(x + i), all->factor, all->kept, first + i));
    if (left) {
        number rest[LANES] = {0};
        memcpy(rest, x + whole, left * sizeof(number));
        write_lanes(rest, keep_lanes(read_lanes(rest), all->factor, all->kept, first + whole));
        memcpy(y + whole, rest, left * sizeof(number));
    }
}
