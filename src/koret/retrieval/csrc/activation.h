/* GELU of many numbers together with its slope (Hendrycks and Gimpel 2016, arXiv 1606.08415), so that the backward pass
 * is a product: x F(x) and F(x) + x f(x), with the normal distribution F and its density f = e^(-x^2 / 2) / sqrt(2 pi).
 * The same power of e gives F: 2 F(-|x|) = erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2) with z = |x| / sqrt(2) and
 * t = 1 / (1 + p z), to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26). */

INLINE void
activate_lanes(floats x, floats *y, floats *slope)
{
    /* beyond -20 nothing is left of f; in this order a NaN is passed on */
    const floats least = largest(fill(-20), -largest(x, -x));
    const floats t = fill(1) / add_product(least, fill(-0.3275911f * 0.70710678f), fill(1));
    const floats power = exponentiate(least * least * fill(-0.5f * LOG2_E));
    floats tail = fill(0.5f * 1.061405429f); /* half of erfc: F(-|x|) */
    tail = add_product(tail, t, fill(0.5f * -1.453152027f));
    tail = add_product(tail, t, fill(0.5f * 1.421413741f));
    tail = add_product(tail, t, fill(0.5f * -0.284496736f));
    tail = add_product(tail, t, fill(0.5f * 0.254829592f));
    tail = tail * t * power;
    const floats below = choose_by_sign(x, tail, fill(1) - tail);
    *y = x * below;
    *slope = add_product(choose_by_sign(x, least, -least), power * fill(0.39894228f), below);
}

/* One register of numbers, which may be a copy of less. */
INLINE void
activate_register(const number *x, number *y, slope *slopes)
{
    floats value, steep;
    activate_lanes(read_lanes(x), &value, &steep);
    write_lanes(y, value);
    write_slopes(slopes, steep);
}

INLINE void
descend_register(const number *x, number *y, slope *slopes)
{
    write_lanes(y, read_lanes(x) * read_slopes(slopes));
}

/* `step` for every register of the numbers; the last ones by way of a full one. */
INLINE void
pass(const Numbers *all, long first, long count, void (*const step)(const number *, number *, slope *))
{
    const number *x = (const number *)all->x + first;
    number *y = (number *)all->y + first;
    slope *slopes = (slope *)all->kept + first;
    const long whole = count / LANES * LANES, left = count - whole;
    for (long i = 0; i < whole; i += LANES)
        step(x + i, y + i, slopes + i);
    if (left) {
        number rest[LANES] = {0};
        slope rest_of_slopes[LANES] = {0};
        memcpy(rest, x + whole, left * sizeof(number));
        memcpy(rest_of_slopes, slopes + whole, left * sizeof(slope));
        step(rest, rest, rest_of_slopes);
        memcpy(y + whole, rest, left * sizeof(number));
        memcpy(slopes + whole, rest_of_slopes, left * sizeof(slope));
    }
}

TARGET static void
activate(const Numbers *all, long first, long count)
{
    pass(all, first, count, activate_register);
}

TARGET static void
descend(const Numbers *all, long first, long count)
{
    pass(all, first, count, descend_register);
}
