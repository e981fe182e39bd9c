"""Error rates with known truth, thousands of experiments each. Run: pytest tests/unit/test_eval_simulation.py -s

Allowed ranges are the specification's figures widened by the simulation's own error (3 standard deviations).
"""

import math
from functools import cache

import numpy as np
import pytest

from sft.eval import stats

CACHED_EXPERIMENTS = 4000


def draw(seed, n, p_lost, p_won, times):
    """(lost, won) of every experiment on n independent items."""
    shares = [p_lost, p_won, 1 - p_lost - p_won]
    return np.random.default_rng(seed).multinomial(n, shares, size=times)[:, :2]


def independent(n, lost, won):
    """Errors of n items that have no clusters."""
    delta = (won - lost) / n
    return stats.Errors(math.sqrt(((lost + won) / n - delta**2) / (n - 1)), None, None, 1)


@cache
def interval(n, lost, won, level):
    return stats.best_interval(n, lost, won, independent(n, lost, won), level)


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"), [(100, 0.05, 0.05), (300, 0.08, 0.03), (1534, 0.05, 0.04), (14042, 0.03, 0.025)]
)
def test_coverage_of_the_interval(n, p_lost, p_won):
    """Specified for Tango: 0.943 to 0.965."""
    pairs = draw(1, n, p_lost, p_won, CACHED_EXPERIMENTS).tolist()
    covered = 0
    for lost, won in pairs:
        low, high = interval(n, lost, won, stats.LEVEL)
        covered += low <= p_won - p_lost <= high
    assert 0.933 <= covered / len(pairs) <= 0.972


@pytest.mark.parametrize(("n", "flips"), [(300, 0.1), (999, 0.05), (3000, 0.05), (14042, 0.03)])
def test_non_inferiority_at_the_boundary(n, flips):
    """The true drop is the margin of one point: it is ruled out in 4 to 6 of 100 experiments, not more."""
    pairs = draw(2, n, (flips + 0.01) / 2, (flips - 0.01) / 2, CACHED_EXPERIMENTS).tolist()
    share = np.mean([interval(n, lost, won, 0.9)[0] > -0.01 for lost, won in pairs])
    assert 0.035 <= share <= 0.063
    harmless = draw(3, n, flips / 2, flips / 2, 500).tolist()
    passed = np.mean([interval(n, lost, won, 0.9)[0] > -0.01 for lost, won in harmless])
    assert passed > share + 0.05  # the test has power, too: no drop passes more often


def test_mcnemar_under_no_change():
    """Nominal 5 %: exact 2.5 to 3.5 %, mid-p 4.0 to 4.3 % as specified."""
    rates = {"exact": [], "midp": []}
    for n, flips in ((300, 0.1), (1000, 0.05)):
        pairs = draw(4, n, flips / 2, flips / 2, 20_000).tolist()
        p = {pair: (stats.mcnemar_exact(*pair), stats.mcnemar_midp(*pair)) for pair in {tuple(pair) for pair in pairs}}
        for place, name in enumerate(rates):
            rates[name].append(np.mean([p[tuple(pair)][place] < 0.05 for pair in pairs]))
    assert all(0.02 <= rate <= 0.04 for rate in rates["exact"]), rates
    assert all(0.035 <= rate <= 0.055 for rate in rates["midp"]), rates
    assert min(rates["midp"]) > max(rates["exact"])


def p_of_57_subjects(seed, times):
    pairs = draw(seed, 150, 0.05, 0.05, times * 57)
    known = {pair: stats.mcnemar_midp(*pair) for pair in {tuple(pair) for pair in pairs.tolist()}}
    return np.array([known[tuple(pair)] for pair in pairs.tolist()]).reshape(times, 57)


def test_familywise_error_of_57_subjects():
    """No subject changed. Unadjusted, almost every report would name one; Holm's at most 5 in 100."""
    p = p_of_57_subjects(5, 1500)
    families = [stats.holm(row.tolist()) for row in p]
    assert np.mean([min(row) < 0.05 for row in families]) <= 0.067
    assert (p.min(axis=1) < 0.05).mean() > 0.8


def test_false_discoveries():
    """20 of 57 subjects fell by 15 points: BH finds more than Holm, with at most 5 % false ones on average."""
    p = p_of_57_subjects(6, 500)
    fallen = draw(7, 150, 0.2, 0.05, 500 * 20).tolist()
    p[:, :20] = np.array([stats.mcnemar_midp(*pair) for pair in fallen]).reshape(500, 20)
    q = np.array([stats.benjamini_hochberg(row.tolist()) for row in p]) < 0.05
    adjusted = np.array([stats.holm(row.tolist()) for row in p]) < 0.05
    false = q[:, 20:].sum(axis=1) / np.maximum(q.sum(axis=1), 1)
    assert false.mean() <= 0.05
    assert q[:, :20].mean() > adjusted[:, :20].mean() + 0.05


CLUSTERS, SIZE = 57, 20


def clustered_experiment(rng):
    """Items of which each cluster shares a change of its own: true mean 0, as clusters lose as often as they win."""
    tilt = rng.normal(0.0, 0.5, CLUSTERS).clip(-0.9, 0.9)
    flips = rng.random((CLUSTERS, SIZE)) < 0.2
    won = rng.random((CLUSTERS, SIZE)) < (1 + tilt[:, None]) / 2
    return (flips * np.where(won, 1, -1)).ravel()


@pytest.fixture(scope="module")
def clustered_coverage():
    """How often each interval holds the true mean of 0, over 1,000 experiments."""
    rng, names = np.random.default_rng(8), np.repeat(np.arange(CLUSTERS), SIZE).astype(str)
    inside = {"verdict": 0, "iid": 0, "tango": 0, "bootstrap": 0, "cluster_bootstrap": 0}
    times = 1000
    for _ in range(times):
        deltas = clustered_experiment(rng)
        pair = compare(deltas, names)
        reach = 1.959964 * pair.errors.iid
        intervals = {
            "verdict": pair.interval,
            "iid": (pair.delta - reach, pair.delta + reach),
            "tango": pair.interval_tango,
            "bootstrap": pair.interval_bootstrap,
            "cluster_bootstrap": pair.interval_bootstrap_clustered,
        }
        for name, (low, high) in intervals.items():
            inside[name] += low <= 0 <= high
    return {name: count / times for name, count in inside.items()}


def compare(deltas, names):
    return stats.compare_pairs(deltas <= 0, deltas >= 0, names, draws=400)


def test_coverage_where_items_of_a_cluster_change_together(clustered_coverage):
    assert 0.93 <= clustered_coverage["verdict"] <= 0.97, clustered_coverage
    assert 0.91 <= clustered_coverage["cluster_bootstrap"] <= 0.97, clustered_coverage


@pytest.mark.parametrize("name", ["iid", "tango", "bootstrap"])
def test_intervals_that_ignore_clusters_fall_short(clustered_coverage, name):
    """Negative control."""
    assert clustered_coverage[name] < 0.91, clustered_coverage


def test_degradation_p_allows_for_clusters():
    """No change on average: below 0.05 in about 5 of 100 experiments; McNemar's alone (the control) in more."""
    rng, names = np.random.default_rng(9), np.repeat(np.arange(CLUSTERS), SIZE).astype(str)
    pairs = [compare(clustered_experiment(rng), names) for _ in range(1000)]
    assert 0.02 <= np.mean([pair.degradation_p < 0.05 for pair in pairs]) <= 0.07
    lost_and_all = [(pair.right_to_wrong, pair.right_to_wrong + pair.wrong_to_right) for pair in pairs]
    assert np.mean([stats.binomial_upper(total, lost) < 0.05 for lost, total in lost_and_all]) > 0.08
