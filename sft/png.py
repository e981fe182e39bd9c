"""Figures of matplotlib as PNG files, without a screen."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
GREY, BLUE, ORANGE = "#6b747d", "#0b62a8", "#c2560a"
"""Told apart by readers who do not see red and green, and in grey print."""


def new_figure(width_in: float, height_in: float) -> "Figure":
    """A figure of its own canvas: pyplot would keep every figure, and choose a backend that may need a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Write `figure`, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
    os.replace(partial, path)
