"""Axes of a picture whose shapes stretch with the page: places are percentages."""

import math
from collections.abc import Sequence

TICKS = 5
"""Labels on an axis, about."""


def ticks(low: float, high: float) -> list[float]:
    """Round values within [low, high], about TICKS of them."""
    raw = (high - low) / TICKS or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Values in [low, high] to percentages of a width or height."""

    def __init__(self, values: Sequence[float]):
        low, high = min(values), max(values)
        pad = (high - low) * 0.04 or 0.01
        self.low, self.high = low - pad, high + pad

    def place(self, value: float) -> float:
        """Percentage from the low end."""
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values on it."""
        return ticks(self.low, self.high)
