"""Standard errors of accuracies, and the paired comparison of two models on the same items.

Notation: d_i = tuned_i - base_i in {-1, 0, 1} for item i of n; lost = right to wrong, won = wrong to right;
delta = mean of d. No scipy; tests compare with scipy and statsmodels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Confidence level of every two-sided interval."""
MIN_CLUSTERS = 10
"""With fewer clusters the clustered standard error is biased towards zero and is not reported."""
LARGE = 1000
"""From this many items on, delta +- quantile x standard error; below, Tango's interval."""
MIN_CHANGED = 25
"""With fewer changed items a standard error says little, whatever n is (the usual bound for McNemar's normal z)."""
NORMAL_DF = 200
"""From here on Student's t is taken as normal: the quantiles differ by less than 0.6 %."""
BISECTIONS = 60
"""Halvings of an interval of at most 1000: beyond a float's own precision."""
DRAWS = 10_000
"""Bootstrap samples: the ends of a percentile interval move by about 2 % of its width."""
SEED = 20_240_613
"""Of the bootstrap: the same records give the same report."""

Deltas = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Errors:
    """Standard errors of delta: fractions."""

    iid: float
    """Items independent of each other."""
    stratified: float | None
    """Items drawn within fixed strata; None without strata, or where one has a single item."""
    clustered: float | None
    """Clusters independent of each other, items of one cluster not; None for fewer than MIN_CLUSTERS clusters."""
    clusters: int
    """How many there are."""

    @property
    def largest(self) -> float:
        """The one that the verdict goes by."""
        return max(self.iid, self.stratified or 0.0, self.clustered or 0.0)

    def reach(self, level: float) -> float:
        """Half the width of the widest two-sided interval: normal quantiles, Student's for the clustered error."""
        return max(normal_quantile(level) * self.iid, self.grouped_reach(level))

    def grouped_reach(self, level: float) -> float:
        """The same without the iid error; 0 where there are neither strata nor clusters."""
        clustered = 0.0 if self.clustered is None else student_quantile(self.clusters - 1, level) * self.clustered
        return max(normal_quantile(level) * (self.stratified or 0.0), clustered)


@dataclass(frozen=True)
class Paired:
    """Two models on the same n items; delta, errors and bounds are fractions (0.01 = one point)."""

    n: int
    base: float
    tuned: float
    delta: float
    errors: Errors
    interval: tuple[float, float]
    """Two-sided at LEVEL: the one that the verdict goes by."""
    interval_wald: tuple[float, float]
    """delta +- the widest of the errors' intervals."""
    interval_tango: tuple[float, float]
    interval_bootstrap: tuple[float, float] | None
    """Percentiles; None where no samples were asked for."""
    interval_bootstrap_clustered: tuple[float, float] | None
    """Whole clusters drawn; None also where there are fewer than MIN_CLUSTERS."""
    lower_one_sided: float
    """delta is above it with the confidence that was asked for."""
    upper_one_sided: float
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float
    mcnemar_midp: float

    @property
    def drop(self) -> float:
        """How much accuracy was lost, as one division: 1 of 100 items is exactly 0.01."""
        return (self.right_to_wrong - self.wrong_to_right) / self.n

    @property
    def degradation_p(self) -> float:
        """One-sided p that accuracy was lost: the largest of exact McNemar's and of those of the standard errors."""
        return max(
            binomial_upper(self.right_to_wrong + self.wrong_to_right, self.right_to_wrong),
            *(
                _lower_tail(self.delta, error, df)
                for error, df in (
                    (self.errors.iid, NORMAL_DF),
                    (self.errors.stratified, NORMAL_DF),
                    (self.errors.clustered, self.errors.clusters - 1),
                )
                if error is not None
            ),
        )


def compare_pairs(
    base: Bools, tuned: Bools, clusters: Names, strata: Names | None = None, confidence: float = LEVEL, draws: int = 0
) -> Paired:
    """Compare two models item by item.

    The interval: where items and changes are many (LARGE, MIN_CHANGED), delta +- quantile x the largest standard error
    (Miller 2024, arXiv 2411.00640); else Tango's, widened where a clustered or stratified error reaches farther.

    Args:
        base: bool [n], whether the base model answered each item right.
        tuned: the same for the tuned model.
        clusters: source of each item; items of one source are not independent.
        strata: fixed parts that the items were drawn from; None: one.
        confidence: of the one-sided bounds.
        draws: bootstrap samples; 0 for none.
    """
    n = len(base)
    deltas = tuned.astype(np.int64) - base.astype(np.int64)
    lost, won = int((deltas == -1).sum()), int((deltas == 1).sum())
    num_clusters = len(np.unique(clusters))
    errors = Errors(
        iid=paired_se(deltas),
        stratified=None if strata is None else stratified_se(deltas, strata),
        clustered=clustered_se(deltas, clusters),
        clusters=num_clusters,
    )
    one_sided = best_interval(n, lost, won, errors, 2 * confidence - 1)
    return Paired(
        n=n,
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        delta=(won - lost) / n,
        errors=errors,
        interval=best_interval(n, lost, won, errors, LEVEL),
        interval_wald=_around((won - lost) / n, errors.reach(LEVEL)),
        interval_tango=score_interval(n, lost, won),
        interval_bootstrap=bootstrap(n, lost, won, draws) if draws else None,
        interval_bootstrap_clustered=(
            cluster_bootstrap(deltas, clusters, draws) if draws and num_clusters >= MIN_CLUSTERS else None
        ),
        lower_one_sided=one_sided[0],
        upper_one_sided=one_sided[1],
        right_to_wrong=lost,
        wrong_to_right=won,
        mcnemar_p=mcnemar_exact(lost, won),
        mcnemar_midp=mcnemar_midp(lost, won),
    )


def best_interval(n: int, lost: int, won: int, errors: Errors, level: float) -> tuple[float, float]:
    """The two-sided interval that compare_pairs describes; its ends are one-sided bounds at (1 + level) / 2."""
    delta = (won - lost) / n
    if n >= LARGE and lost + won >= MIN_CHANGED:
        return _around(delta, errors.reach(level))
    low, high = score_interval(n, lost, won, level)
    grouped_low, grouped_high = _around(delta, errors.grouped_reach(level))
    return min(low, grouped_low), max(high, grouped_high)


def _around(delta: float, reach: float) -> tuple[float, float]:
    return max(delta - reach, -1.0), min(delta + reach, 1.0)


def paired_se(deltas: npt.NDArray[np.generic]) -> float:
    """Standard error of the mean of independent d: sqrt(sum (d - mean)^2 / (n (n - 1))); 0 for n = 1."""
    n = len(deltas)
    return float(deltas.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def stratified_se(deltas: Deltas, strata: Names) -> float | None:
    """sqrt(sum over strata of n_h s_h^2) / n, s_h^2 the variance of d in the stratum; None where one has one item."""
    codes = np.unique(strata, return_inverse=True)[1]
    sizes = np.bincount(codes)
    if sizes.min() < 2:
        return None
    within = deltas - (np.bincount(codes, weights=deltas) / sizes)[codes]
    variances = np.bincount(codes, weights=within**2) / (sizes - 1)
    return math.sqrt(float((sizes * variances).sum())) / len(deltas)


def clustered_se(deltas: npt.NDArray[np.generic], clusters: Names) -> float | None:
    """sqrt(G / (G - 1) * sum over clusters of (sum of d - mean in the cluster)^2) / n; None for few clusters."""
    codes = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(codes, weights=deltas - deltas.mean())
    num = len(sums)
    return math.sqrt(num / (num - 1) * float((sums**2).sum())) / len(deltas) if num >= MIN_CLUSTERS else None


def bootstrap(n: int, lost: int, won: int, draws: int) -> tuple[float, float]:
    """Percentile interval of delta over samples of n items with replacement: d has three values, so counts suffice."""
    shares = [lost / n, won / n, (n - lost - won) / n]
    counts = np.random.default_rng(SEED).multinomial(n, shares, size=draws)
    return _percentiles((counts[:, 1] - counts[:, 0]) / n)


def cluster_bootstrap(deltas: Deltas, clusters: Names, draws: int) -> tuple[float, float]:
    """The same over samples of whole clusters; delta is the ratio of summed d to summed sizes.

    Clusters of the same size and the same sum are interchangeable, so only the counts of each kind are drawn.
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    pairs = np.stack([np.bincount(codes, weights=deltas), np.bincount(codes)], axis=1)
    kinds, frequency = np.unique(pairs, axis=0, return_counts=True)
    counts = np.random.default_rng(SEED).multinomial(len(pairs), frequency / len(pairs), size=draws)
    return _percentiles((counts @ kinds[:, 0]) / (counts @ kinds[:, 1]))


def _percentiles(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def score_interval(n: int, lost: int, won: int, level: float = LEVEL) -> tuple[float, float]:
    """Tango's score interval of the true difference (1998, Statistics in Medicine 17:891): all D with |S(D)| <= z.

    S(D) = (won - lost - n D) / sqrt(n (2 q + D (1 - D))), q the likeliest share of losses under D. Unlike
    delta +- z x standard error it keeps its coverage where few items, or none, changed.
    """
    z2 = normal_quantile(level) ** 2

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
    return min(1.0, 2 * binomial_upper(lost + won, max(lost, won)))


def mcnemar_midp(lost: int, won: int) -> float:
    """The exact p less P[Binomial = min(lost, won)]: closer to the nominal level (Fagerland et al. 2013)."""
    total = lost + won
    middle = math.exp(_log_half_binomial(total, min(lost, won)))
    return min(1.0, max(0.0, 2 * binomial_upper(total, max(lost, won)) - middle))


def binomial_upper(total: int, at_least: int) -> float:
    """P[Binomial(total, 1/2) >= at_least]; the other tail where it is the shorter sum."""
    if 2 * at_least <= total:
        return 1.0 - math.fsum(math.exp(_log_half_binomial(total, k)) for k in range(at_least))
    return math.fsum(math.exp(_log_half_binomial(total, k)) for k in range(at_least, total + 1))


def _log_half_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p (1979): p_(i) (m - i + 1), running maximum, at most 1; controls any false claim."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in adjusted]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q (1995): p_(i) m / i, running minimum from the top; controls the false share."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return [float(value) for value in adjusted]


def normal_quantile(level: float) -> float:
    """z with P(|Z| < z) = level."""
    return NormalDist().inv_cdf((1 + level) / 2)


def two_sided_p(z: float) -> float:
    """P(|Z| >= |z|), exact far into the tail."""
    return math.erfc(abs(z) / math.sqrt(2))


def student_quantile(df: int, level: float = LEVEL) -> float:
    """t with P(|T| < t) = level for `df` degrees of freedom, by bisection."""
    if df >= NORMAL_DF:
        return normal_quantile(level)
    low, high = 0.0, 1000.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, df) < level else (low, middle)
    return (low + high) / 2


def _lower_tail(delta: float, error: float, df: int) -> float:
    """P(T <= delta / error)."""
    if error == 0.0:
        return 0.5 if delta == 0 else float(delta > 0)
    t = delta / error
    outside = two_sided_p(t) if df >= NORMAL_DF else 1 - _student_within(abs(t), df)
    return outside / 2 if t < 0 else 1 - outside / 2


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
