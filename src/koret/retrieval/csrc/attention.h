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

enum { KEYS = 16, ROWS = 8, TOGETHER = 4 /* rows of softmax */ };
enum { BLOCK = 32 /* rows whose P and dS are kept for dV and dK */ };

#include "packing.h"

static inline long
round_up(long n, long step)
{
    return (n + step - 1) / step * step;
}

/* c (rows x columns registers) = a b, or c += a b. Rows of a lie `row` words apart, the words of one `step`; registers
 * of b that are below each other lie `b_row` words apart, and those beside each other `b_column`. */
INLINE void
multiply_tile(const int rows, const int columns, long words, const word *a, long row, long step, const word *b,
              long b_row, long b_column, float *c, long c_row, const int adds)
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
            b_words[v] = load_words(b + w * b_row + v * b_column);
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

/* A column of tiles, `columns` registers wide: as many rows in each as there are sums. */
#define MULTIPLY_COLUMN(tile_rows, columns) \
    for (long r = 0; r < rows; r += tile_rows) \
        multiply_tile(tile_rows, columns, words, a + r * row, row, step, b + at / LANES * b_column, b_row, b_column, \
                      c + r * c_row + at, c_row, adds)

/* c (rows, columns) = a b, or c += a b: rows a multiple of ROWS, columns of KEYS. */
INLINE void
multiply(long rows, long columns, long words, const word *a, long row, long step, const word *b, long b_row,
         long b_column, float *c, long c_row, const int adds)
{
    long at = 0;
    if (TILE_SUMS >= 16) {
        for (; at + 4 * LANES <= columns; at += 4 * LANES)
            MULTIPLY_COLUMN(4, 4);
        if (at + 3 * LANES == columns) {
            MULTIPLY_COLUMN(4, 3);
            return;
        }
    }
    for (; at + 2 * LANES <= columns; at += 2 * LANES)
        MULTIPLY_COLUMN(TILE_SUMS / 2, 2);
    for (; at < columns; at += LANES)
        MULTIPLY_COLUMN(ROWS, 1);
}

/* Of TOGETHER rows of n scores: what is added to each, times factor, so that the largest becomes 0. */
INLINE void
find_shifts(const float *scores, long n, long keys, float factor, floats *shifts)
{
    floats tops[TOGETHER];
    long k = 0;
    for (int i = 0; i < TOGETHER; i++)
        tops[i] = fill(-3e38f);
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < TOGETHER; i++)
            tops[i] = largest(tops[i], load(scores + i * keys + k));
    for (; k < n; k += LANES)
        for (int i = 0; i < TOGETHER; i++)
            tops[i] = largest(tops[i], replace_lanes(load(scores + i * keys + k), n - k, fill(-3e38f)));
    for (int i = 0; i < TOGETHER; i++)
        shifts[i] = fill(-find_largest(tops[i]) * factor);
}

/* One register of each of TOGETHER rows, in which `there` keys (maybe all) are no padding: see soften_rows. */
INLINE void
soften_keys(float *scores, const float *gradients, const int backward, long keys, long k, long there,
            floats scale, const floats *shifts, floats *sums, floats *dots)
{
    floats e[TOGETHER];
    for (long i = 0; i < TOGETHER; i++) {
        e[i] = exponentiate(add_product(load(scores + i * keys + k), scale, shifts[i]));
        if (there < LANES)
            e[i] = replace_lanes(e[i], there, fill(0));
        sums[i] += e[i];
        if (backward) {
            dots[i] = add_product(e[i], load(gradients + i * keys + k), dots[i]);
            store(scores + i * keys + k, e[i]);
        }
    }
    if (!backward)
        for (long i = 0; i < TOGETHER; i += PER_WORD)
            write_rows(round_rows(e + i), (number *)(scores + i * keys) + k, keys * PER_WORD);
}

/* TOGETHER rows of n scores -> e^(factor (score - largest)), 0 for padded keys, and their sums. factor counts in powers
 * of two: it holds the scale and log2(e). Forward they become numbers, each row where it began; backward they stay
 * floats, and dots are the sums of their products with gradients. One row alone would wait for its own sums. */
INLINE void
soften_rows(float *scores, const float *gradients, const int backward, long n, long keys, float factor, float *sums,
            float *dots)
{
    floats shifts[TOGETHER], lane_sums[TOGETHER], lane_dots[TOGETHER];
    long k = 0;
    find_shifts(scores, n, keys, factor, shifts);
    for (int i = 0; i < TOGETHER; i++)
        lane_sums[i] = lane_dots[i] = fill(0);
    for (; k + LANES <= n; k += LANES)
        soften_keys(scores, gradients, backward, keys, k, LANES, fill(factor), shifts, lane_sums, lane_dots);
    for (; k < keys; k += LANES)
        soften_keys(scores, gradients, backward, keys, k, n - k, fill(factor), shifts, lane_sums, lane_dots);
    for (int i = 0; i < TOGETHER; i++) {
        sums[i] = add_lanes(lane_sums[i]);
        if (backward)
            dots[i] = add_lanes(lane_dots[i]);
    }
}

INLINE void
write_row(const float *row, long size, float factor, number *out)
{
    for (long d = 0; d < size; d += LANES)
        write_lanes(out + d, load(row + d) * fill(factor));
}

/* TOGETHER rows of scores and of gradients of P -> words of P and dS for dV and dK, and dS as rows of numbers in place
 * of the gradients, before the scale. */
INLINE void
differentiate_rows(float *scores, float *gradients, long n, long keys, float factor, word *p_along, word *ds_along)
{
    float sums[TOGETHER], dots[TOGETHER];
    floats shares[TOGETHER], means[TOGETHER];
    soften_rows(scores, gradients, 1, n, keys, factor, sums, dots);
    for (int i = 0; i < TOGETHER; i++) {
        shares[i] = fill(1 / sums[i]);
        means[i] = fill(dots[i] / sums[i]);
    }
    for (long i = 0; i < TOGETHER; i += PER_WORD)
        for (long k = 0; k < keys; k += LANES) {
            floats p[PER_WORD], ds[PER_WORD];
            for (long j = 0; j < PER_WORD; j++) {
                p[j] = load(scores + (i + j) * keys + k) * shares[i + j];
                ds[j] = p[j] * (load(gradients + (i + j) * keys + k) - means[i + j]);
            }
            const rounded ds_numbers = round_rows(ds);
            write_words(round_rows(p), p_along + i / PER_WORD * keys + k);
            write_words(ds_numbers, ds_along + i / PER_WORD * keys + k);
            write_rows(ds_numbers, (number *)(gradients + i * keys) + k, keys * PER_WORD);
        }
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
    const size_t forward = 2 * keys * size + ROWS * (2 * size + keys);
    const size_t backward = 5 * keys * size + BLOCK * (4 * size + 2 * keys) + ROWS * (2 * keys + size);
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
    const Place place = find_place(task, unit), next = find_place(task, unit + (unit + 1 < task->units));
    const long size = task->size, words = size / PER_WORD, width = task->heads * size, step = 3 * width;
    const long n = place.n, keys = round_up(n, KEYS);
    const number *x = place.x;
    const float scale = invert_root(size);
    word *k = TAKE(word, keys * words), *v = TAKE(word, keys * words), *q = TAKE(word, ROWS * words);
    float *scores = TAKE(float, ROWS * keys), *mixed = TAKE(float, ROWS * size);
    float sums[ROWS];

    pack_across(x + width, step, n, keys, size, k);
    pack_along(x + 2 * width, step, n, keys, size, v);
    for (long r = 0; r < n; r += ROWS) {
        const long rows = n - r < ROWS ? n - r : ROWS;
        copy_rows(x + r * step, step, rows, ROWS, size, q);
        multiply(ROWS, keys, words, q, words, 1, k, LANES, words * LANES, scores, keys, 0);
        for (long i = 0; i < ROWS; i += TOGETHER) {
            fetch_rows(task, &next, r + i, 0);
            soften_rows(scores + i * keys, NULL, 0, n, keys, scale * LOG2_E, sums + i, NULL);
        }
        multiply(ROWS, size, keys / PER_WORD, (const word *)scores, keys, 1, v, size, LANES, mixed, size, 0);
        for (long i = 0; i < rows; i++)
            write_row(mixed + i * size, size, 1 / sums[i], place.out + (r + i) * width);
    }
}

TARGET static void
run_backward(const Task *task, long unit, char *memory)
{
    const Place place = find_place(task, unit), next = find_place(task, unit + (unit + 1 < task->units));
    const long size = task->size, words = size / PER_WORD, width = task->heads * size, step = 3 * width;
    const long n = place.n, keys = round_up(n, KEYS);
    const number *x = place.x, *y = place.y;
    const float scale = invert_root(size);
    /* K and V across, K along; dK and dV; Q and dO of a block as rows and along, its P and dS along; a few rows */
    word *k = TAKE(word, keys * words), *v = TAKE(word, keys * words), *k_along = TAKE(word, keys * words);
    float *dk = TAKE(float, keys * size), *dv = TAKE(float, keys * size);
    word *q = TAKE(word, BLOCK * words), *g = TAKE(word, BLOCK * words);
    word *q_along = TAKE(word, BLOCK * words), *g_along = TAKE(word, BLOCK * words);
    word *p_along = TAKE(word, BLOCK / PER_WORD * keys), *ds_along = TAKE(word, BLOCK / PER_WORD * keys);
    float *scores = TAKE(float, ROWS * keys), *gradients = TAKE(float, ROWS * keys), *dq = TAKE(float, ROWS * size);

    pack_across(x + width, step, n, keys, size, k);
    pack_across(x + 2 * width, step, n, keys, size, v);
    pack_along(x + width, step, n, keys, size, k_along);
    for (long b = 0; b < n; b += BLOCK) {
        const long some = n - b < BLOCK ? n - b : BLOCK, rows = round_up(some, ROWS);
        copy_rows(x + b * step, step, some, rows, size, q);
        copy_rows(y + b * width, width, some, rows, size, g);
        pack_along(x + b * step, step, some, rows, size, q_along);
        pack_along(y + b * width, width, some, rows, size, g_along);
        for (long r = 0; r < rows; r += ROWS) {
            multiply(ROWS, keys, words, q + r * words, words, 1, k, LANES, words * LANES, scores, keys, 0);
            multiply(ROWS, keys, words, g + r * words, words, 1, v, LANES, words * LANES, gradients, keys, 0);
            for (long i = 0; i < ROWS; i += TOGETHER) {
                fetch_rows(task, &next, b + r + i, 1);
                differentiate_rows(scores + i * keys, gradients + i * keys, n, keys, scale * LOG2_E,
                                   p_along + (r + i) / PER_WORD * keys, ds_along + (r + i) / PER_WORD * keys);
            }
            multiply(ROWS, size, keys / PER_WORD, (const word *)gradients, keys, 1, k_along, size, LANES, dq, size, 0);
            for (long i = 0; i < ROWS && r + i < some; i++)
                write_row(dq + i * size, size, scale, place.out + (b + r + i) * step);
        }
        multiply(keys, size, rows / PER_WORD, p_along, 1, keys, g_along, size, LANES, dv, size, b > 0);
        multiply(keys, size, rows / PER_WORD, ds_along, 1, keys, q_along, size, LANES, dk, size, b > 0);
    }
    for (long r = 0; r < n; r++) {
        write_row(dk + r * size, size, scale, place.out + r * step + width);
        write_row(dv + r * size, size, 1, place.out + r * step + 2 * width);
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
