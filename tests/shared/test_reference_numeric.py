"""The reference's fused multiply-add against exact rationals."""

from fractions import Fraction

import numpy as np

from flightquant.reference.numeric import fused


def rounded(exact: Fraction) -> np.float32:
    """The nearest float32, ties to even, of the neighbours of what float64 makes of it."""
    near = np.float32(float(exact))
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return min(around, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.uint32)) & 1))


def test_a_product_and_a_sum_are_rounded_once() -> None:
    rng = np.random.default_rng(12)
    a, b = rng.standard_normal((2, 4000)).astype(np.float32)
    c = (a * b * rng.choice([-1, 1, 2.0**-24, 2.0**24, -(2.0**-25)], 4000)).astype(np.float32)
    # Sums that lie next to a tie of float32 by less than float64 holds: they are what rounding twice gets wrong.
    unit = np.float32(1 + 2.0**-12)
    a[:4], b[:4] = unit, (unit, -unit, unit, np.float32(2.0**-60))
    c[:4] = (2.0**-80, 2.0**-80, -(2.0**-80), 1)
    a[4:6], b[4:6], c[4:6] = 2.0**-75, 2.0**-74, (1e-45, 0)
    wanted = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(fused(a, b, c).view(np.uint32), np.array(wanted, np.float32).view(np.uint32))
    assert not np.array_equal(fused(a, b, c), (a.astype(np.float64) * b + c).astype(np.float32))


def test_what_is_not_finite_stays_so() -> None:
    huge, inf, nan = np.float32(3e38), np.float32(np.inf), np.float32(np.nan)
    made = fused(np.array([huge, inf, nan, 0]), np.array([huge, 1, 1, inf]), np.array([1, -inf, 1, 1], np.float32))
    assert made[0] == np.inf
    assert np.isnan(made[1:]).all()
