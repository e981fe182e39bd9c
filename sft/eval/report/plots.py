"""The report's pictures as PNG, for slides and papers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.eval.report.grids import known_gains
from sft.eval.report.wording import margin_words, task_name
from sft.eval.results import HEADLINE
from sft.png import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FILES = ("subjects.png", *(f"margins-{task}.png" for task in HEADLINE), "gain.png")
"""All that `write_plots` may write."""
GREY, BLUE, ORANGE = "#6b747d", "#0b62a8", "#c2560a"
"""Told apart by readers who do not see red and green, and in grey print."""


def write_plots(report: dict[str, Any], folder: Path) -> list[str]:
    """Write subjects.png (forest plot), margins-<task>.png and, with several models, gain.png.

    Args:
        report: the content of drift.json.
        folder: an existing folder.

    Returns:
        Names of the files written, of PLOT_FILES.

    Raises:
        OSError: the folder cannot be written.
    """
    figures: dict[str, Figure] = {}
    for task, result in report["tasks"].items():
        if result.get("subjects"):
            figures["subjects.png"] = _subjects(report, result["subjects"])
        figures[f"margins-{task}.png"] = _margins(task, result["margin_histogram"])
    if gains := known_gains(report):
        figures["gain.png"] = _gain(report, gains)
    for name, figure in figures.items():
        save_png(figure, folder / name)
    return list(figures)


def _figure(width_in: float, height_in: float) -> "tuple[Figure, Any]":
    figure = new_figure(width_in, height_in)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _subjects(report: dict[str, Any], subjects: dict[str, dict[str, Any]]) -> "Figure":
    """Changes with their intervals, the largest loss on top; in colour what is left after correction for all."""
    rows = sorted(subjects.items(), key=lambda pair: -pair[1]["delta"])
    figure, axes = _figure(8, 1.2 + 0.18 * len(rows))
    alpha = 1 - report["level"]
    for height, (_, row) in enumerate(rows):
        low, high = (100 * end for end in row["interval"])
        color = ORANGE if row["p_holm"] < alpha else BLUE if row["q_bh"] < alpha else GREY
        axes.plot([low, high], [height, height], color=color, linewidth=1.2)
        axes.plot(100 * row["delta"], height, "o", color=color, markersize=3.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(-100 * report["margin"], color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [_plain(name.replace("_", " ")) for name, _ in rows], fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set_xlabel(
        f"change in points with {100 * report['level']:.0f} % interval; dashed: a loss of "
        f"{margin_words(report['margin'])}\norange: significant after Holm, blue: after Benjamini-Hochberg",
        fontsize=8,
    )
    return figure


def _margins(task: str, data: dict[str, Any]) -> "Figure":
    figure, axes = _figure(7, 3.6)
    axes.stairs(data["base"], data["edges"], fill=True, color=GREY, alpha=0.35, label="base")
    axes.stairs(data["tuned"], data["edges"], color=BLUE, linewidth=1.6, label="tuned")
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("score of the right answer minus that of the best wrong one (below 0: answered wrong)", fontsize=8)
    axes.set_ylabel(f"{task_name(task)} items")
    axes.legend(frameon=False)
    return figure


def _gain(report: dict[str, Any], gains: dict[int, float]) -> "Figure":
    figure, axes = _figure(7, 4.2)
    order = sorted(gains, key=lambda place: gains[place])
    for task, color, marker in zip(report["tasks"], (BLUE, ORANGE), ("s", "o"), strict=False):
        rows = [report["models"][place]["tasks"][task] for place in order]
        errors = [
            [100 * (row["delta"] - row["interval"][0]) for row in rows],
            [100 * (row["interval"][1] - row["delta"]) for row in rows],
        ]
        across, up = [gains[place] for place in order], [100 * row["delta"] for row in rows]
        line = sorted([(0.0, 0.0), *zip(across, up, strict=True)])
        axes.plot(*zip(*line, strict=True), color=color, linewidth=1.4)
        axes.errorbar(across, up, errors, color=color, marker=marker, capsize=3, linestyle="", label=task_name(task))
        for place, x, y in zip(order, across, up, strict=True):
            axes.annotate(str(place), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(-100 * report["margin"], color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("fall of the held-out loss (nats per token), base to tuned")
    axes.set_ylabel("change of accuracy in points")
    legend = "\n".join(f"{place}: {_plain(report['models'][place]['name'])}" for place in order)
    axes.legend(frameon=False, title=legend, title_fontsize=7, alignment="left")
    return figure


def _plain(text: str) -> str:
    """Text without matplotlib's mathematics, which a $ begins."""
    return text.replace("$", r"\$")
