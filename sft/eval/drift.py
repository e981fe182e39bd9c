"""`sft drift`: what a model forgot. Base and tuned on the same items, a report, and a gate."""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sft.errors import GateFailed, UserError, run_command
from sft.eval.answers import Prompt, load_prompts
from sft.eval.compare import Side, compare
from sft.eval.earlier import check_same_items, kind_of, read_scored
from sft.eval.examine import Examined, check_extras, examine, read_earlier
from sft.eval.options import DriftConfig
from sft.eval.power import describe_power
from sft.eval.ranks import Ranks, join_ranks
from sft.eval.report.markdown import gate_line, models_table, to_markdown, to_table
from sft.eval.report.page import to_html
from sft.eval.report.plots import PLOT_FILES, write_plots
from sft.eval.results import Scored, Scores, make_folder, make_records, write_atomically
from sft.eval.run import Prepared, check_comparable, check_reusable, describe, load_items, prepare, tell
from sft.eval.tasks.files import read_object
from sft.eval.tasks.item import NUM_CHOICES
from sft.settings import load

LOG_WIDTH = 110
"""Columns of the table where there is no terminal, whose width would be known."""


def main(argv: Sequence[str]) -> None:
    """Score the models that are not scored yet, write the report, then apply the gate.

    <out>/base/ and <out>/tuned/ (tuned-2/, … for further models) hold scores, <out>/drift.* the report.

    Raises:
        UserError: options, data or a model cannot be used, or the models cannot be compared.
        GateFailed: the first tuned model does not pass the gate.
    """
    options = load(DriftConfig, argv, prog="sft drift")
    out = Path(options.out)
    with join_ranks() as ranks:
        prompts = load_prompts(options.answers)
        sides = _open_sides(options, ranks)
        for prepared in (side.prepared for side in sides if side.prepared):
            check_extras(prepared, options, prompts)
        if ranks.rank == 0 and (models := [side.prepared for side in sides if side.prepared]):
            tell(describe(models[0]))  # the others are asked the same
        examined = [
            read_earlier(Path(side.folder), options.tasks, ranks)
            if side.prepared is None
            else examine(side.prepared, options, prompts, ranks, out / side.place, noise=side is sides[0])
            for side in sides
        ]
        if ranks.rank == 0:
            report = _compare(sides, examined, options, prompts)
            _check_report(out, report)
            _write(out, report)
            _show(out, report)
            if report["gate"]["failed"]:
                raise GateFailed("; ".join(report["gate"]["failed"]))


@dataclass(frozen=True)
class _Opened:
    """One side, before anything is scored."""

    folder: str
    place: str
    """Where below --out its scores go."""
    prepared: Prepared | None
    """None where it was scored before."""


def _open_sides(options: DriftConfig, ranks: Ranks) -> list[_Opened]:
    """Base first. No model is loaded before all sides are known to be usable and comparable. Collective.

    Raises:
        UserError: a side is none of the three kinds, lacks something, or would be asked other things than the base.
    """
    tuned = [Path(folder).resolve() for folder in options.tuned]
    if twice := [folder for index, folder in enumerate(tuned) if folder in tuned[:index]]:
        raise UserError(f"--tuned: {twice[0]} is given twice; name each model once")
    if taken := [name for name in ("config.json", "results.json") if (Path(options.out) / name).exists()]:
        raise UserError(f"--out {options.out}: holds a {taken[0]}, so it is no report's folder; choose another")
    folders = {"base": options.base, "tuned": options.tuned[0]}
    folders |= {f"tuned-{number}": folder for number, folder in enumerate(options.tuned[1:], start=2)}
    is_model = {place: kind_of(Path(folder)) == "model" for place, folder in folders.items()}
    ranks.on_first(lambda: make_folder(Path(options.out)))
    if not any(is_model.values()):
        if ranks.rank == 0:
            _note_unused(options)
        return [_Opened(folder, place, None) for place, folder in folders.items()]
    if options.data is None:
        raise UserError("--data is missing: give the folder that holds MMLU and HellaSwag")
    questions = ranks.on_first(lambda: load_items(options))
    prepared = {
        place: prepare(folder, questions, options, ranks) for place, folder in folders.items() if is_model[place]
    }
    first, *others = prepared.values()
    for other in others:
        check_comparable(first, other)
    ranks.on_first(lambda: check_reusable({Path(options.out) / place: one for place, one in prepared.items()}))
    for place, folder in folders.items():
        if not is_model[place]:
            ranks.on_first(functools.partial(_check_earlier, Path(folder), first, options.tasks))
    return [_Opened(folder, place, prepared.get(place)) for place, folder in folders.items()]


def _check_report(out: Path, report: dict[str, Any]) -> None:
    """Refuse to write over a report on other models.

    Raises:
        UserError: naming the models of the report that is there, or that it is damaged.
    """
    file = out / "drift.json"
    held = read_object(file) if file.is_file() else report
    models = [
        [side.get("model") for side in (one.get("base"), one.get("tuned")) if isinstance(side, dict)]
        for one in (held, report)
    ]
    if models[0] != models[1]:
        raise UserError(f"{file}: a report on {' and '.join(map(str, models[0]))}; choose another --out, or remove it")


def _note_unused(options: DriftConfig) -> None:
    """Options that a user gave and that change nothing where no model is asked."""
    unused = sorted(options.model_fields_set - {"base", "tuned", "tasks", "gate", "out"})
    if unused:
        tell([f"NOTE: both sides were scored before: {', '.join(f'--{name}' for name in unused)} changes nothing"])


def _check_earlier(folder: Path, prepared: Prepared, tasks: Sequence[str]) -> None:
    """Refuse, before hours are spent, scores that could not be compared with those of a model.

    Raises:
        UserError: the scores are damaged, or of other settings, items, prompts or token ids.
    """
    known = read_scored(folder, tasks)
    unknown = {
        task: make_records(items, prepared.asked[task].prompts, Scores(*np.zeros((2, len(items), NUM_CHOICES))), 24)
        for task, items in prepared.questions.items.items()
    }
    header = prepared.header
    if known.header.get("fallback"):  # this model may fall back, too, which shows when it is loaded
        header = header | {"engine": known.header["engine"]}
    check_same_items(known, Scored(header, unknown, {}), str(folder), prepared.folder)


def _compare(
    sides: Sequence[_Opened], examined: Sequence[Examined], options: DriftConfig, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    names = _short_names([side.folder for side in sides])
    base, *tuned = [Side(name, one.scored, one.heldout_loss) for name, one in zip(names, examined, strict=True)]
    tuned = [replace(side, scored=check_same_items(base.scored, side.scored, base.name, side.name)) for side in tuned]
    before, after = examined[0].answers, examined[1].answers
    answers = None
    if before is not None and after is not None:
        answers = [
            {"prompt": prompt.shown, "base": one, "tuned": other}
            for prompt, one, other in zip(prompts, before, after, strict=True)
        ]
    return compare(base, tuned, options.gate, examined[0].noise, answers)


def _short_names(folders: Sequence[str]) -> list[str]:
    """The last part of each path that tells them apart: `step-100/export` and `step-200/export`."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(map(tuple, parts))):
            break
    return names


def _write(out: Path, report: dict[str, Any]) -> None:
    """The pages, the plots and, last, drift.json, which vouches for them."""
    try:
        for name in ("drift.json", *PLOT_FILES):  # drift.json vouches for the rest; other models, other plots
            (out / name).unlink(missing_ok=True)
        write_atomically(out / "drift.md", to_markdown(report))
        write_atomically(out / "drift.html", to_html(report))
        write_plots(report, out)
        write_atomically(out / "drift.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None


def _show(out: Path, report: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    with console.capture() as shown:  # rich would end the process where the reader has left
        console.print(to_table(report))
        if len(report["models"]) > 2:
            console.print(models_table(report))
    tell(shown.get().splitlines())
    tell(_power_lines(report))
    reason = [] if report["gate"]["failed"] else [gate_line(report)]  # a failure is told as the command's end
    tell([*reason, f"report: {out / 'drift.html'} (also drift.md, drift.json)"])


def _power_lines(report: dict[str, Any]) -> list[str]:
    """What the items of a limited run can show, at the flips that were seen; where none were, at those of one item."""
    lines = []
    for task, row in report["tasks"].items():
        if report["base"].get("limit") is None and report["tuned"].get("limit") is None:
            continue
        rate, seen = row["power"]["flip_rate"], row["right_to_wrong"] + row["wrong_to_right"]
        told = "" if seen else " (none was seen; this takes one)"
        lines += [
            f"{task}: {line}{told}"
            for line in describe_power(row["n"], [max(rate, 1 / row["n"])], row["power"]["margin"])
        ]
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
