/* Where the rows of one head of a text lie, and how they come into the forms that products read: for attention.h. */

enum { FEW = 16 /* numbers copied at a time: heads have a multiple of them */ };

/* A unit's first rows in qkv, in the output's gradient and in the result, and how many it has. */
typedef struct {
    const number *x, *y;
    number *out;
    long n;
} Place;

INLINE Place
find_place(const Task *task, long unit)
{
    const long text = unit / task->heads, at = unit % task->heads * task->size, width = task->heads * task->size;
    const long first = task->bounds[text];
    return (Place){
        .x = (const number *)task->qkv + first * 3 * width + at,
        .y = task->gradient ? (const number *)task->gradient + first * width + at : NULL,
        .out = (number *)task->result + first * (task->gradient ? 3 : 1) * width + at,
        .n = task->bounds[text + 1] - first,
    };
}

/* Asks for a row of numbers that will be read, or written, so that it comes from memory in the meantime. */
#define FETCH(row, size, written) \
    for (long d = 0; d < (size); d += 64 / (long)sizeof(number)) \
        __builtin_prefetch((row) + d, written)

/* Asks for TOGETHER rows from r on that a unit reads and writes, while another is worked on: rows of a head lie too far
 * from each other for the processor to foresee them. Only so many at a time, since more would hold up what is being
 * read; some may not exist, which does no harm. */
INLINE void
fetch_rows(const Task *task, const Place *place, long r, const int backward)
{
    const long size = task->size, width = task->heads * size, parts = backward ? 3 : 1;
    const number *x = place->x + 3 * r * width, *out = place->out + parts * r * width;
    for (long i = 0; i < TOGETHER; i++) {
        for (long j = 0; j < 3; j++, x += width)
            FETCH(x, size, 0);
        for (long j = 0; j < parts; j++, out += width)
            FETCH(out, size, 1);
        if (backward)
            FETCH(place->y + (r + i) * width, size, 0);
    }
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

/* The same -> (padded / LANES, size / PER_WORD, LANES) words: those of LANES rows stand beside each other. */
INLINE void
pack_across(const number *x, long step, long n, long padded, long size, word *out)
{
    const long words = size / PER_WORD;
    for (long r = 0; r < padded; r += LANES)
        for (long w = 0; w < words; w += LANES) {
            floats block[LANES];
#pragma GCC unroll 16
            for (long i = 0; i < LANES; i++)
                block[i] = r + i < n ? load_first(x + (r + i) * step + w * PER_WORD, words - w) : fill(0);
            transpose(block);
#pragma GCC unroll 16
            for (long i = 0; i < LANES; i++)
                if (w + i < words)
                    store((float *)out + r * words + (w + i) * LANES, block[i]);
        }
}

/* The same -> (padded / PER_WORD, size) words, each with the numbers of PER_WORD rows at one place. */
INLINE void
pack_along(const number *x, long step, long n, long padded, long size, word *out)
{
    for (long r = 0; r < padded; r += PER_WORD)
        join_numbers(x + r * step, step, n - r, size, out + r / PER_WORD * size);
}
