"""`sft drift`: what a model forgot. Base and tuned on the same items, a report, and a gate."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sft.errors import GateFailed, UserError, run_command
from sft.eval.options import DriftConfig
from sft.eval.ranks import join_ranks, read_place
from sft.eval.report import compare, gate_line, to_markdown, to_table
from sft.eval.results import RESULT_FILES, make_folder, write_atomically, write_results
from sft.eval.run import Scored, check_comparable, describe_truncation, load_items, prepare, score_prepared
from sft.settings import load

REPORT_FILES = ("drift.json", "drift.md")
"""drift.json vouches for all the rest: written last, removed first."""
LOG_WIDTH = 100
"""Columns of the table where there is no terminal, whose width would be known."""


def main(argv: Sequence[str]) -> None:
    """Score both models, write <out>/{base,tuned}/, <out>/drift.json and <out>/drift.md, then apply the gate.

    Raises:
        UserError: options, data or a model cannot be used, or the models cannot be compared.
        GateFailed: a task's headline accuracy dropped by more than --gate.max_drop.
    """
    options = load(DriftConfig, argv, prog="sft drift")
    if read_place()[0] == 0:
        make_folder(Path(options.out), REPORT_FILES)
        for side in ("base", "tuned"):
            make_folder(Path(options.out) / side, RESULT_FILES)
    items, sources = load_items(options)
    base, tuned = prepare(options.base, items), prepare(options.tuned, items)
    check_comparable(base, tuned)
    with join_ranks() as ranks:
        if ranks.rank == 0:
            lines = [*sources.values(), *describe_truncation(base)]  # the tuned model's requests are the same
            Console().print("\n".join(lines), markup=False, soft_wrap=True)
        scored_base = score_prepared(base, options, ranks, sources)
        scored_tuned = score_prepared(tuned, options, ranks, sources)
        if ranks.rank == 0:
            _report(options, scored_base, scored_tuned)


def _report(options: DriftConfig, base: Scored, tuned: Scored) -> None:
    out = Path(options.out)
    report = compare(base, tuned, options.gate.max_drop)
    try:
        write_results(out / "base", base.header, base.records)
        write_results(out / "tuned", tuned.header, tuned.records)
        write_atomically(out / "drift.md", to_markdown(report))
        write_atomically(out / "drift.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(to_table(report))
    console.print(f"{gate_line(report)}\nreport: {out / 'drift.md'}", markup=False, soft_wrap=True)
    if report["gate"]["failed"]:
        raise GateFailed("; ".join(report["gate"]["failed"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
