"""`sft eval`: MMLU and HellaSwag scores of one model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sft.errors import run_command
from sft.eval.options import EvalConfig
from sft.eval.power import describe_power
from sft.eval.ranks import read_place
from sft.eval.results import summarize
from sft.eval.run import score_model, tell
from sft.settings import load

FLIP_RATES = (0.02, 0.10)
"""Shares of answers that a gentle and a rough fine-tuning change."""


def main(argv: Sequence[str]) -> None:
    """Score a model and write <out>/items-<task>.jsonl and <out>/results.json.

    Raises:
        UserError: options, data, model or tokenizer cannot be used.
    """
    options = load(EvalConfig, argv, prog="sft eval")
    scored = score_model(options.model, options)
    if read_place()[0] != 0:
        return
    console = Console()
    with console.capture() as shown:  # rich would end the process where the reader has left
        console.print(_table({task: summarize(task, records) for task, records in scored.records.items()}))
    tell(shown.get().splitlines())
    if options.limit is not None:
        for task, records in scored.records.items():
            tell([f"{task}: {line}" for line in describe_power(len(records), FLIP_RATES)])
    tell([f"results: {Path(options.out) / 'results.json'}"])


def _table(tasks: dict[str, dict[str, Any]]) -> Table:
    table = Table("task", "n", "metric", "%", "standard error")
    for task, result in tasks.items():
        for suffix in ("", "_norm"):
            if f"acc{suffix}" in result:
                error = result[f"stderr{suffix}"]
                shown = "–" if error is None else f"{100 * error:.2f}"
                table.add_row(task, f"{result['n']:,}", f"acc{suffix}", f"{100 * result[f'acc{suffix}']:.2f}", shown)
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
