"""The statistics against figures by hand, scipy, statsmodels and lm_eval. Run: pytest tests/unit/test_eval_stats.py"""

import math
import random

import numpy as np
import pytest

from sft.eval import stats

scipy_stats = pytest.importorskip("scipy.stats")


def outcomes(seed, n, flips=0.2):
    rng = random.Random(seed)
    base = [rng.random() < 0.6 for _ in range(n)]
    return base, [not right if rng.random() < flips else right for right in base]


def test_by_hand():
    base = [True, True, True, False, False, True, False, True]
    tuned = [True, False, False, False, True, False, False, True]
    pair = stats.compare_pairs(base, tuned, ["x"] * 8)
    assert (pair.n, pair.base, pair.tuned, pair.delta) == (8, 5 / 8, 3 / 8, -0.25)
    assert (pair.right_to_wrong, pair.wrong_to_right) == (3, 1)
    assert pair.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)
    assert pair.se_iid == pytest.approx(math.sqrt((4 / 8 - 0.25**2) / 7))
    assert pair.se_clustered is None
    assert pair.interval == stats.score_interval(8, lost=3, won=1)


@pytest.mark.parametrize("seed", range(4))
def test_paired_se_is_scipys(seed):
    base, tuned = outcomes(seed, 150)
    deltas = [int(after) - int(before) for before, after in zip(base, tuned, strict=True)]
    assert stats.paired_se(deltas) == pytest.approx(scipy_stats.sem(deltas), rel=1e-12)
    t = scipy_stats.ttest_rel(np.array(tuned, dtype=int), np.array(base, dtype=int))
    assert np.mean(deltas) / stats.paired_se(deltas) == pytest.approx(t.statistic, rel=1e-9)


def test_the_unpaired_error_is_not_the_paired_one():
    base, tuned = outcomes(1, 1000, flips=0.05)
    unpaired = math.hypot(scipy_stats.sem(base), scipy_stats.sem(tuned))
    assert stats.compare_pairs(base, tuned, ["x"] * 1000).se_iid < 0.5 * unpaired


@pytest.mark.parametrize("seed", range(4))
def test_clustered_se_is_statsmodels(seed):
    sm = pytest.importorskip("statsmodels.api")
    rng = random.Random(seed)
    base, tuned = outcomes(seed, 200)
    codes = sorted(rng.randrange(30) for _ in range(200))
    deltas = np.array(tuned, dtype=int) - np.array(base, dtype=int)
    # statsmodels scales by G / (G - 1) * (n - 1) / (n - k) with k = 1
    fit = sm.OLS(deltas, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": np.array(codes)})
    assert stats.clustered_se(deltas.tolist(), [str(code) for code in codes]) == pytest.approx(fit.bse[0], rel=1e-9)


def test_one_item_per_cluster_is_the_independent_error():
    base, tuned = outcomes(3, 300)
    pair = stats.compare_pairs(base, tuned, [str(number) for number in range(300)])
    assert pair.se_clustered == pytest.approx(pair.se_iid, rel=1e-12)


def test_flips_that_come_in_clusters_widen_the_interval():
    base, tuned = [True] * 200, [number // 10 % 4 > 0 for number in range(200)]
    clusters = [str(number // 10) for number in range(200)]
    clustered = stats.compare_pairs(base, tuned, clusters)
    spread = stats.compare_pairs(base, tuned, [str(number) for number in range(200)])
    assert clustered.se_clustered > 2.5 * clustered.se_iid
    width = clustered.interval[1] - clustered.interval[0]
    assert width == pytest.approx(2 * scipy_stats.t.ppf(0.975, 19) * clustered.se_clustered, rel=1e-9)
    assert width > 2.5 * (spread.interval[1] - spread.interval[0])


@pytest.mark.parametrize("lost", [0, 1, 5, 40])
@pytest.mark.parametrize("won", [0, 3, 5, 41, 700])
def test_mcnemar_is_exact(lost, won):
    if lost + won == 0:
        assert stats.mcnemar_exact(0, 0) == 1.0
        return
    expected = scipy_stats.binomtest(min(lost, won), lost + won, 0.5).pvalue
    assert stats.mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)
    assert stats.mcnemar_exact(won, lost) == stats.mcnemar_exact(lost, won)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    table = [[10, lost], [won, 10]]
    assert stats.mcnemar_exact(lost, won) == pytest.approx(tables.mcnemar(table, exact=True).pvalue, rel=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 10, 57, 199])
def test_student_quantile(df):
    assert stats.student_quantile(df) == pytest.approx(scipy_stats.t.ppf(0.975, df), rel=1e-9)


def test_many_degrees_of_freedom_are_normal():
    assert stats.student_quantile(200) == pytest.approx(scipy_stats.t.ppf(0.975, 200), rel=0.007)


def changed(n, lost, won, clusters=None):
    """n items of which the first `lost` went wrong and the next `won` right; each its own cluster if not told."""
    base = [number < lost or number >= lost + won for number in range(n)]
    tuned = [number >= lost for number in range(n)]
    return stats.compare_pairs(base, tuned, clusters or [str(number) for number in range(n)])


def wald(pair):
    return pair.delta - 1.959964 * pair.se_iid, pair.delta + 1.959964 * pair.se_iid


def score_by_search(n, lost, won, difference):
    """Tango's S(D), its nuisance parameter found by maximising the likelihood instead of by the closed form."""
    optimize = pytest.importorskip("scipy.optimize")
    low, high = max(0.0, -difference), (1 - difference) / 2
    cells = (lost, won, n - lost - won)

    def loss(q):
        shares = (q, q + difference, 1 - 2 * q - difference)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in zip(cells, shares, strict=True) if count)

    q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (won - lost - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("n", "lost", "won"), [(21, 7, 1), (5, 5, 0), (30, 0, 0), (220, 4, 0), (160, 20, 40)])
def test_the_score_is_z_at_the_ends_of_the_interval(n, lost, won):
    low, high = stats.score_interval(n, lost, won)
    for end, expected in ((low, 1.959964), (high, -1.959964)):
        assert end in (-1.0, 1.0) or score_by_search(n, lost, won, end) == pytest.approx(expected, rel=1e-3)


def test_the_score_interval_is_the_published_one():
    """Bentur et al. 2009 in Fagerland, Lydersen and Laake 2014 (BMC Med Res Methodol): -0.286 (-0.517 to -0.026)."""
    assert stats.score_interval(21, lost=7, won=1) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert stats.score_interval(21, lost=1, won=7) == pytest.approx((0.026, 0.517), abs=5e-4)


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_no_change_is_no_proof(n):
    """With two empty cells Tango's interval is +- z^2 / (n + z^2)."""
    z2 = 1.959964**2
    pair = changed(n, 0, 0)
    assert pair.interval == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-6)
    assert pair.verdict == "no change shown"


@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize(("n", "num"), [(1, 1), (5, 5), (220, 4), (14042, 4)])
def test_few_changed_items_show_no_change(n, num, losses):
    """McNemar's p is above 0.05 in all of them, and the interval has a width; Wald's says "degraded"."""
    pair = changed(n, num, 0) if losses else changed(n, 0, num)
    assert pair.mcnemar_p > 0.05
    assert pair.verdict == "no change shown"
    assert pair.interval[1] - pair.interval[0] > 1 / n
    assert max(wald(pair)) < 0 or min(wald(pair)) > 0


@pytest.mark.parametrize(("n", "lost", "won", "verdict"), [
    (6, 6, 0, "degraded"), (6, 0, 6, "improved"), (220, 20, 4, "degraded"), (14042, 400, 500, "improved"),
    (14042, 450, 500, "no change shown"),
])  # fmt: skip
def test_verdicts(n, lost, won, verdict):
    pair = changed(n, lost, won)
    assert pair.verdict == verdict
    assert (verdict == "no change shown") == (pair.mcnemar_p > 0.05)


def test_losses_from_one_source_show_no_change():
    """20 losses, all in one subject of 20: McNemar alone would see a change."""
    pair = changed(400, 20, 0, clusters=[str(number // 20) for number in range(400)])
    assert pair.mcnemar_p < 0.001
    assert pair.verdict == "no change shown"
    assert changed(400, 20, 0).verdict == "degraded"


def test_many_changed_items_give_the_familiar_interval():
    pair = changed(14042, 400, 500)
    assert pair.interval == pytest.approx(wald(pair), abs=2e-5)


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"), [(40, 0.05, 0.02), (40, 0.1, 0.1), (100, 0.03, 0.0), (100, 0.02, 0.05)]
)
def test_coverage_is_exact_where_few_items_change(n, p_lost, p_won):
    """Sum of the probabilities of all outcomes whose interval holds the truth; Wald's falls short somewhere."""
    inside = 0.0
    for lost in range(16):
        for won in range(16):
            low, high = stats.score_interval(n, lost, won)
            if low <= p_won - p_lost <= high:
                inside += scipy_stats.multinomial.pmf(
                    [lost, won, n - lost - won], n, [p_lost, p_won, 1 - p_lost - p_won]
                )
    assert 0.93 <= inside <= 0.99


def test_coverage_of_wald_falls_short():
    """Negative control: 100 items, 3 % lost, none won."""
    inside = sum(
        scipy_stats.binom.pmf(lost, 100, 0.03)
        for lost in range(16)
        if (pair := changed(100, lost, 0)) and wald(pair)[0] <= -0.03 <= wald(pair)[1]
    )
    assert inside < 0.93


def test_coverage_of_the_interval():
    """The true difference lies inside about 95 times in 100."""
    rng, inside = random.Random(5), 0
    for _ in range(400):
        base = [rng.random() < 0.7 for _ in range(300)]
        tuned = [rng.random() < (0.9 if right else 0.2) for right in base]  # expected delta: 0.69 - 0.7
        low, high = stats.compare_pairs(base, tuned, ["x"] * 300).interval
        inside += low <= 0.69 - 0.7 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_drop_is_one_division():
    assert stats.compare_pairs([True] * 100, [False, *[True] * 99], ["x"] * 100).drop == 0.01


def test_standard_errors_are_lm_evals():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    groups = [outcomes(seed, n)[0] for seed, n in enumerate((12, 40, 7))]
    errors = [stats.mean_stderr(group) for group in groups]
    for group, error in zip(groups, errors, strict=True):
        assert error == pytest.approx(metrics.mean_stderr([float(right) for right in group]), rel=1e-12)
    assert stats.pooled_stderr(groups) == pytest.approx(
        metrics.pooled_sample_stderr(errors, [len(group) for group in groups]), rel=1e-12
    )
    assert stats.mean_stderr([True]) is None
    assert stats.pooled_stderr([[True], [False]]) is None
