/* Powers of two of a register of floats. */

#define LOG2_E 1.44269504f

/* 2^x for x <= 0, to 1e-7 of it, and never less than about 2^-126; NaN stays NaN. x is cut into a whole number and a
 * rest in [-1/2, 1/2], where a polynomial of degree 5 with the value 1 at 0 is fitted for the smallest largest error. */
INLINE floats
exponentiate(floats x)
{
    x = largest(fill(-126), x); /* in this order a NaN is passed on */
    const floats whole = round_lanes(x), rest = x - whole;
    floats y = fill(1.32647272e-3f);
    y = add_product(y, rest, fill(9.67151281e-3f));
    y = add_product(y, rest, fill(5.55073374e-2f));
    y = add_product(y, rest, fill(2.40222421e-1f));
    y = add_product(y, rest, fill(6.93146978e-1f));
    y = add_product(y, rest, fill(1));
    return shift_exponent(y, whole);
}
