"""How far scores moved where answers may not have: margins, probabilities, KL; they need fewer items than accuracy.

Margins depend on the scale of the scores, and fine-tuning changes it as a temperature would: read them with p(gold)
and with the rank and sign tests, which do not depend on it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sft.eval.results import Record
from sft.eval.stats import Names, clustered_se, mcnemar_exact, paired_se, two_sided_p

Floats = npt.NDArray[np.float64]

PERCENTILES = {"p05": 5, "p25": 25, "p75": 75, "p95": 95}
BINS = 40
"""Of the margins' histogram, about."""


def compare_scores(base: Sequence[Record], tuned: Sequence[Record], metric: str) -> dict[str, Any]:
    """Shifts (tuned - base) of the scores of the right answer, and the KL divergence over the choices.

    margin: score of the right choice less that of the best other one, natural logarithms, per character for acc_norm;
    p_gold, brier, kl: of the softmax of the log-likelihoods whatever the metric is; brier: sum over the choices of
    (p - [right])^2, from 0 to 2; kl: KL(base || tuned) in nats; bits_per_byte: -log2-likelihood of the right choice
    per UTF-8 byte. Items whose right choice has no characters or bytes left, or whose others have none, count in no
    figure that divides by them.
    """
    clusters = np.array([record.cluster for record in base])
    gold = np.array([record.gold for record in base])
    log_p, log_q = log_softmax(_lls(base)), log_softmax(_lls(tuned))
    bits = _bits_per_byte(tuned) - _bits_per_byte(base)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0.0)
    before, after = margins(base, metric), margins(tuned, metric)
    usable = np.isfinite(before) & np.isfinite(after)
    return {
        "margin": describe_shift(after[usable] - before[usable], clusters[usable]) if usable.any() else None,
        "p_gold": describe_shift(_at(np.exp(log_q), gold) - _at(np.exp(log_p), gold), clusters),
        "brier": describe_shift(_brier(log_q, gold) - _brier(log_p, gold), clusters),
        "bits_per_byte": (
            describe_shift(bits[np.isfinite(bits)], clusters[np.isfinite(bits)]) if np.isfinite(bits).any() else None
        ),
        "kl": {"mean": float(kl.mean()), "p95": float(np.percentile(kl, 95)), "max": float(kl.max())},
    }


def probabilities(records: Sequence[Record]) -> Floats:
    """[items, choices]: softmax of the log-likelihoods."""
    return np.exp(log_softmax(_lls(records)))


def log_softmax(lls: Floats) -> Floats:
    """[items, choices], natural logarithms; safe for sums of thousands of nats."""
    shifted = lls - lls.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def margins(records: Sequence[Record], metric: str) -> Floats:
    """[items]: score of the right choice less the best other; positive where the answer is right.

    Not finite where acc_norm meets a choice without characters.
    """
    scores = _lls(records)
    if metric == "acc_norm":
        chars = np.array([record.chars for record in records], dtype=np.float64)
        scores = np.divide(scores, chars, out=np.full_like(scores, -np.inf), where=chars > 0)
    gold = np.array([record.gold for record in records])
    others = scores.copy()
    others[np.arange(len(others)), gold] = -np.inf
    with np.errstate(invalid="ignore"):  # -inf - -inf: filtered by who asked
        return np.asarray(_at(scores, gold) - others.max(axis=1))


def describe_shift(change: Floats, clusters: Names) -> dict[str, Any]:
    """Figures of paired differences, tuned - base.

    se: the larger of the independent and the clustered standard error of the mean; z = mean / se, None where se is 0
    and the mean is not.
    """
    mean = float(change.mean())
    se = max(paired_se(change), clustered_se(change, clusters) or 0.0)
    return {
        "n": len(change),
        "mean": mean,
        "se": se,
        "z": mean / se if se else (0.0 if mean == 0 else None),
        "median": float(np.median(change)),
        **{name: float(np.percentile(change, percent)) for name, percent in PERCENTILES.items()},
        "wilcoxon_p": wilcoxon(change),
        "sign_p": mcnemar_exact(int((change < 0).sum()), int((change > 0).sum())),
    }


def wilcoxon(change: Floats) -> float:
    """Two-sided signed-rank test (Wilcoxon 1945): zeros dropped, ties get mean ranks, normal approximation; 1 if all 0.

    z = (sum of ranks of the positive - n (n + 1) / 4) / sqrt(n (n + 1) (2 n + 1) / 24 - sum of (t^3 - t) / 48).
    """
    change = change[change != 0]
    n = len(change)
    if n == 0:
        return 1.0
    _, codes, ties = np.unique(np.abs(change), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[codes]
    wide = ties.astype(np.float64)
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((wide**3 - wide).sum()) / 48
    return two_sided_p((float(ranks[change > 0].sum()) - n * (n + 1) / 4) / math.sqrt(variance))


def margin_histogram(base: Sequence[Record], tuned: Sequence[Record], metric: str) -> dict[str, list[Any]]:
    """Counts of both models' margins between common edges, of which one is 0: what lies right of it was answered right.

    The outermost half per cent on either side is counted in the outer bins.
    """
    sides = [margins(base, metric), margins(tuned, metric)]
    sides = [side[np.isfinite(side)] for side in sides]
    low, high = np.percentile(np.concatenate([*sides, [0.0]]), [0.5, 99.5])
    width = float(high - low) / BINS or 1.0 / BINS
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 2)
    inside = [np.histogram(side.clip(edges[0], edges[-1]), edges)[0] for side in sides]
    return {"edges": edges.tolist(), "base": inside[0].tolist(), "tuned": inside[1].tolist()}


def _lls(records: Sequence[Record]) -> Floats:
    return np.array([record.lls for record in records], dtype=np.float64)


def _at(values: Floats, gold: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(values[np.arange(len(values)), gold])


def _brier(log_p: Floats, gold: npt.NDArray[np.int64]) -> Floats:
    error = np.exp(log_p)
    error[np.arange(len(error)), gold] -= 1.0
    return np.asarray((error**2).sum(axis=1))


def _bits_per_byte(records: Sequence[Record]) -> Floats:
    lls = np.array([record.lls[record.gold] for record in records])
    num_bytes = np.array([record.utf8_bytes[record.gold] for record in records], dtype=np.float64)
    return np.asarray(np.divide(-lls / math.log(2), num_bytes, out=np.full_like(lls, np.nan), where=num_bytes > 0))
