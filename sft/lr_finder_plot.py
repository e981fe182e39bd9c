"""The picture of a learning-rate sweep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.lr_suggestion import LAG, Suggestion
from sft.png import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: Suggestion, present_lr: float
) -> "Figure":
    """Losses over learning rates; the suggestion, and `present_lr`, the run file's, as lines.

    The losses after the sweep has gone wrong may leave the picture at the top: they would press the rest flat.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.plot(lrs, losses, color=GREY, linewidth=0.8, alpha=0.6, label="loss of a step")
    axes.plot(lrs, smoothed, color=BLUE, linewidth=1.8, label=f"smoothed, {LAG} steps behind")
    if suggestion.lr is not None:
        axes.axvline(suggestion.lr, color=ORANGE, linewidth=1.6, label=f"suggested: {suggestion.lr:.1e}")
    axes.axvline(present_lr, color="black", linewidth=1.0, linestyle="--", label=f"optim.lr: {present_lr:.1e}")
    if losses:
        low, high = min(losses), max(losses[: max(len(losses) // 4, 1)])
        room = max(high - low, 0.05 * abs(high), 1e-6)
        axes.set_ylim(low - 0.1 * room, max(high, min(max(losses), high + room)) + 0.1 * room)
    axes.set_xlabel("learning rate (of the update after the loss)")
    axes.set_ylabel("loss (nats per label)")
    axes.legend(frameon=False, loc="best", fontsize=9)
    return figure
