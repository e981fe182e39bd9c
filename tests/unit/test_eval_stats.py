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
    tuned = [not right if rng.random() < flips else right for right in base]
    return np.array(base), np.array(tuned)


def compared(base, tuned, clusters=None, **options):
    """Each item its own cluster if not told."""
    clusters = [str(number) for number in range(len(base))] if clusters is None else clusters
    return stats.compare_pairs(np.array(base), np.array(tuned), np.array(clusters), **options)


def changed(n, lost, won, clusters=None, **options):
    """n items of which the first `lost` went wrong and the next `won` right."""
    base = [number < lost or number >= lost + won for number in range(n)]
    return compared(base, [number >= lost for number in range(n)], clusters, **options)


def deltas_of(seed, n, flips=0.2):
    base, tuned = outcomes(seed, n, flips)
    return tuned.astype(np.int64) - base.astype(np.int64)


def test_by_hand():
    base = [True, True, True, False, False, True, False, True]
    tuned = [True, False, False, False, True, False, False, True]
    pair = compared(base, tuned, ["x"] * 8)
    assert (pair.n, pair.base, pair.tuned, pair.delta, pair.drop) == (8, 5 / 8, 3 / 8, -0.25, 0.25)
    assert (pair.right_to_wrong, pair.wrong_to_right) == (3, 1)
    assert pair.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)
    assert pair.mcnemar_midp == pytest.approx(2 * (1 + 4) / 16 - 4 / 16)
    assert pair.errors.iid == pytest.approx(math.sqrt((4 / 8 - 0.25**2) / 7))
    assert pair.errors.clustered is pair.errors.stratified is None
    assert pair.interval == pair.interval_tango == stats.score_interval(8, lost=3, won=1)
    assert pair.interval_bootstrap is pair.interval_bootstrap_clustered is None
    assert pair.degradation_p == pytest.approx(5 / 16)  # P[Binomial(4, 1/2) >= 3]; the normal's 0.15 is smaller


def test_drop_is_one_division():
    assert changed(100, 1, 0).drop == 0.01


@pytest.mark.parametrize("seed", range(4))
def test_paired_se_is_scipys(seed):
    base, tuned = outcomes(seed, 150)
    deltas = deltas_of(seed, 150)
    assert stats.paired_se(deltas) == pytest.approx(scipy_stats.sem(deltas), rel=1e-12)
    t = scipy_stats.ttest_rel(tuned.astype(int), base.astype(int))
    assert np.mean(deltas) / stats.paired_se(deltas) == pytest.approx(t.statistic, rel=1e-9)
    r = np.corrcoef(base, tuned)[0, 1]  # Miller 2024: the same from both models' own errors
    before, after = scipy_stats.sem(base), scipy_stats.sem(tuned)
    assert stats.paired_se(deltas) == pytest.approx(math.sqrt(before**2 + after**2 - 2 * before * after * r), rel=1e-9)


def test_the_unpaired_error_is_not_the_paired_one():
    base, tuned = outcomes(1, 1000, flips=0.05)
    unpaired = math.hypot(scipy_stats.sem(base), scipy_stats.sem(tuned))
    assert compared(base, tuned).errors.iid < 0.5 * unpaired


@pytest.mark.parametrize("seed", range(4))
def test_clustered_se_is_statsmodels(seed):
    sm = pytest.importorskip("statsmodels.api")
    rng = random.Random(seed)
    codes = [rng.randrange(30) for _ in range(200)]
    deltas = deltas_of(seed, 200)
    # statsmodels scales by G / (G - 1) * (n - 1) / (n - k) with k = 1
    fit = sm.OLS(deltas, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": np.array(codes)})
    assert stats.clustered_se(deltas, np.array([str(code) for code in codes])) == pytest.approx(fit.bse[0], rel=1e-9)


def test_stratified_se_is_the_sum_over_strata():
    deltas = deltas_of(5, 90)
    strata = np.array(["a"] * 20 + ["b"] * 30 + ["c"] * 40)
    parts = [deltas[strata == name] for name in "abc"]
    expected = math.sqrt(sum((len(part) * scipy_stats.sem(part)) ** 2 for part in parts)) / 90
    assert stats.stratified_se(deltas, strata) == pytest.approx(expected, rel=1e-12)
    assert stats.stratified_se(deltas, np.array(["a"] * 89 + ["b"])) is None
    shifted = np.where(strata == "a", -1, np.where(strata == "b", 0, 1))  # all variance lies between the strata
    assert stats.stratified_se(shifted, strata) == 0.0
    assert stats.paired_se(shifted) > 0.05


def test_the_largest_error_counts():
    errors = stats.Errors(iid=0.01, stratified=0.02, clustered=None, clusters=1)
    assert errors.largest == 0.02
    assert errors.reach(0.95) == pytest.approx(1.959964 * 0.02)
    errors = stats.Errors(iid=0.01, stratified=0.02, clustered=0.0199, clusters=11)
    assert errors.largest == 0.02
    assert errors.reach(0.95) == pytest.approx(scipy_stats.t.ppf(0.975, 10) * 0.0199, rel=1e-9)


def test_one_item_per_cluster_is_the_independent_error():
    pair = compared(*outcomes(3, 300))
    assert pair.errors.clustered == pytest.approx(pair.errors.iid, rel=1e-12)


def test_flips_that_come_in_clusters_widen_the_interval():
    base, tuned = [True] * 200, [number // 10 % 4 > 0 for number in range(200)]
    clustered = compared(base, tuned, [str(number // 10) for number in range(200)])
    spread = compared(base, tuned)
    assert clustered.errors.clustered > 2.5 * clustered.errors.iid
    width = clustered.interval[1] - clustered.interval[0]
    assert width == pytest.approx(2 * scipy_stats.t.ppf(0.975, 19) * clustered.errors.clustered, rel=1e-9)
    assert width > 2.5 * (spread.interval[1] - spread.interval[0])
    bound = clustered.delta - scipy_stats.t.ppf(0.95, 19) * clustered.errors.clustered
    assert clustered.lower_one_sided == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("lost", [0, 1, 5, 40])
@pytest.mark.parametrize("won", [0, 3, 5, 41, 700])
def test_mcnemar_is_exact(lost, won):
    if lost + won == 0:
        assert stats.mcnemar_exact(0, 0) == stats.mcnemar_midp(0, 0) == 1.0
        return
    expected = scipy_stats.binomtest(min(lost, won), lost + won, 0.5).pvalue
    assert stats.mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)
    assert stats.mcnemar_exact(won, lost) == stats.mcnemar_exact(lost, won)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    table = [[10, lost], [won, 10]]
    assert stats.mcnemar_exact(lost, won) == pytest.approx(tables.mcnemar(table, exact=True).pvalue, rel=1e-9)
    fewer = min(lost, won)
    binomial = scipy_stats.binom(lost + won, 0.5)
    midp = 2 * (binomial.cdf(fewer - 1) + binomial.pmf(fewer) / 2)
    assert stats.mcnemar_midp(lost, won) == pytest.approx(midp, rel=1e-9)
    assert stats.binomial_upper(lost + won, lost) == pytest.approx(binomial.sf(lost - 1), rel=1e-9)


def test_six_one_way_changes_are_the_least_that_can_be_significant():
    assert stats.mcnemar_exact(5, 0) > 0.05 > stats.mcnemar_exact(6, 0)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 10, 57, 199])
@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_student_quantile(df, level):
    assert stats.student_quantile(df, level) == pytest.approx(scipy_stats.t.ppf((1 + level) / 2, df), rel=1e-9)


def test_many_degrees_of_freedom_are_normal():
    assert stats.student_quantile(200) == pytest.approx(scipy_stats.t.ppf(0.975, 200), rel=0.007)


def test_degradation_p_takes_the_most_careful_error():
    base, tuned = [True] * 200, [number // 10 % 4 > 0 for number in range(200)]
    pair = compared(base, tuned, [str(number // 10) for number in range(200)])
    assert pair.degradation_p == pytest.approx(scipy_stats.t.cdf(pair.delta / pair.errors.clustered, 19), rel=1e-6)
    spread = compared(base, tuned)
    assert spread.degradation_p < 1e-12
    gained = changed(14042, 400, 500)  # here both errors are the same, and exact McNemar is the largest
    assert gained.degradation_p == pytest.approx(scipy_stats.binom.sf(399, 900, 0.5), rel=1e-9)
    assert gained.degradation_p > 0.99
    assert changed(50, 0, 0).degradation_p == 1.0


def wald(pair):
    return pair.delta - 1.959964 * pair.errors.iid, pair.delta + 1.959964 * pair.errors.iid


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
@pytest.mark.parametrize(("level", "z"), [(0.95, 1.959964), (0.9, 1.644854)])
def test_the_score_is_z_at_the_ends_of_the_interval(n, lost, won, level, z):
    low, high = stats.score_interval(n, lost, won, level)
    for end, expected in ((low, z), (high, -z)):
        assert end in (-1.0, 1.0) or score_by_search(n, lost, won, end) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("n", "lost", "won"), [(100, 12, 5), (1534, 80, 91)])
def test_the_score_at_zero_is_mcnemars_z(n, lost, won):
    assert score_by_search(n, lost, won, 0.0) == pytest.approx((won - lost) / math.sqrt(lost + won), rel=1e-4)
    level = 1 - stats.two_sided_p((won - lost) / math.sqrt(lost + won))
    assert min(abs(end) for end in stats.score_interval(n, lost, won, level)) < 1e-9


def test_the_score_interval_is_the_published_one():
    """Bentur et al. 2009 in Fagerland, Lydersen and Laake 2014 (BMC Med Res Methodol): -0.286 (-0.517 to -0.026)."""
    assert stats.score_interval(21, lost=7, won=1) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert stats.score_interval(21, lost=1, won=7) == pytest.approx((0.026, 0.517), abs=5e-4)


@pytest.mark.parametrize("n", [1, 20, 1000, 14042])
def test_no_change_is_no_proof(n):
    """With two empty cells Tango's interval is +- z^2 / (n + z^2)."""
    z2 = 1.959964**2
    assert changed(n, 0, 0).interval == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-6)


@pytest.mark.parametrize(("n", "lost"), [(999, 100), (1000, 100), (1000, 24), (14042, 24), (14042, 25)])
def test_which_interval(n, lost):
    """Tango's below 1,000 items or 25 changes."""
    pair = changed(n, lost, 0, clusters=["x"] * n)
    assert pair.interval_wald == pytest.approx(wald(pair), rel=1e-6)
    assert pair.interval_wald != pair.interval_tango
    assert pair.interval == (pair.interval_wald if n >= 1000 and lost >= 25 else pair.interval_tango)


def test_a_wide_tango_interval_is_widened_only_where_clusters_reach_farther():
    base, tuned = [True] * 90 + [False] * 10, [True] * 70 + [False] * 30
    pair = compared(base, tuned, [str(number // 5) for number in range(100)])
    low, high = stats._around(pair.delta, pair.errors.grouped_reach(0.95))
    assert pair.interval == (low, high) != pair.interval_tango
    spread = compared(base, tuned)
    low, high = stats._around(spread.delta, spread.errors.grouped_reach(0.95))
    assert low > spread.interval_tango[0]
    assert spread.interval[0] == spread.interval_tango[0]


def test_one_sided_bounds_are_the_ends_of_a_narrower_interval():
    for n in (300, 3000):
        pair = changed(n, 40, 20, clusters=["x"] * n, confidence=0.95)
        assert pair.interval[0] < pair.lower_one_sided < pair.delta < pair.upper_one_sided < pair.interval[1]
    assert pair.lower_one_sided == pytest.approx(pair.delta - 1.644854 * pair.errors.iid, rel=1e-6)
    careful = changed(3000, 40, 20, clusters=["x"] * 3000, confidence=0.975)
    assert (careful.lower_one_sided, careful.upper_one_sided) == pytest.approx(careful.interval, rel=1e-9)
    even = changed(300, 40, 20, clusters=["x"] * 300, confidence=0.5)
    assert even.lower_one_sided == pytest.approx(even.delta, abs=1e-9)


def test_bounds_stay_on_the_scale():
    pair = changed(12, 12, 0)
    assert pair.interval[0] == -1.0
    assert compared([True] * 20, [False] * 19 + [True], [str(n // 2) for n in range(20)]).interval[0] >= -1.0


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"), [(40, 0.05, 0.02), (40, 0.1, 0.1), (100, 0.03, 0), (100, 0.02, 0.05)]
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


@pytest.mark.parametrize("seed", range(2))
def test_bootstrap_is_scipys(seed):
    base, tuned = outcomes(seed, 400, flips=0.1)
    pair = compared(base, tuned, draws=stats.DRAWS)
    reference = scipy_stats.bootstrap(
        (deltas_of(seed, 400, flips=0.1),), np.mean, method="percentile", n_resamples=10_000, rng=seed
    ).confidence_interval
    assert pair.interval_bootstrap == pytest.approx((reference.low, reference.high), abs=0.0035)  # items are 0.0025
    assert pair.interval_bootstrap == compared(base, tuned, draws=stats.DRAWS).interval_bootstrap
    assert pair.interval_bootstrap == pytest.approx(wald(pair), abs=0.005)


def test_cluster_bootstrap_draws_whole_clusters():
    """Against a plain loop over draws of clusters of unequal size."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), rng.integers(1, 20, 40)).astype(str)
    shift = dict(zip(np.unique(clusters), rng.choice([-1, 0, 1], 40), strict=True))
    deltas = np.array([shift[name] if rng.random() < 0.7 else 0 for name in clusters])
    groups = [deltas[clusters == name] for name in np.unique(clusters)]
    means = [
        np.concatenate([groups[pick] for pick in rng.integers(0, 40, 40)]).mean() for _ in range(4000)
    ]  # fmt: skip
    low, high = stats.cluster_bootstrap(deltas, clusters, stats.DRAWS)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)
    independent = stats.bootstrap(len(deltas), int((deltas < 0).sum()), int((deltas > 0).sum()), stats.DRAWS)
    assert high - low > 1.5 * (independent[1] - independent[0])


def test_few_clusters_have_no_clustered_figures():
    base, tuned = outcomes(2, 90)
    few = compared(base, tuned, [str(number % 9) for number in range(90)], draws=100)
    assert few.errors.clustered is few.interval_bootstrap_clustered is None
    enough = compared(base, tuned, [str(number % 10) for number in range(90)], draws=100)
    assert None not in (enough.errors.clustered, enough.interval_bootstrap_clustered)


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_p_are_statsmodels(seed):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(seed).random(57) ** 3
    p[5] = p[6] = p[7] = 1.0
    assert stats.holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1], rel=1e-12)
    q = stats.benjamini_hochberg(p.tolist())
    assert q == pytest.approx(multitest.multipletests(p, method="fdr_bh")[1], rel=1e-12)
    assert q == pytest.approx(scipy_stats.false_discovery_control(p), rel=1e-12)


def test_adjusted_p_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert stats.holm([0.2]) == stats.benjamini_hochberg([0.2]) == [0.2]


def test_standard_errors_are_lm_evals():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    groups = [outcomes(seed, n)[0].tolist() for seed, n in enumerate((12, 40, 7))]
    errors = [stats.mean_stderr(group) for group in groups]
    for group, error in zip(groups, errors, strict=True):
        assert error == pytest.approx(metrics.mean_stderr([float(right) for right in group]), rel=1e-12)
    assert stats.pooled_stderr(groups) == pytest.approx(
        metrics.pooled_sample_stderr(errors, [len(group) for group in groups]), rel=1e-12
    )
    assert stats.mean_stderr([True]) is None
    assert stats.pooled_stderr([[True], [False]]) is None
