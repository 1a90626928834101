"""Welch's one-sided t-test from means and deviations. The t distribution is computed here, without scipy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

MOST_TERMS = 10_000
CLOSE = 1e-15  # how close to 1 the last factor must be
TINY = 1e-300  # replaces a zero in a denominator


class Sample(NamedTuple):
    """The summary of some measurements that a t-test needs."""

    mean: float
    std: float  # sample standard deviation (n - 1); nan for a single measurement
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), std, len(values))


class Welch(NamedTuple):
    """t statistic, degrees of freedom, and the probability of this t or a larger one under the null hypothesis."""

    t: float
    df: float
    p: float


def lower_by(margin: float, ours: Sample, theirs: Sample) -> Welch:
    """One-sided test that our true mean is lower than theirs by more than `margin`. Each sample needs at least two
    measurements, and at least one a deviation above 0. Statistic and degrees of freedom: Welch 1947, Satterthwaite
    1946."""
    a = ours.std**2 / ours.n
    b = theirs.std**2 / theirs.n
    t = (theirs.mean - ours.mean - margin) / math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (theirs.n - 1))
    return Welch(t, df, upper_tail(t, df))


def upper_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t with df degrees of freedom: half the incomplete beta of df / (df + t^2), Abramowitz &
    Stegun 26.7.1 with 26.5.27."""
    half = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t >= 0 else 1 - half


def two_sided(confidence: float, df: float) -> float:
    """The two-sided critical value of Student's t with df >= 1 degrees of freedom at this confidence (at most 0.999),
    by bisection of `upper_tail`."""
    low = 0.0
    high = 1000.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if upper_tail(middle, df) > (1 - confidence) / 2:
            low = middle
        else:
            high = middle
    return high


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, a and b above 0: the continued fraction of
    Abramowitz & Stegun 26.5.8 where it converges fast, else by the symmetry I_x(a, b) = 1 - I_{1-x}(b, a)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / (a * fraction(a, b, x))


def fraction(a: float, b: float, x: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)) of A&S 26.5.8, from the top down by Lentz's method (Applied Optics 15, 1976)."""
    value = 1.0
    above = 1.0
    below = 0.0
    for term in range(1, MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        above = (1 + d / above) or TINY
        below = 1 / ((1 + d * below) or TINY)
        value *= above * below
        if abs(above * below - 1) < CLOSE:
            return value
    raise ArithmeticError(f"I_{x}({a}, {b}): no convergence in {MOST_TERMS} terms")
