"""Intervals and tests against SciPy, exact enumeration, and simulation of what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from koret.evaluation.significance import (
    bootstrap_interval,
    bootstrap_intervals,
    compare_paired,
    expand_quantile,
    find_detectable_difference,
    find_p_value,
)


def _draw_differences(rng, groups, mean=0.0):
    """Paired differences of questions in articles: article effects, many exact zeros, unequal article sizes."""
    sizes = rng.integers(2, 30, groups)
    effects = rng.normal(0, 0.06, groups)
    owner = np.repeat(np.arange(groups), sizes)
    values = np.where(rng.random(len(owner)) < 0.5, 0, rng.normal(2 * effects[owner], 0.3))
    return values + mean, owner


def test_interval_equals_scipy_when_every_query_is_its_own_group():
    values = np.random.default_rng(0).beta(5, 2, 200)
    ours = bootstrap_interval(values, np.arange(200), resamples=20_000)
    level = 1 - 2 * stats.norm.cdf(-expand_quantile(stats.norm.ppf(0.975), 200))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=1)
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.001)


def test_interval_over_articles_equals_scipy_on_article_totals():
    values, groups = _draw_differences(np.random.default_rng(1), 60)
    totals, sizes = np.bincount(groups, weights=values), np.bincount(groups)
    ours = bootstrap_interval(values, groups, resamples=20_000)
    level = 1 - 2 * stats.norm.cdf(-expand_quantile(stats.norm.ppf(0.975), 60))
    theirs = stats.bootstrap(
        (totals, sizes),
        lambda t, s, axis: t.sum(axis=axis) / s.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=level,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.001)
    alone = bootstrap_interval(values, np.arange(len(values)))
    assert ours.high - ours.low > 1.2 * (alone.high - alone.low)  # questions of one article are not independent


def test_expanded_quantile_is_students():
    for groups in (6, 12, 40, 1000):
        wanted = stats.t.ppf(0.975, groups - 1) * math.sqrt(groups / (groups - 1))
        assert expand_quantile(stats.norm.ppf(0.975), groups) == pytest.approx(wanted, rel=1e-3)


def test_columns_share_resamples_and_equal_single_columns():
    values, groups = _draw_differences(np.random.default_rng(2), 20)
    both = bootstrap_intervals(np.stack([values, values**2], axis=1), groups)
    for ours, column in zip(both, (values, values**2), strict=True):
        alone = bootstrap_interval(column, groups)
        assert (ours.mean, ours.low, ours.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)


@pytest.mark.parametrize("groups", [9, 40])
def test_p_value_equals_scipy(groups):
    """9 groups: all 512 sign patterns, exactly; 40: both sample."""
    values, owner = _draw_differences(np.random.default_rng(3), groups, mean=0.03)
    totals = np.bincount(owner, weights=values)
    theirs = stats.permutation_test(
        (totals, np.zeros(groups)),
        lambda a, b, axis: (a - b).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=0,
    ).pvalue
    ours = find_p_value(values, owner, resamples=20_000)
    assert 0.001 < ours < 0.9
    assert ours == pytest.approx(theirs, abs=1e-12 if groups == 9 else 0.01)


def test_outcomes():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(30), 10)
    base = rng.random(300) * 0.5
    assert compare_paired(base, base + 0.1 + rng.normal(0, 0.05, 300), groups).outcome == "better"
    assert compare_paired(base, base - 0.1 + rng.normal(0, 0.05, 300), groups).outcome == "worse"
    same = compare_paired(base, base, groups)
    assert (same.outcome, same.mean, same.low, same.high, same.p_value) == ("not distinguishable", 0, 0, 0, 1)
    with pytest.raises(ValueError, match="the same queries: 300 and 299"):
        compare_paired(base, base[1:], groups)


def test_one_group_can_prove_nothing():
    result = compare_paired(np.zeros(20), np.ones(20), np.zeros(20))
    assert result.outcome == "not distinguishable" and math.isnan(result.low) and result.p_value == 1
    assert result.to_dict()["low"] is None and result.to_dict()["groups"] == 1


def test_results_repeat_with_the_seed_and_do_not_depend_on_group_names():
    values, groups = _draw_differences(np.random.default_rng(5), 25)
    names = np.array([f"문서 {g:02}" for g in groups])
    assert bootstrap_interval(values, groups, seed=3) == bootstrap_interval(values, names, seed=3)
    assert bootstrap_interval(values, groups, seed=3) != bootstrap_interval(values, groups, seed=4)


def _simulate(trials, groups, mean=0.0, resamples=800):
    covered, outcomes = 0, []
    for trial in range(trials):
        values, owner = _draw_differences(np.random.default_rng([7, groups, trial]), groups, mean)
        result = compare_paired(np.zeros(len(values)), values, owner, resamples=resamples, seed=trial)
        covered += result.low <= mean <= result.high
        outcomes.append(result)
    return covered / trials, outcomes


def _check_promises(trials, groups, slack):
    coverage, null = _simulate(trials, groups)
    false_alarms = np.mean([r.outcome != "not distinguishable" for r in null])
    p_below = np.mean([r.p_value < 0.05 for r in null])
    detectable = float(np.mean([r.detectable for r in null]))
    power = np.mean([r.outcome == "better" for r in _simulate(trials, groups, mean=detectable)[1]])
    assert abs(coverage - 0.945) < slack, f"interval holds the truth in {coverage:.3f} of cases"
    assert abs(p_below - 0.05) < slack and 0.05 + slack > false_alarms > 0.05 - 2 * slack, (p_below, false_alarms)
    assert abs(power - 0.8) < 2.5 * slack, f"the detectable difference is found in {power:.3f} of cases"


def test_promises_hold_in_simulation():
    _check_promises(trials=1000, groups=30, slack=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [12, 40, 140])
def test_promises_hold_in_a_large_simulation(groups):
    _check_promises(trials=3000, groups=groups, slack=0.016)


def test_detectable_difference_shrinks_with_the_root_of_the_groups():
    few = find_detectable_difference(*_draw_differences(np.random.default_rng(8), 100))
    many = find_detectable_difference(*_draw_differences(np.random.default_rng(8), 1600))
    assert few / many == pytest.approx(4, rel=0.2)
    assert math.isnan(find_detectable_difference(np.ones(3), np.zeros(3)))


def test_empty_input_is_a_clear_error():
    with pytest.raises(ValueError, match="0 values and 0 groups"):
        bootstrap_interval(np.array([]), np.array([]))
