/* Attention within each of many texts, for one type of numbers and one width of registers. Whoever includes this has
 * said what `number` is, how many of them are a `word` of 32 bits, and what a register of LANES floats can do.
 *
 * Nothing of the size of length x length is kept: scores live a few rows at a time, and the backward pass computes them
 * again (Dao 2023, arXiv 2307.08691, without its tiling of keys: a row of one text's scores stays in the processor's
 * cache). Everything is a product of rows with a packed matrix whose words lie along the output, so that one instruction
 * multiplies one word of a row with LANES of them and adds to LANES sums of float32:
 *
 *     forward   S = Q K^T             P = softmax(S / sqrt(D))       O = P V
 *     backward  dP = dO V^T           dS = P (dP - rowsum(P dP))     dQ = dS K / sqrt(D)
 *               dV = P^T dO           dK = dS^T Q / sqrt(D)
 *
 * Keys are padded to KEYS, rows to ROWS, with zeros; a padded key's probability is 0. */

#include <stdint.h>
#include <string.h>

enum { KEYS = 16, ROWS = 8, BLOCK = 32 /* rows whose P and dS are kept for dV and dK */ };
enum { FEW = 16 /* numbers copied at a time: heads have a multiple of them */ };

static inline long
round_up(long n, long step)
{
    return (n + step - 1) / step * step;
}

/* c (rows x columns registers) = a b, or c += a b. Rows of a lie `row` words apart, the words of one `step`. */
INLINE void
multiply_tile(const int rows, const int columns, long words, const word *a, long row, long step, const word *b,
              long b_row, float *c, long c_row, const int adds)
{
    floats sums[ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            sums[r][v] = adds ? load(c + r * c_row + v * LANES) : fill(0);
    for (long w = 0; w < words; w++) {
        words_of b_words[4];
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            b_words[v] = load_words(b + w * b_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const words_of a_word = fill_words(a[r * row + w * step]);
#pragma GCC unroll 4
            for (int v = 0; v < columns; v++)
                sums[r][v] = multiply_add(a_word, b_words[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            store(c + r * c_row + v * LANES, sums[r][v]);
}

/* c (rows, columns) = a b, or c += a b: rows a multiple of ROWS, columns of KEYS. */
INLINE void
multiply(long rows, long columns, long words, const word *a, long row, long step, const word *b, long b_row, float *c,
         long c_row, const int adds)
{
    long at = 0;
    if (TILE_SUMS >= 16)
        for (; at + 4 * LANES <= columns; at += 4 * LANES)
            for (long r = 0; r < rows; r += 4)
                multiply_tile(4, 4, words, a + r * row, row, step, b + at, b_row, c + r * c_row + at, c_row, adds);
    for (; at + 2 * LANES <= columns; at += 2 * LANES)
        for (long r = 0; r < rows; r += TILE_SUMS / 2)
            multiply_tile(TILE_SUMS / 2, 2, words, a + r * row, row, step, b + at, b_row, c + r * c_row + at, c_row,
                          adds);
    for (; at < columns; at += LANES)
        for (long r = 0; r < rows; r += ROWS)
            multiply_tile(ROWS, 1, words, a + r * row, row, step, b + at, b_row, c + r * c_row + at, c_row, adds);
}

/* n rows of `size` numbers, `step` apart -> one behind the other; zeros behind them. */
INLINE void
copy_rows(const number *x, long step, long n, long padded, long size, word *out)
{
    number *to = (number *)out;
    for (long r = 0; r < n; r++)
        for (long d = 0; d < size; d += FEW)
            memcpy(to + r * size + d, x + r * step + d, FEW * sizeof(number));
    for (long d = n * size; d < padded * size; d += FEW)
        memset(to + d, 0, FEW * sizeof(number));
}

/* The same -> (size / PER_WORD, padded) words: the numbers of a row stand below each other. */
INLINE void
pack_across(const number *x, long step, long n, long padded, long size, word *out)
{
    for (long w = 0; w < size / PER_WORD; w++) {
        for (long r = 0; r < n; r++)
            memcpy(out + w * padded + r, x + r * step + w * PER_WORD, sizeof(word));
        for (long r = n; r < padded; r++)
            out[w * padded + r] = 0;
    }
}

/* The same -> (padded / PER_WORD, size) words, each with the numbers of PER_WORD rows at one place. */
INLINE void
pack_along(const number *x, long step, long n, long padded, long size, word *out)
{
    for (long r = 0; r < padded; r += PER_WORD)
        join_numbers(x + r * step, step, n - r, size, out + r / PER_WORD * size);
}

/* A row of n scores -> e^(factor (score - largest)), 0 for padded keys; returns their sum. factor counts in powers of
 * two: it holds the scale and log2(e). */
INLINE float
exponentiate_row(float *row, long n, long padded, float factor)
{
    const long full = n / LANES * LANES; /* keys before the first register with padding */
    floats top = fill(-3e38f), sum = fill(0);
    for (long k = 0; k < full; k += LANES)
        top = largest(top, load(row + k));
    for (long k = full; k < n; k += LANES)
        top = largest(top, replace_lanes(load(row + k), n - k, fill(-3e38f)));
    const floats scale = fill(factor), shift = fill(-find_largest(top) * factor);
    for (long k = 0; k < full; k += LANES) {
        const floats e = exponentiate(add_product(load(row + k), scale, shift));
        store(row + k, e);
        sum += e;
    }
    for (long k = full; k < padded; k += LANES) {
        const floats e = exponentiate(add_product(load(row + k), scale, shift));
        const floats kept = replace_lanes(e, n - k, fill(0));
        store(row + k, kept);
        sum += kept;
    }
    return add_lanes(sum);
}

INLINE void
write_row(const float *row, long size, float factor, number *out)
{
    for (long d = 0; d < size; d += LANES)
        write_lanes(out + d, load(row + d) * fill(factor));
}

/* P and dS of one row: scores -> P, gradients of P -> dS, before the scale. */
INLINE void
differentiate_row(float *scores, float *gradients, long n, long padded, float factor)
{
    const floats share = fill(1 / exponentiate_row(scores, n, padded, factor));
    floats sum = fill(0);
    for (long k = 0; k < padded; k += LANES) {
        const floats p = load(scores + k) * share;
        store(scores + k, p);
        sum = add_product(p, load(gradients + k), sum);
    }
    const floats mean = fill(add_lanes(sum));
    for (long k = 0; k < padded; k += LANES)
        store(gradients + k, load(scores + k) * (load(gradients + k) - mean));
}

/* The next piece of a unit's memory, for so many values. */
#define TAKE(type, count) take_memory(&memory, (count) * sizeof(type))

static inline void *
take_memory(char **memory, size_t bytes)
{
    char *taken = *memory;
    *memory += round_up(bytes, 64);
    return taken;
}

/* Of all that run_forward or run_backward takes; the sanitizers of tests/retrieval/sanitized.c hold the two together. */
static size_t
count_bytes(const Task *task)
{
    const size_t keys = round_up(task->longest, KEYS), size = task->size;
    const size_t forward = 2 * keys * size + ROWS * (size + 2 * keys + size);
    const size_t backward = 5 * keys * size + BLOCK * (4 * size + 2 * keys) + ROWS * (3 * keys + size);
    return (task->gradient ? backward : forward) * sizeof(float) + 16 * 64;
}

INLINE float
invert_root(float x)
{
    return 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
}

TARGET static void
run_forward(const Task *task, long unit, char *memory)
{
    const long size = task->size, width = task->heads * size, step = 3 * width;
    const long first = task->bounds[unit / task->heads], n = task->bounds[unit / task->heads + 1] - first;
    const long keys = round_up(n, KEYS), at = unit % task->heads * size, words = size / PER_WORD;
    const number *x = (const number *)task->qkv + first * step + at;
    number *out = (number *)task->result + first * width + at;
    const float scale = invert_root(size);
    word *k = TAKE(word, keys * words), *v = TAKE(word, keys * words), *q = TAKE(word, ROWS * words);
    float *scores = TAKE(float, ROWS * keys), *mixed = TAKE(float, ROWS * size);
    number *narrow = TAKE(number, ROWS * keys);
    float sums[ROWS];

    pack_across(x + width, step, n, keys, size, k);
    pack_along(x + 2 * width, step, n, keys, size, v);
    for (long r = 0; r < n; r += ROWS) {
        const long rows = n - r < ROWS ? n - r : ROWS;
        copy_rows(x + r * step, step, rows, ROWS, size, q);
        multiply(ROWS, keys, words, q, words, 1, k, keys, scores, keys, 0);
        for (long i = 0; i < ROWS; i++)
            sums[i] = exponentiate_row(scores + i * keys, n, keys, scale * LOG2_E);
        const word *p = round_rows(scores, ROWS * keys, narrow);
        multiply(ROWS, size, keys / PER_WORD, p, keys / PER_WORD, 1, v, size, mixed, size, 0);
        for (long i = 0; i < rows; i++)
            write_row(mixed + i * size, size, 1 / sums[i], out + (r + i) * width);
    }
}

TARGET static void
run_backward(const Task *task, long unit, char *memory)
{
    const long size = task->size, width = task->heads * size, step = 3 * width;
    const long first = task->bounds[unit / task->heads], n = task->bounds[unit / task->heads + 1] - first;
    const long keys = round_up(n, KEYS), at = unit % task->heads * size, words = size / PER_WORD;
    const number *x = (const number *)task->qkv + first * step + at;
    const number *y = (const number *)task->gradient + first * width + at;
    number *out = (number *)task->result + first * step + at;
    const float scale = invert_root(size);
    /* K and V across, K along; dK and dV; Q and dO of a block as rows and along, its P and dS along; a few rows */
    word *k = TAKE(word, keys * words), *v = TAKE(word, keys * words), *k_along = TAKE(word, keys * words);
    float *dk = TAKE(float, keys * size), *dv = TAKE(float, keys * size);
    word *q = TAKE(word, BLOCK * words), *g = TAKE(word, BLOCK * words);
    word *q_along = TAKE(word, BLOCK * words), *g_along = TAKE(word, BLOCK * words);
    word *p_along = TAKE(word, BLOCK / PER_WORD * keys), *ds_along = TAKE(word, BLOCK / PER_WORD * keys);
    float *scores = TAKE(float, ROWS * keys), *gradients = TAKE(float, ROWS * keys), *dq = TAKE(float, ROWS * size);
    number *narrow = TAKE(number, ROWS * keys);

    pack_across(x + width, step, n, keys, size, k);
    pack_across(x + 2 * width, step, n, keys, size, v);
    pack_along(x + width, step, n, keys, size, k_along);
    memset(dk, 0, keys * size * sizeof(float));
    memset(dv, 0, keys * size * sizeof(float));
    for (long b = 0; b < n; b += BLOCK) {
        const long some = n - b < BLOCK ? n - b : BLOCK, rows = round_up(some, ROWS);
        copy_rows(x + b * step, step, some, rows, size, q);
        copy_rows(y + b * width, width, some, rows, size, g);
        pack_along(x + b * step, step, some, rows, size, q_along);
        pack_along(y + b * width, width, some, rows, size, g_along);
        for (long r = 0; r < rows; r += ROWS) {
            multiply(ROWS, keys, words, q + r * words, words, 1, k, keys, scores, keys, 0);
            multiply(ROWS, keys, words, g + r * words, words, 1, v, keys, gradients, keys, 0);
            for (long i = 0; i < ROWS; i++)
                differentiate_row(scores + i * keys, gradients + i * keys, n, keys, scale * LOG2_E);
            for (long i = 0; i < ROWS; i += PER_WORD) {
                join_rows(scores + i * keys, keys, p_along + (r + i) / PER_WORD * keys);
                join_rows(gradients + i * keys, keys, ds_along + (r + i) / PER_WORD * keys);
            }
            const word *ds = round_rows(gradients, ROWS * keys, narrow);
            multiply(ROWS, size, keys / PER_WORD, ds, keys / PER_WORD, 1, k_along, size, dq, size, 0);
            for (long i = 0; i < ROWS && r + i < some; i++)
                write_row(dq + i * size, size, scale, out + (b + r + i) * step);
        }
        multiply(keys, size, rows / PER_WORD, p_along, 1, keys, g_along, size, dv, size, 1);
        multiply(keys, size, rows / PER_WORD, ds_along, 1, keys, q_along, size, dk, size, 1);
    }
    for (long r = 0; r < n; r++) {
        write_row(dk + r * size, size, scale, out + r * step + width);
        write_row(dv + r * size, size, 1, out + r * step + 2 * width);
    }
}

static void
run(const Task *task, long unit, void *memory)
{
    if (task->gradient)
        run_backward(task, unit, memory);
    else
        run_forward(task, unit, memory);
}
