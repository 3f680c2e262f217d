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

/* count numbers -> GELU of each, in their place, and the slopes there. */
TARGET static void
activate(void *numbers, void *slopes, long count)
{
    number *x = numbers;
    slope *z = slopes;
    floats value, steep;
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        activate_lanes(read_lanes(x + i), &value, &steep);
        write_lanes(x + i, value);
        write_slopes(z + i, steep);
    }
    if (i < count) {
        number rest[LANES] = {0};
        slope rest_of_slopes[LANES];
        memcpy(rest, x + i, (count - i) * sizeof(number));
        activate_lanes(read_lanes(rest), &value, &steep);
        write_lanes(rest, value);
        memcpy(x + i, rest, (count - i) * sizeof(number));
        write_slopes(rest_of_slopes, steep);
        memcpy(z + i, rest_of_slopes, (count - i) * sizeof(slope));
    }
}

/* count gradients times their slopes. */
TARGET static void
descend(const void *gradients, const void *slopes, void *results, long count)
{
    const number *x = gradients;
    const slope *z = slopes;
    number *y = results;
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        write_lanes(y + i, read_lanes(x + i) * read_slopes(z + i));
    if (i < count) {
        number rest[LANES] = {0};
        slope rest_of_slopes[LANES] = {0};
        memcpy(rest, x + i, (count - i) * sizeof(number));
        memcpy(rest_of_slopes, z + i, (count - i) * sizeof(slope));
        write_lanes(rest, read_lanes(rest) * read_slopes(rest_of_slopes));
        memcpy(y + i, rest, (count - i) * sizeof(number));
    }
}
