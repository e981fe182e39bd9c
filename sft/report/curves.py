"""Curves of any length as the few points that a screen can show."""

import math
from collections.abc import Sequence

import numpy as np

from sft.html_page.axis import Axis

PIXEL_COLUMNS = 640
"""About what the page is wide; longer curves are drawn with at most four points in each of these columns."""
SMOOTHED_SHARE = 0.02
"""Of all steps, the window of a smoothed curve."""
MIN_SMOOTHED = 20
"""Shorter curves are not smoothed."""
HEADROOM = 0.6
"""A curve whose highest point lies further above its 99.5 % quantile than this part of the rest is cut there."""


def thin(steps: np.ndarray, values: np.ndarray, columns: int = PIXEL_COLUMNS) -> np.ndarray:
    """Places of the points to draw: first, lowest, highest and last of each pixel column.

    Drawn with lines they give the picture that all points would give, single spikes included (M4; Jugel, Jerzak,
    Hackenbroich, Markl: M4, a visualization-oriented time series data aggregation, VLDB 2014).

    Args:
        steps: ascending [n].
        values: finite [n].
        columns: of pixels.

    Returns:
        int64, ascending; all places where there are no more than 4 x columns.
    """
    if len(steps) <= 4 * columns:
        return np.arange(len(steps))
    edges = np.linspace(steps[0], steps[-1], columns + 1)[1:-1]
    bounds = [0, *np.searchsorted(steps, edges), len(steps)]
    kept: set[int] = set()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if begin < end:
            part = values[begin:end]
            kept |= {begin, end - 1, begin + int(part.argmin()), begin + int(part.argmax())}
    return np.array(sorted(kept), dtype=np.int64)


def window(length: int) -> int:
    """Steps in the window of a smoothed curve, odd; 0 where a curve of this length is not smoothed."""
    return 0 if length < MIN_SMOOTHED else 2 * max(2, round(length * SMOOTHED_SHARE / 2)) + 1


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the `window` values around each, fewer at both ends; values finite."""
    width = window(len(values))
    if width == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    begin, end = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    return (sums[end] - sums[begin]) / (end - begin)


def ceiling(values: np.ndarray) -> float:
    """Where to cut a picture so that a few spikes leave the rest readable; the highest value where there are none."""
    high, usual, low = float(values.max()), float(np.quantile(values, 0.995)), float(values.min())
    room = usual + HEADROOM * (usual - low)
    return room if len(values) >= MIN_SMOOTHED and high > room > low else high


class StepAxis(Axis):
    """Optimizer steps, without a margin."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, max(high, low + 1)

    def ticks(self) -> list[float]:
        """Whole numbers alone."""
        return [value for value in super().ticks() if value == int(value)]


class LogAxis(Axis):
    """Positive values by their logarithm."""

    def __init__(self, values: Sequence[float]):
        super().__init__([math.log10(value) for value in values])

    def place(self, value: float) -> float:
        """Percentage from the low end; 0 and less lie at it."""
        return super().place(max(math.log10(value), self.low)) if value > 0 else 0.0

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 between them where there are few."""
        low, high = math.floor(self.low), math.ceil(self.high)
        factors = (1, 2, 5) if high - low <= 3 else (1,)
        every = max(1, math.ceil((high - low) / 8))
        marks = [factor * 10.0**power for power in range(low, high + 1, every) for factor in factors]
        return [mark for mark in marks if self.low <= math.log10(mark) <= self.high]
