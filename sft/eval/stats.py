"""Standard errors of accuracies, and the paired comparison of two models on the same items.

Notation: d_i = tuned_i - base_i in {-1, 0, 1} for item i of n. Pure Python; tests compare with scipy and statsmodels.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
"""Confidence level of every interval."""
MIN_CLUSTERS = 10
"""With fewer clusters the clustered standard error is biased towards zero and is not reported."""
NORMAL_DF = 200
"""From here on Student's t is taken as normal: the quantiles differ by less than 0.6 %."""

BISECTIONS = 60
"""Halvings of an interval of at most 1000: beyond a float's own precision."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same n items; delta, errors and interval are fractions (0.01 = one point)."""

    n: int
    base: float
    tuned: float
    delta: float
    se_iid: float
    se_clustered: float | None
    """None where there are fewer than MIN_CLUSTERS clusters."""
    interval: tuple[float, float]
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float

    @property
    def drop(self) -> float:
        """How much accuracy was lost, as one division: 1 of 100 items is exactly 0.01."""
        return (self.right_to_wrong - self.wrong_to_right) / self.n

    @property
    def verdict(self) -> str:
        """A change only where the interval and the exact test agree: both are approximate where few items changed."""
        low, high = self.interval
        if self.mcnemar_p >= 1 - LEVEL or low <= 0 <= high:
            return "no change shown"
        return "degraded" if high < 0 else "improved"


def compare_pairs(base: Sequence[bool], tuned: Sequence[bool], clusters: Sequence[str]) -> Paired:
    """Compare two models item by item.

    The interval is Tango's; where there are enough clusters it reaches at least as far as delta +- Student's quantile
    x the clustered standard error (Miller 2024, arXiv 2411.00640).

    Args:
        base: whether the base model answered each item right.
        tuned: the same for the tuned model.
        clusters: source of each item; items of one source are not independent.
    """
    n = len(base)
    deltas = [int(after) - int(before) for before, after in zip(base, tuned, strict=True)]
    lost, won = deltas.count(-1), deltas.count(1)
    delta = (won - lost) / n
    se_iid, se_clustered = paired_se(deltas), clustered_se(deltas, clusters)
    low, high = score_interval(n, lost, won)
    if se_clustered is not None:
        half_width = student_quantile(len(set(clusters)) - 1) * se_clustered
        low, high = max(min(low, delta - half_width), -1.0), min(max(high, delta + half_width), 1.0)
    return Paired(
        n=n,
        base=sum(base) / n,
        tuned=sum(tuned) / n,
        delta=delta,
        se_iid=se_iid,
        se_clustered=se_clustered,
        interval=(low, high),
        right_to_wrong=lost,
        wrong_to_right=won,
        mcnemar_p=mcnemar_exact(lost, won),
    )


def paired_se(deltas: Sequence[int]) -> float:
    """Standard error of the mean of independent d: sqrt(sum (d - mean)^2 / (n (n - 1))); 0 for n = 1."""
    n = len(deltas)
    if n < 2:
        return 0.0
    mean = sum(deltas) / n
    return math.sqrt(math.fsum((delta - mean) ** 2 for delta in deltas) / (n * (n - 1)))


def clustered_se(deltas: Sequence[int], clusters: Sequence[str]) -> float | None:
    """sqrt(G / (G - 1) * sum over clusters of (sum of d - mean in the cluster)^2) / n; None for few clusters."""
    n = len(deltas)
    mean = sum(deltas) / n
    sums: dict[str, float] = defaultdict(float)
    for delta, cluster in zip(deltas, clusters, strict=True):
        sums[cluster] += delta - mean
    num = len(sums)
    if num < MIN_CLUSTERS:
        return None
    return math.sqrt(num / (num - 1) * math.fsum(value**2 for value in sums.values())) / n


def score_interval(n: int, lost: int, won: int) -> tuple[float, float]:
    """Tango's score interval of the true difference (1998, Statistics in Medicine 17:891): all D with |S(D)| <= z.

    S(D) = (won - lost - n D) / sqrt(n (2 q + D (1 - D))), q the likeliest share of losses under D. Unlike
    delta +- z x standard error it keeps its coverage where few items, or none, changed.
    """
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2

    def fits(difference: float) -> bool:
        variance = n * (2 * _lost_share(n, lost, won, difference) + difference * (1 - difference))
        return (won - lost - n * difference) ** 2 <= z2 * variance

    ends = []
    for end in (-1.0, 1.0):  # S falls with D: the bound lies between delta, which fits, and the end of the scale
        inside, outside = (won - lost) / n, end
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        ends.append(end if fits(end) else inside)
    return ends[0], ends[1]


def _lost_share(n: int, lost: int, won: int, difference: float) -> float:
    """P(right to wrong) of the greatest likelihood where P(wrong to right) - P(right to wrong) is `difference`."""
    half_b = (-(lost + won) + (2 * n - won + lost) * difference) / 2
    a_c = -2 * n * lost * difference * (1 - difference)
    return (math.sqrt(max(half_b**2 - a_c, 0.0)) - half_b) / (2 * n)


def mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided exact McNemar test: min(1, 2 P[Binomial(lost + won, 1/2) <= min(lost, won)])."""
    total = lost + won
    tail = math.fsum(math.exp(_log_choose(total, k) - total * math.log(2)) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def student_quantile(df: int) -> float:
    """t with P(|T| < t) = LEVEL for `df` degrees of freedom, by bisection."""
    if df >= NORMAL_DF:
        return NormalDist().inv_cdf((1 + LEVEL) / 2)
    low, high = 0.0, 1000.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, df) < LEVEL else (low, middle)
    return (low + high) / 2


def _student_within(t: float, df: int) -> float:
    """P(|T| < t): the finite series of Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = df % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for k in range(1 + is_odd, df, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total


def mean_stderr(right: Sequence[bool]) -> float | None:
    """Sample standard deviation / sqrt(n), lm_eval's acc_stderr; None for one item."""
    n = len(right)
    if n < 2:
        return None
    mean = sum(right) / n
    return math.sqrt(mean * (1 - mean) / (n - 1))


def pooled_stderr(groups: Sequence[Sequence[bool]]) -> float | None:
    """lm_eval's standard error of a group mean: sqrt(sum (n_i - 1) n_i se_i^2 / (N - k) / N); None if N = k."""
    total = sum(len(group) for group in groups)
    if total == len(groups):
        return None
    within = math.fsum((len(group) - 1) * len(group) * (mean_stderr(group) or 0.0) ** 2 for group in groups)
    return math.sqrt(within / (total - len(groups)) / total)
