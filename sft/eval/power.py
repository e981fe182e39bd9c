"""What a number of items can show: planning formulas for paired comparisons (Connor 1987, Biometrics 43:207).

A flip is an item that one model answers right and the other wrong; the flip rate is their share of all items.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from sft.eval.stats import BISECTIONS, LEVEL, normal_quantile

POWER = 0.8
"""Probability of showing a drop that is there."""
MARGIN = 0.01
"""One point: the largest drop that counts as none where the user names no other."""


def items_needed(flip_rate: float, drop: float) -> int:
    """Items with which a drop is shown (two-sided at LEVEL) with probability POWER.

    n = (z_a sqrt(p) + z_b sqrt(p - D^2))^2 / D^2 for flip rate p and drop D, 0 < D <= sqrt(p).
    """
    return math.ceil(_connor(flip_rate, drop))


def _connor(flip_rate: float, drop: float) -> float:
    z_power = NormalDist().inv_cdf(POWER)
    spread = math.sqrt(max(flip_rate - drop**2, 0.0))
    return float((normal_quantile(LEVEL) * math.sqrt(flip_rate) + z_power * spread) ** 2 / drop**2)


def minimum_detectable(n: int, flip_rate: float) -> float:
    """Smallest drop (fraction) that n items show with probability POWER; Connor's formula inverted.

    A figure above the flip rate says that no drop with so few flips can be shown: its flips would have to be more.
    1 where even that is out of reach: with three items.
    """
    low, high = 0.0, math.sqrt(flip_rate)
    if _connor(flip_rate, high) > n:
        return 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _connor(flip_rate, middle) <= n else (middle, high)
    return high


def power_non_inferior(n: int, flip_rate: float, margin: float, confidence: float = LEVEL) -> float:
    """Probability that n items rule out a drop of `margin` where nothing changed: Phi(m / sqrt(p / n) - z)."""
    return NormalDist().cdf(margin / math.sqrt(flip_rate / n) - NormalDist().inv_cdf(confidence))


def items_to_rule_out(variance: float, delta: float, margin: float, confidence: float) -> int | None:
    """Items that rule out a drop of `margin` with probability POWER if `delta` is the true change.

    n = v ((z_confidence + z_power) / (delta + margin))^2, v = n SE^2 the variance of one item's change.
    None where delta itself is no better than -margin: more items would not help.
    """
    if delta <= -margin:
        return None
    quantiles = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(POWER)
    return math.ceil(variance * (quantiles / (delta + margin)) ** 2)


def describe_power(n: int, flip_rates: Sequence[float], margin: float = MARGIN) -> list[str]:
    """A line per flip rate: what n items of a task can show (four times in five), and how many a margin takes."""
    return [
        f"with {n:,} items a drop below {100 * minimum_detectable(n, rate):.2f} points cannot be shown at "
        f"{100 * rate:.3g} % flips; to see one of {100 * margin:g} points takes {items_needed(rate, margin):,} items"
        for rate in flip_rates
    ]
