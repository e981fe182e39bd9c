"""drift.md, the terminal tables and the PNG, from invented figures."""

import copy
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft.eval.report import grids
from sft.eval.report.markdown import gate_line, models_table, to_markdown, to_table
from sft.eval.report.plots import PLOT_FILES, write_plots
from sft.eval.report.wording import MARKS, SENTENCES, TONES, gate_rule, p_value, points, verdict_sentences
from tests import drift_report


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return drift_report.full()


def lines_of(table: Any, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def rows_of(markdown: str) -> list[list[str]]:
    """Cells of every table row, with the escapes undone."""
    marked = markdown.replace("\\|", "\0")
    rows = [line.strip("| ").split(" | ") for line in marked.splitlines() if line.startswith("| ")]
    return [[cell.replace("\0", "|").replace("&lt;", "<").replace("&amp;", "&") for cell in row] for row in rows]


def test_markdown_holds_the_figures_of_the_dictionary(full: dict[str, Any]) -> None:
    rows = {row[0]: row for row in rows_of(to_markdown(full))}
    for task, metric, name in (("mmlu", "acc", "MMLU acc"), ("hellaswag", "acc_norm", "HellaSwag acc_norm")):
        row = full["tasks"][task]["metrics"][metric]
        assert [row["verdict"] for row in full["tasks"].values()] == ["degraded beyond margin", "non-inferior"]
        head = rows_of(to_markdown(full))
        found = next(cells for cells in head if cells[0] == name)
        assert found[2:5] == [f"{100 * row['base']:.2f}", f"{100 * row['tuned']:.2f}", f"{100 * row['delta']:+.2f}"]
        assert found[-1] == row["verdict"]
    for name, row in full["tasks"]["mmlu"]["subjects"].items():
        assert rows[name][4] == f"{100 * row['delta']:+.2f}"
        assert rows[name][6:8] == [f"{row['right_to_wrong']:,}", f"{row['wrong_to_right']:,}"]
        assert rows[name][9] == p_value(row["p_holm"])
    assert rows["margin of the right answer (nats)"][2] == f"{full['tasks']['mmlu']['scores']['margin']['mean']:+.4f}"


def test_a_changed_figure_changes_the_markdown(full: dict[str, Any]) -> None:
    """The control of the test before: every block of the dictionary is read, not only its headline."""
    before = to_markdown(full)
    mmlu = ("tasks", "mmlu")
    for *way, key, value in [
        (*mmlu, "metrics", "acc", "se_clustered", 0.7777),
        (*mmlu, "metrics", "acc", "mcnemar_midp", 0.7777),
        (*mmlu, "metrics", "acc", "interval_tango", [-0.7777, 0.7777]),
        (*mmlu, "categories", "stem", "delta", 0.7777),
        (*mmlu, "subjects", "anatomy", "q_bh", 0.7777),
        (*mmlu, "power", "mde", 0.7777),
        (*mmlu, "noise", "max_abs_ll", 0.7777),
        (*mmlu, "scores", "brier", "sign_p", 0.7777),
        (*mmlu, "scores", "kl", "p95", 0.7777),
        ("models", 3, "heldout_loss", 0.7777),
        ("any_degradation", 1, "p_holm", 0.7777),
        ("base", "engine", "7777"),
        ("base", "tasks", "mmlu", "items_sha256", "7777"),
        ("answers", 0, "tuned", "7777"),
    ]:
        report = copy.deepcopy(full)
        block: Any = report
        for step in way:
            block = block[step]
        assert block[key] != value
        block[key] = value
        after = to_markdown(report)
        assert "7777" not in before, way
        assert "7777" in after or "77.77" in after, (way, key)


def test_markdown_cannot_be_broken_by_names_and_texts(full: dict[str, Any]) -> None:
    report = copy.deepcopy(full)
    report["answers"] = [{"prompt": "a", "base": "```\n# no heading\n```", "tuned": "| no | table |"}]
    text = to_markdown(report)
    assert "````text\n```\n# no heading\n```\n````" in text
    outside = "".join(part for part in text.split("```text")[0] if part)
    assert "<script" not in outside.replace("`<script>", ""), "a name outside code may not be markup"
    widths: dict[int, set[int]] = {}
    for number, line in enumerate(text.splitlines()):
        if line.startswith("| ---"):
            widths[number] = {line.count("|")}
    assert len(widths) > 10
    lines = text.replace("\\|", "").splitlines()
    for number, width in widths.items():
        assert {lines[number - 1].count("|"), lines[number + 1].count("|")} == width


def test_small_report_says_what_it_does_not_know() -> None:
    report = drift_report.small()
    text = to_markdown(report)
    assert "Undecided on HellaSwag" in text
    assert "not measured" in text
    assert "No gate was set" in text
    assert "## Models" not in text
    assert "not set, or not recorded" in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize("make", [drift_report.full, drift_report.small])
def test_terminal_tables_fit_100_columns(make: Any) -> None:
    report = make()
    table = lines_of(to_table(report))
    for task, result in report["tasks"].items():
        name = next(row[0] for row in grids.headline(report).rows if row[0].endswith(result["metric"]))
        line = next(line for line in table if name in line)
        assert points(result["delta"]) in line, task
        assert result["verdict"] in line, "the headline's verdict stands on one line"
    for lines in (table, lines_of(models_table(report))):
        assert max(map(len, lines)) <= 100
        assert "…" not in "".join(lines)


def test_terminal_table_shows_a_name_with_brackets_as_it_is(full: dict[str, Any]) -> None:
    report = copy.deepcopy(full)
    report["models"][1]["name"] = "[red]x[/red]"
    assert any("[red]x[/red]" in line for line in lines_of(models_table(report)))


def test_every_verdict_has_its_words() -> None:
    assert set(MARKS) == set(TONES) == set(SENTENCES)
    for verdict in MARKS:
        report = drift_report.small()
        report["tasks"]["hellaswag"]["verdict"] = verdict
        (sentence,) = verdict_sentences(report)
        assert "no drift" not in sentence.lower()
        assert "HellaSwag" in sentence


def test_verdicts_come_worst_first(full: dict[str, Any]) -> None:
    report = copy.deepcopy(full)
    report["tasks"]["mmlu"]["verdict"], report["tasks"]["hellaswag"]["verdict"] = "improved", "inconclusive"
    assert [line.split()[0] for line in verdict_sentences(report)] == ["Undecided", "The"]


def test_gate_line(full: dict[str, Any]) -> None:
    assert gate_line(drift_report.small()).startswith("No gate")
    assert gate_line(full).startswith("Gate failed: mmlu acc changed by -2.64")
    report = copy.deepcopy(full)
    report["gate"] |= {"failed": [], "passed": True}
    assert gate_line(report) == (
        "Gate passed: on every task, a drop of 1.00 points is ruled out (one-sided confidence 95 %)."
    )
    report["gate"]["rule"] = "degradation"
    assert "rules none out" in gate_line(report)
    report["gate"]["confidence"] = 0.975  # "98 %" would claim more than was asked for, at 0.995 even certainty
    assert "(one-sided confidence 97.5 %)" in gate_line(report)
    assert "(one-sided confidence 97.5 %)" in gate_rule(report)


def test_numbers_are_never_minus_zero_nor_p_zero() -> None:
    assert points(-0.00001) == "+0.00"
    assert points(-0.01) == "-1.00"
    assert p_value(0.0) == "<0.0001"
    assert p_value(1.0) == "1.0000"


def test_png_of_every_plot(full: dict[str, Any], tmp_path: Path) -> None:
    """Each is a whole PNG with something drawn; pyplot, which needs a choice of screen, stays unloaded."""
    names = write_plots(full, tmp_path)
    assert sorted(names) == sorted(PLOT_FILES) == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        width, colours = read_png(tmp_path / name)
        assert width > 800
        assert colours > 20, name
    assert "matplotlib.pyplot" not in sys.modules


def test_png_of_a_small_report(tmp_path: Path) -> None:
    assert write_plots(drift_report.small(), tmp_path) == ["margins-hellaswag.png"]


def test_names_with_dollars_are_no_mathematics(full: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(full)
    report["models"][1]["name"] = "$\\frac{"
    assert "gain.png" in write_plots(report, tmp_path)


def read_png(path: Path) -> tuple[int, int]:
    """(width, distinct bytes of the unpacked picture) of a PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    (width,) = struct.unpack(">I", data[16:20])
    packed, place = b"", 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            packed += data[place + 8 : place + 8 + size]
        place += 12 + size
    return width, len(set(zlib.decompress(packed)))
