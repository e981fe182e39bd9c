"""`sft eval`: MMLU and HellaSwag scores of one model."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sft.eval.options import EvalConfig
from sft.eval.ranks import join_ranks, read_place
from sft.eval.results import RESULT_FILES, make_folder, write_results
from sft.eval.run import describe_truncation, load_items, prepare, score_prepared
from sft.settings import load


def main(argv: Sequence[str]) -> None:
    """Score a model and write <out>/items-<task>.jsonl and <out>/results.json.

    Raises:
        UserError: options, data, model or tokenizer cannot be used.
    """
    options = load(EvalConfig, argv, prog="sft eval")
    console = Console()
    if read_place()[0] == 0:
        make_folder(Path(options.out), RESULT_FILES)
    items, sources = load_items(options)
    with join_ranks() as ranks:
        prepared = prepare(options.model, items)
        if ranks.rank == 0:
            lines = [*sources.values(), *describe_truncation(prepared)]
            console.print("\n".join(lines), markup=False, soft_wrap=True)
        scored = score_prepared(prepared, options, ranks, sources)
        if ranks.rank == 0:
            results = write_results(Path(options.out), scored.header, scored.records)
            console.print(_table(results["tasks"]))
            console.print(f"results: {Path(options.out) / 'results.json'}", markup=False, soft_wrap=True)


def _table(tasks: dict[str, dict[str, float]]) -> Table:
    table = Table("task", "n", "metric", "%", "standard error")
    for task, result in tasks.items():
        for suffix in ("", "_norm"):
            if f"acc{suffix}" in result:
                error = result[f"stderr{suffix}"]
                shown = "–" if error is None else f"{100 * error:.2f}"
                table.add_row(task, str(result["n"]), f"acc{suffix}", f"{100 * result[f'acc{suffix}']:.2f}", shown)
    return table
