/* Layer norm of rows (Ba et al. 2016, arXiv 1607.06450), y = w (t - mean) / deviation + b, and its gradient. A row is the
 * sum of two, rounded to a number: what is kept of it is what the backward pass finds. All else is float32. */

INLINE floats
read_floats(const float *from)
{
    floats x; /* they need not begin with a cache line */
    memcpy(&x, from, sizeof(x));
    return x;
}

TARGET static void
normalize(const Rows *all, long first, long count)
{
    const long width = all->width;
    for (long r = first; r < first + count; r++) {
        const number *x = (const number *)all->x + r * width;
        float *statistics = all->statistics + 2 * r;
        if (all->other) {
            const number *other = (const number *)all->other + r * width;
            number *total = (number *)all->total + r * width;
            for (long i = 0; i < width; i += LANES)
                write_lanes(total + i, read_lanes(x + i) + read_lanes(other + i));
            x = total;
        }
        if (all->epsilon >= 0) {
            floats sum = fill(0), squares = fill(0);
            for (long i = 0; i < width; i += LANES)
                sum += read_lanes(x + i);
            statistics[0] = add_lanes(sum) / width;
            for (long i = 0; i < width; i += LANES) {
                const floats rest = read_lanes(x + i) - fill(statistics[0]);
                squares = add_product(rest, rest, squares);
            }
            statistics[1] = invert_root(add_lanes(squares) / width + all->epsilon);
        }
        const floats mean = fill(statistics[0]), factor = fill(statistics[1]);
        number *y = (number *)all->y + r * width;
        for (long i = 0; i < width; i += LANES)
            write_lanes(y + i, add_product((read_lanes(x + i) - mean) * factor, read_floats(all->weight + i),
                                           read_floats(all->bias + i)));
    }
}

/* The sum of all gradients of y at one place of a row. */
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
TARGET static void
descend_norm(const Rows *all, long first, long count)
{
    const long width = all->width;
    for (long at = first * width; at < (first + count) * width; at += width) {
        number *y = (number *)all->y + at;
        if (!all->weight) {
            for (long i = 0; i < width; i += LANES)
                write_lanes(y + i, add_gradients(all, at + i));
            continue;
        }
        const number *total = (const number *)all->total + at;
        const floats mean = fill(all->statistics[2 * at / width]), factor = fill(all->statistics[2 * at / width + 1]);
        floats sum = fill(0), products = fill(0);
        for (long i = 0; i < width; i += LANES) {
            const floats g = add_gradients(all, at + i) * read_floats(all->weight + i);
            sum += g;
            products = add_product(g, (read_lanes(total + i) - mean) * factor, products);
        }
        const floats shift = fill(add_lanes(sum) / width), slope = fill(add_lanes(products) / width);
        for (long i = 0; i < width; i += LANES) {
            const floats g = add_gradients(all, at + i) * read_floats(all->weight + i);
            const floats n = (read_lanes(total + i) - mean) * factor;
            write_lanes(y + i, (g - shift - n * slope) * factor);
        }
    }
}
