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

/* count numbers -> GELU of each, and its slope, maybe in the place of the numbers. */
TARGET static void
activate(const void *from, void *to, void *slopes, long count)
{
    const number *x = from;
    number *y = to, *z = slopes;
    floats value, slope;
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        activate_lanes(read_lanes(x + i), &value, &slope);
        write_lanes(y + i, value);
        write_lanes(z + i, slope);
    }
    if (i < count) {
        const size_t bytes = (count - i) * sizeof(number);
        number rest[LANES] = {0};
        memcpy(rest, x + i, bytes);
        activate_lanes(read_lanes(rest), &value, &slope);
        write_lanes(rest, value);
        memcpy(y + i, rest, bytes);
        write_lanes(rest, slope);
        memcpy(z + i, rest, bytes);
    }
}
