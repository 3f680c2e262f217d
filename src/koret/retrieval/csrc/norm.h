/* Layer norm of rows (Ba et al. 2016, arXiv 1607.06450), y = w (t - mean) / deviation + b, and its gradient. A row is the
 * sum of two, rounded to a number: what is kept of it is what the backward pass finds. All else is float32. */

enum { ABREAST = 4 /* rows: the sum of one waits for its last addition, in which others are added to */ };

INLINE floats
read_floats(const float *from)
{
    floats x; /* they need not begin with a cache line */
    memcpy(&x, from, sizeof(x));
    return x;
}

/* Where a row begins in a tensor of them. */
INLINE number *
find_row(const void *tensor, long row, long width)
{
    return (number *)tensor + row * width;
}

INLINE void
find_statistics(const number *const *t, const int rows, long width, float epsilon, float *statistics)
{
    floats sums[ABREAST] = {0}, squares[ABREAST] = {0};
    for (long i = 0; i < width; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sums[r] += read_lanes(t[r] + i);
    for (int r = 0; r < rows; r++)
        statistics[2 * r] = add_lanes(sums[r]) / width;
    for (long i = 0; i < width; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const floats rest = read_lanes(t[r] + i) - fill(statistics[2 * r]);
            squares[r] = add_product(rest, rest, squares[r]);
        }
    for (int r = 0; r < rows; r++)
        statistics[2 * r + 1] = invert_root(add_lanes(squares[r]) / width + epsilon);
}

INLINE void
normalize_rows(const Rows *all, long first, const int rows)
{
    const long width = all->width;
    const number *t[ABREAST];
    for (int r = 0; r < rows; r++) {
        const number *x = find_row(all->x, first + r, width);
        t[r] = x;
        if (!all->other)
            continue;
        const number *other = find_row(all->other, first + r, width);
        number *total = find_row(all->total, first + r, width);
        for (long i = 0; i < width; i += LANES)
            write_lanes(total + i, read_lanes(x + i) + read_lanes(other + i));
        t[r] = total;
    }
    float *statistics = all->statistics + 2 * first;
    if (all->epsilon >= 0)
        find_statistics(t, rows, width, all->epsilon, statistics);
    for (int r = 0; r < rows; r++) {
        const floats mean = fill(statistics[2 * r]), factor = fill(statistics[2 * r + 1]);
        number *y = find_row(all->y, first + r, width);
        for (long i = 0; i < width; i += LANES)
            write_lanes(y + i, add_product((read_lanes(t[r] + i) - mean) * factor, read_floats(all->weight + i),
                                           read_floats(all->bias + i)));
    }
}

/* The sum of all gradients of y from place `at` on. */
INLINE floats
add_gradients(const Rows *all, long at)
{
    floats sum = read_lanes((const number *)all->x + at);
    for (int other = 0; other < 2; other++)
        if (all->added[other])
            sum += read_lanes((const number *)all->added[other] + at);
    return sum;
}

/* With g = w dy and n = (t - mean) / deviation: dt = (g - mean(g) - n mean(g n)) / deviation. */
INLINE void
descend_rows(const Rows *all, long first, const int rows)
{
    const long width = all->width;
    const float *statistics = all->statistics + 2 * first;
    floats sums[ABREAST] = {0}, products[ABREAST] = {0};
    for (long i = 0; i < width; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const floats g = add_gradients(all, (first + r) * width + i) * read_floats(all->weight + i);
            const floats rest = read_lanes(find_row(all->total, first + r, width) + i) - fill(statistics[2 * r]);
            sums[r] += g;
            products[r] = add_product(g, rest, products[r]);
        }
    for (int r = 0; r < rows; r++) {
        const float inverse = statistics[2 * r + 1];
        const floats mean = fill(statistics[2 * r]), factor = fill(inverse), shift = fill(add_lanes(sums[r]) / width);
        const floats slope = fill(add_lanes(products[r]) / width * inverse * inverse);
        for (long i = 0; i < width; i += LANES) {
            const floats g = add_gradients(all, (first + r) * width + i) * read_floats(all->weight + i);
            const floats rest = read_lanes(find_row(all->total, first + r, width) + i) - mean;
            write_lanes(find_row(all->y, first + r, width) + i, (g - shift - rest * slope) * factor);
        }
    }
}

TARGET static void
normalize(const Rows *all, long first, long count)
{
    const long end = first + count;
    for (; first + ABREAST <= end; first += ABREAST)
        normalize_rows(all, first, ABREAST);
    for (; first < end; first++)
        normalize_rows(all, first, 1);
}

TARGET static void
descend_norm(const Rows *all, long first, long count)
{
    const long end = first + count;
    if (all->weight) {
        for (; first + ABREAST <= end; first += ABREAST)
            descend_rows(all, first, ABREAST);
        for (; first < end; first++)
            descend_rows(all, first, 1);
    } else
        for (long i = first * all->width; i < end * all->width; i += LANES)
            write_lanes((number *)all->y + i, add_gradients(all, i));
}
