"""`sft blame RUN --step N`: the documents of an optimizer step, as they stand in their source files.

Which packs a step takes follows from the run's config.yaml (`sft.order`), which documents lie in them from the shards,
and a document's id is its input row, counted over all sources from 0: no log is needed to find them. What the logs say
of the step is shown beside them, and compared. A row is shown as its file has it now only where that is the text that
was trained on; else the document's tokens are decoded.
"""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.readers import RawBlock, block_rows, read_blocks, source_files
from data_prep.shards import Shards, open_shards
from sft.blame_report import (
    Document,
    SourceRow,
    changed_lines,
    document_lines,
    head_lines,
    log_lines,
    named_documents,
    source_table,
    total_steps,
)
from sft.blame_texts import row_texts, texts_of
from sft.config import BlameConfig, RunConfig
from sft.errors import UserError, run_command
from sft.order import FILLER, step_rows
from sft.settings import load
from sft.tokenizer import Tokenizer, load_tokenizer


def main(argv: Sequence[str]) -> None:
    """Entry of `sft blame` and `python -m sft.blame`.

    Raises:
        UserError: bad options, no run folder, no such step, or not the shards that the run was trained on.
    """
    config = load(BlameConfig, argv, prog="sft blame", positional="run")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    run = Path(config.run)
    trained = _read_config(run)
    shards = open_run_shards(run, trained)
    documents, fillers = documents_of(trained, shards, config.step, run)
    metrics = lines_of_step(run / "metrics.jsonl", config.step)[-1:]
    events = lines_of_step(run / "events.jsonl", config.step)
    for line in [*head_lines(trained, shards, config.step, documents), *log_lines(metrics, events, documents)]:
        print(line)
    tokenizer = find_tokenizer(run, trained, shards)
    if tokenizer is None:
        print(f"NOTE: no tokenizer here is {shards.manifest['tokenizer']['path']}: rows are not compared with tokens")
    found, problems = read_rows(shards, documents)
    texts = []
    for document in documents:
        row, source = found.get(document.doc_id), shards.manifest["sources"][document.source_id]
        texts.append(texts_of(document.ids, document.labels, row_texts(row.value, source) if row else [], tokenizer))
    for line in [*problems, *changed_lines(documents, texts, found)]:
        print(f"NOTE: {line}")
    _print_table(source_table(shards, documents, metrics))
    for line in document_lines(shards, documents, texts, found, named_documents(events)):
        print(line)
    if fillers:
        print(f"{fillers} filler rows: the epoch ends in this step; they weigh nothing")


def open_run_shards(run: Path, trained: RunConfig) -> Shards:
    """The shards that the run was trained on.

    Raises:
        UserError: they are gone, torn, or of another content key than the run recorded.
    """
    folder = Path(trained.data.train)
    if not folder.is_dir():
        where = "" if folder.is_absolute() else f" from {Path.cwd()}; start this where the training was started"
        raise UserError(f"run {run}: its shards {folder} are not there{where or '; put them back'}")
    shards = open_shards(folder)
    key = _recorded_key(run)
    if key is None:
        print(f"NOTE: {run} has not recorded its data; {folder} is taken for it")
    elif key != shards.manifest["content_key"]:
        raise UserError(
            f"run {run}: was trained on shards of content key {key[:12]}, {folder} now holds "
            f"{shards.manifest['content_key'][:12]}; put the old ones back, or prepare them again"
        )
    return shards


def documents_of(trained: RunConfig, shards: Shards, step: int, run: Path) -> tuple[list[Document], int]:
    """(documents of a step, counted from 1, in the order of its rows; number of its filler rows).

    Raises:
        UserError: the run has no such step.
    """
    total = total_steps(trained, shards)
    if step > total:
        raise UserError(f"--step {step}: {run} has {total} steps; give one of 1 to {total}")
    rows = step_rows(trained.data.seed, step - 1, len(shards), trained.batch.rows_per_step)
    first_rows = np.cumsum([0, *(source["rows"] for source in shards.manifest["sources"])])
    documents = []
    for position, row in enumerate(rows.tolist(), start=1):
        if row == FILLER:
            continue
        pack = shards.pack(row)
        ends = np.cumsum(pack.seq_lens)
        for number, end in enumerate(ends.tolist()):
            tokens = slice(end - int(pack.seq_lens[number]), end)
            doc_id, source = int(pack.doc_ids[number]), int(pack.source_ids[number])
            source_row = doc_id - int(first_rows[source])
            documents.append(
                Document(position, row, doc_id, source, source_row, pack.input_ids[tokens], pack.labels[tokens])
            )
    return documents, int((rows == FILLER).sum())


def fetch_rows(path: str, wanted: set[int]) -> dict[int, SourceRow]:
    """Rows of a source (a file, folder or glob as in `sft prep`) by their numbers over all its files, from 0.

    Reads up to the last of them, and decodes only the blocks that hold one. Rows behind the source's end are left out.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[int, SourceRow] = {}
    first = 0
    for file in source_files(path):
        for block, rows in _with_row_counts(read_blocks(0, file)):
            if not wanted.isdisjoint(range(first, first + rows)):
                for number, value in block_rows(block):
                    row = first + number - block.first_row
                    if row in wanted:
                        found[row] = SourceRow(block.file, number, value)
            first += rows
            if len(found) == len(wanted):
                return found
    return found


def read_rows(shards: Shards, documents: Sequence[Document]) -> tuple[dict[int, SourceRow], list[str]]:
    """(rows by doc_id as the files have them now, a line for each source that has not all of them)."""
    found: dict[int, SourceRow] = {}
    problems = []
    for source_id, source in enumerate(shards.manifest["sources"]):
        wanted = {document.source_row: document.doc_id for document in documents if document.source_id == source_id}
        if not wanted:
            continue
        name, path = source["name"], source["path"]
        relative = "" if os.path.isabs(path) else " (a path from where sft prep was started)"
        try:
            rows = fetch_rows(path, set(wanted))
        except UserError as error:
            problems.append(f"{name}: {error}{relative}; its documents are decoded from their tokens")
            continue
        if missing := len(wanted) - len(rows):
            problems.append(
                f"{name}: {path}{relative} has become shorter: {missing} of {len(wanted)} rows are not in it; "
                "they are decoded from their tokens"
            )
        found |= {wanted[row]: value for row, value in rows.items()}
    return found, problems


def lines_of_step(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl or events.jsonl about a step, in order; one that a crash cut short is passed over."""
    if not path.is_file():
        return []
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if f'"step": {step}' in line and (value := _parsed(line)).get("step") == step:
                found.append(value)
    return found


def find_tokenizer(run: Path, trained: RunConfig, shards: Shards) -> Tokenizer | None:
    """The tokenizer that the shards were made with: at its place then, in the base model, or in the run's export."""
    made_with = shards.manifest["tokenizer"]
    for folder in (made_with["path"], trained.model.path, run / "export"):
        try:
            tokenizer = load_tokenizer(folder)
        except UserError:
            continue
        if all(tokenizer.encode(probe["text"]) == probe["ids"] for probe in made_with["probe"]):
            return tokenizer
    return None


def _read_config(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run}: is no run folder (no config.yaml); give the folder that sft train wrote as --out"
        )
    return load(RunConfig, ["--config", str(run / "config.yaml")], prog="sft blame")


def _recorded_key(run: Path) -> str | None:
    """Content key of the run's training data, from its start or its newest checkpoint."""
    starts = [line for line in lines_of_step(run / "events.jsonl", 0) if "data_key" in line.get("identity", {})]
    if starts:
        return str(starts[-1]["identity"]["data_key"])
    from sft.checkpoint import newest_complete, read_meta  # torch, which only a run without events needs

    newest = newest_complete(run / "checkpoints")
    return None if newest is None else str(read_meta(newest)["identity"]["data_key"])


def _with_row_counts(blocks: Iterator[RawBlock]) -> Iterator[tuple[RawBlock, int]]:
    """Blocks of a file with the number of their rows, of which only the last block must be decoded."""
    before = next(blocks)
    for block in blocks:
        yield before, block.first_row - before.first_row
        before = block
    yield before, sum(1 for _ in block_rows(before))


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _print_table(table: Table) -> None:
    """Through `print`: rich ends the process with code 1 when a reader such as `head` has left."""
    console = Console()
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
