/* Numbers of float32, one in a word: rows are multiplied as they stand. */

typedef float number;
typedef float word;
typedef floats words_of;
enum { PER_WORD = 1 };

#define load_words(from) load(from)
#define fill_words(x) fill(x)
#define multiply_add(a, b, sum) add_product(a, b, sum)

INLINE floats
read_lanes(const number *from)
{
    floats x; /* a row need not begin with a cache line */
    memcpy(&x, from, sizeof(x));
    return x;
}

INLINE void
write_lanes(number *to, floats x)
{
    memcpy(to, &x, sizeof(x));
}

/* Lanes of PER_WORD rows, rounded to numbers: written as those rows, `step` numbers apart, or as words. */
typedef floats rounded;
#define round_rows(rows) (*(rows))
#define write_rows(x, to, step) write_lanes(to, x)
#define write_words(x, to) store(to, x)

/* PER_WORD rows of n numbers, of which `there` are (maybe none) and the rest are zeros -> n words. */
INLINE void
join_numbers(const number *rows, long step, long there, long n, word *out)
{
    (void)step;
    for (long i = 0; i < n; i += LANES)
        if (there > 0)
            memcpy(out + i, rows + i, LANES * sizeof(number));
        else
            store(out + i, fill(0));
}

typedef float slope;
#define read_slopes(from) read_lanes(from)
#define write_slopes(to, x) write_lanes(to, x)
