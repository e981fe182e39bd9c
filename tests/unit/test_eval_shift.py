"""Shifts of scores against scipy and figures by hand. Run: pytest tests/unit/test_eval_shift.py"""

import dataclasses
import math

import numpy as np
import pytest

from sft.eval import shift
from tests.eval_records import invented_record as record

scipy_stats = pytest.importorskip("scipy.stats")


def models(seed, n=200, scale=1.0):
    """Two models' log-likelihoods of the same n items, and which choice is right."""
    rng = np.random.default_rng(seed)
    base = -30 * rng.random((n, 4))
    return base, base + scale * rng.normal(0.1, 1.0, (n, 4)), rng.integers(0, 4, n)


def records_of(lls, gold, clusters=None):
    clusters = clusters or [str(number) for number in range(len(lls))]
    return [record(row, int(right), cluster=name) for row, right, name in zip(lls, gold, clusters, strict=True)]


def test_by_hand():
    """Odds of 2 to 1 to 1 to 0 become 1 to 2 to 1 to 0."""
    tiny = -1000.0
    base = record([math.log(2) - 50, -50.0, -50.0, tiny], gold=0, utf8_bytes=(5, 5, 5, 5))
    tuned = record([-50.0, math.log(2) - 50, -50.0, tiny], gold=0, utf8_bytes=(5, 5, 5, 5))
    scores = shift.compare_scores([base], [tuned], "acc")
    assert scores["margin"]["mean"] == pytest.approx(-2 * math.log(2))
    assert scores["p_gold"]["mean"] == pytest.approx(0.25 - 0.5)
    brier = [0.5**2 + 2 * 0.25**2, 0.75**2 + 0.5**2 + 0.25**2]
    assert scores["brier"]["mean"] == pytest.approx(brier[1] - brier[0])
    assert scores["bits_per_byte"]["mean"] == pytest.approx(1 / 5)
    assert scores["kl"]["mean"] == scores["kl"]["max"] == pytest.approx(0.25 * math.log(2))
    assert (scores["margin"]["n"], scores["margin"]["se"], scores["margin"]["z"]) == (1, 0.0, None)


def test_margins_per_character():
    one = record([-10.0, -12.0, -30.0, -40.0], gold=1, chars=(10, 20, 10, 10))
    assert shift.margins([one], "acc") == pytest.approx([-2.0])
    assert shift.margins([one], "acc_norm") == pytest.approx([-0.6 + 1.0])


def test_a_positive_margin_is_a_right_answer():
    base, _, gold = models(0)
    records = records_of(base, gold)
    assert (shift.margins(records, "acc") > 0).tolist() == [one.correct for one in records]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scipys(seed):
    base, tuned, gold = models(seed)
    scores = shift.compare_scores(records_of(base, gold), records_of(tuned, gold), "acc")
    p, q = np.exp(base), np.exp(tuned)
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    kl = [scipy_stats.entropy(before, after) for before, after in zip(p, q, strict=True)]
    assert scores["kl"]["mean"] == pytest.approx(np.mean(kl), rel=1e-9)
    assert scores["kl"]["p95"] == pytest.approx(np.percentile(kl, 95), rel=1e-9)
    assert scores["kl"]["max"] == pytest.approx(max(kl), rel=1e-9)
    rows = np.arange(len(gold))
    change = q[rows, gold] - p[rows, gold]
    figures = scores["p_gold"]
    t = scipy_stats.ttest_rel(q[rows, gold], p[rows, gold])
    assert (figures["mean"], figures["median"]) == pytest.approx((change.mean(), np.median(change)), rel=1e-9)
    assert figures["z"] == pytest.approx(t.statistic, rel=1e-9)
    assert figures["wilcoxon_p"] == pytest.approx(scipy_stats.wilcoxon(change, method="asymptotic").pvalue, rel=1e-9)
    sign = scipy_stats.binomtest(int((change > 0).sum()), len(change), 0.5)
    assert figures["sign_p"] == pytest.approx(sign.pvalue, rel=1e-9)
    right = np.eye(4)[gold]
    brier = ((q - right) ** 2).sum(axis=1) - ((p - right) ** 2).sum(axis=1)
    assert scores["brier"]["mean"] == pytest.approx(brier.mean(), rel=1e-9)
    quantiles = [figures[name] for name in ("p05", "p25", "p75", "p95")]
    assert quantiles == pytest.approx(np.quantile(change, [0.05, 0.25, 0.75, 0.95]), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_with_ties_and_zeros_is_scipys(seed):
    change = np.random.default_rng(seed).integers(-3, 5, 80).astype(float)
    assert 0 in change
    assert shift.wilcoxon(change) == pytest.approx(
        scipy_stats.wilcoxon(change, zero_method="wilcox", correction=False, method="asymptotic").pvalue, rel=1e-9
    )


def test_wilcoxon_of_no_change():
    assert shift.wilcoxon(np.zeros(5)) == 1.0


def test_a_shift_that_clusters_share_has_a_larger_error():
    base, _, gold = models(4, n=400)
    clusters = [str(number // 20) for number in range(400)]
    step = np.random.default_rng(5).normal(size=20)[np.arange(400) // 20]
    tuned = base.copy()
    tuned[np.arange(400), gold] += step
    shared = shift.compare_scores(records_of(base, gold, clusters), records_of(tuned, gold, clusters), "acc")
    alone = shift.compare_scores(records_of(base, gold), records_of(tuned, gold), "acc")
    assert shared["margin"]["se"] > 3 * alone["margin"]["se"]
    assert shared["margin"]["mean"] == alone["margin"]["mean"]


def test_identical_models_do_not_shift():
    base, _, gold = models(1)
    records = records_of(base, gold)
    scores = shift.compare_scores(records, records, "acc")
    assert scores["kl"] == {"mean": 0.0, "p95": 0.0, "max": 0.0}
    for name in ("margin", "p_gold", "brier", "bits_per_byte"):
        figures = scores[name]
        assert (figures["mean"], figures["se"], figures["z"]) == (0, 0, 0)
        assert figures["wilcoxon_p"] == figures["sign_p"] == 1.0


def test_a_temperature_moves_margins_but_not_their_signs():
    """Why the mean margin is not read alone: no answer changes."""
    base, _, gold = models(2)
    hot = shift.compare_scores(records_of(base, gold), records_of(base / 2, gold), "acc")
    before = shift.margins(records_of(base, gold), "acc")
    assert hot["margin"]["mean"] == pytest.approx(-before.mean() / 2)
    assert abs(hot["margin"]["z"]) > 5
    assert (np.sign(shift.margins(records_of(base / 2, gold), "acc")) == np.sign(before)).all()


def test_log_likelihoods_of_long_texts_do_not_overflow():
    base = record([-5000.0, -9000.0, -7000.0, -6000.0], gold=1)
    tuned = record([-9000.0, -5000.0, -7000.0, -6000.0], gold=1)
    with np.errstate(all="raise", under="ignore"):
        scores = shift.compare_scores([base], [tuned], "acc")
    assert scores["kl"]["mean"] == pytest.approx(4000)
    assert scores["p_gold"]["mean"] == 1.0


def test_choices_without_characters_count_in_nothing_that_divides_by_them():
    empty = record([-3.0, -4.0, -5.0, -6.0], gold=1, chars=(4, 0, 4, 4))
    usual = record([-3.0, -4.0, -5.0, -6.0], gold=0, chars=(4, 4, 0, 4))
    moved = dataclasses.replace(usual, lls=(-2.0, -4.0, -5.0, -6.0))
    scores = shift.compare_scores([empty, usual], [empty, moved], "acc_norm")
    assert (scores["margin"]["n"], scores["bits_per_byte"]["n"], scores["p_gold"]["n"]) == (1, 1, 2)
    assert scores["margin"]["mean"] == pytest.approx(0.25)
    alone = shift.compare_scores([empty], [empty], "acc_norm")
    assert alone["margin"] is alone["bits_per_byte"] is None


def test_histogram_counts_every_item_and_zero_is_an_edge():
    base, tuned, gold = models(3, n=500)
    before, after = records_of(base, gold), records_of(tuned, gold)
    histogram = shift.margin_histogram(before, after, "acc")
    edges = np.array(histogram["edges"])
    assert 40 <= len(edges) <= 44
    assert 0.0 in edges
    for name, records in (("base", before), ("tuned", after)):
        counts = np.array(histogram[name])
        assert (len(counts), counts.sum()) == (len(edges) - 1, 500)
        assert counts[edges[:-1] >= 0].sum() == sum(one.correct for one in records)


def test_histogram_of_equal_margins():
    tied = record([-1.0, -1.0, -1.0, -1.0], gold=0)
    histogram = shift.margin_histogram([tied], [tied], "acc")
    assert sum(histogram["base"]) == sum(histogram["tuned"]) == 1
