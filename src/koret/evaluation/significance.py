"""Is the difference real? Intervals and paired tests over articles, not over questions.

Questions of one article succeed and fail together, so they are not independent draws. Everything here resamples or
flips whole articles ("groups"). Letters: Q queries, G groups, M columns, B resamples.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
POWER = 0.8
_NORMAL = NormalDist()
_CELLS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; ``low`` and ``high`` are NaN when there are fewer than two groups."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Difference:
    """A paired comparison of one metric: what changed, how sure that is, and what could have been seen.

    ``outcome`` is 'better', 'worse' or 'not distinguishable'; ``detectable`` the smallest true difference that these
    queries would have shown four times out of five.
    """

    mean: float
    low: float
    high: float
    p_value: float
    detectable: float
    outcome: str
    queries: int
    groups: int

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def compare_paired(
    base: np.ndarray, tuned: np.ndarray, groups: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """``tuned`` minus ``base`` (Q,) per query: mean, 95% interval, p-value, and the outcome.

    'better' and 'worse' need both: the bootstrap interval excludes 0 and the randomisation test gives p < 0.05.
    """
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    if base.shape != tuned.shape:
        raise ValueError(f"a paired comparison needs the same queries: {len(base)} and {len(tuned)} values were given")
    gaps = tuned - base
    interval = bootstrap_interval(gaps, groups, resamples=resamples, seed=seed)
    p_value = find_p_value(gaps, groups, resamples=resamples, seed=seed)
    outcome = "not distinguishable"
    if p_value < 1 - LEVEL and (interval.low > 0 or interval.high < 0):
        outcome = "better" if interval.low > 0 else "worse"
    detectable = find_detectable_difference(gaps, groups)
    count = len(np.unique(groups))
    return Difference(interval.mean, interval.low, interval.high, p_value, detectable, outcome, len(gaps), count)


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of ``values`` (Q,) with its bootstrap interval over groups; see ``bootstrap_intervals``."""
    return bootstrap_intervals(np.asarray(values)[:, None], groups, level=level, resamples=resamples, seed=seed)[0]


def bootstrap_intervals(
    values: np.ndarray, groups: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """The mean of each column of ``values`` (Q, M) with its interval; all columns share the resamples.

    Draws G groups with replacement, takes the mean over their queries, B times; interval ends are quantiles of those
    means. The quantiles are widened for few groups as in Hesterberg's "expanded percentile interval" (What Teachers
    Should Know About the Bootstrap, 2015): the normal quantile z becomes sqrt(G / (G - 1)) * t with G - 1 degrees of
    freedom. In simulations with 12 groups a "95%" interval then held the truth in 92 to 94% of cases, without the
    widening in 88 to 90%; BCa intervals, widened or not, held it less often (tests simulate it again).
    """
    sums, counts = _sum_groups(values, groups)
    means = sums.sum(axis=0) / counts.sum()
    if len(counts) < 2:
        return [Interval(float(mean), math.nan, math.nan) for mean in means]
    draws = _resample_means(sums, counts, resamples, seed)
    tail = _NORMAL.cdf(-expand_quantile(_NORMAL.inv_cdf((1 + level) / 2), len(counts)))
    lows, highs = np.quantile(draws, [tail, 1 - tail], axis=0)
    return [Interval(*map(float, ends)) for ends in zip(means, lows, highs, strict=True)]


def expand_quantile(z: float, groups: int) -> float:
    """The normal quantile ``z`` widened for ``groups`` groups: sqrt(G / (G - 1)) times Student's t of the same level.

    The t quantile is the expansion of Abramowitz and Stegun 26.7.5.
    """
    v = groups - 1
    t = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
    return t * math.sqrt(groups / v)


def find_p_value(differences: np.ndarray, groups: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the paired randomisation test, flipping whole groups.

    If both systems were the same, each group's difference would be as likely with the other sign. The p-value is the
    share of sign patterns whose mean difference is at least as large as the one seen: all 2^G of them for up to 13
    groups, else ``resamples`` random ones, the seen one counted too (Phipson and Smyth 2010), so it is never 0.
    """
    sums = _sum_groups(np.asarray(differences, np.float64)[:, None], groups)[0][:, 0]
    sums = sums[sums != 0]
    seen = abs(sums.sum())
    limit = seen - 1e-12 * max(1.0, np.abs(sums).sum())
    if len(sums) <= 13:
        signs = np.array(list(itertools.product((1, -1), repeat=len(sums))), np.float64).reshape(2 ** len(sums), -1)
        return float((np.abs(signs @ sums) >= limit).mean())
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS_AT_ONCE // len(sums))
    extreme = 0
    for start in range(0, resamples, step):
        flips = rng.integers(0, 2, (min(step, resamples - start), len(sums)), dtype=np.int8)
        extreme += int((np.abs((2.0 * flips - 1) @ sums) >= limit).sum())
    return (extreme + 1) / (resamples + 1)


def find_detectable_difference(differences: np.ndarray, groups: np.ndarray, power: float = POWER) -> float:
    """The smallest true mean difference a paired test at 5% would have found with probability ``power``.

    (z for the level, widened as in ``bootstrap_intervals``, + z for the power) * the standard error of the mean
    difference over groups (linearised ratio estimator). NaN for fewer than two groups.
    """
    sums, counts = _sum_groups(np.asarray(differences, np.float64)[:, None], groups)
    if len(counts) < 2:
        return math.nan
    residuals = sums[:, 0] - sums.sum() / counts.sum() * counts
    error = math.sqrt((residuals**2).sum() * len(counts) / (len(counts) - 1)) / counts.sum()
    return (expand_quantile(_NORMAL.inv_cdf((1 + LEVEL) / 2), len(counts)) + _NORMAL.inv_cdf(power)) * error


def _sum_groups(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per group the sum of each column (G, M) and the number of queries (G,)."""
    values = np.asarray(values, np.float64)
    if not len(values) or len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups were given; both must be the same, at least 1")
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(place)
    sums = np.stack([np.bincount(place, weights=column) for column in values.T], axis=1)
    return sums, counts


def _resample_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(B, M) means over G groups drawn with replacement."""
    rng = np.random.default_rng(seed)
    size = len(counts)
    step = max(1, _CELLS_AT_ONCE // size)
    means = np.empty((resamples, sums.shape[1]))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        picks = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(picks.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
        means[start : start + rows] = (times @ sums) / (times @ counts)[:, None]
    return means
