"""What `sft blame` prints of a step: what the logs say of it, its sources, its documents. Reads no file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from data_prep.shards import IGNORE, Shards
from sft.blame_texts import Texts
from sft.config import RunConfig
from sft.errors import shorten
from sft.order import steps_per_epoch

SHOWN_CHARS = 70
"""Of a prompt, and of a response."""


@dataclass(frozen=True, eq=False)
class Document:
    """A document of the step."""

    position: int
    """Row of the step, from 1: the same for any number of ranks."""
    pack: int
    doc_id: int
    source_id: int
    source_row: int
    """Row within its source, from 0."""
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_labels(self) -> int:
        """Targets that enter the loss; the first token is never one."""
        return int((self.labels[1:] != IGNORE).sum())


class SourceRow(NamedTuple):
    """A row as its file has it now."""

    file: str
    number: int
    """Line in .jsonl, position elsewhere, from 1."""
    value: Any

    @property
    def place(self) -> str:
        """File and row as an editor counts them."""
        is_lines = ".jsonl" in Path(self.file).suffixes
        return f"{self.file} {'line' if is_lines else 'row'} {self.number}"


def total_steps(trained: RunConfig, shards: Shards) -> int:
    """Optimizer steps of the whole run."""
    epoch_steps = steps_per_epoch(len(shards), trained.batch.rows_per_step)
    return trained.train.max_steps or trained.train.epochs * epoch_steps


def head_lines(trained: RunConfig, shards: Shards, step: int, documents: Sequence[Document]) -> list[str]:
    """Where the step lies in the run, and how much it takes."""
    epoch_steps = steps_per_epoch(len(shards), trained.batch.rows_per_step)
    epoch, within = divmod(step - 1, epoch_steps)
    tokens = sum(len(document.ids) for document in documents)
    labels = sum(document.num_labels for document in documents)
    packs = len({document.position for document in documents})
    return [
        f"step {step} of {total_steps(trained, shards)}: epoch {epoch + 1}, step {within + 1} of {epoch_steps} in it",
        f"{packs} packs, {len(documents)} documents, {tokens:,} tokens, {labels:,} labels from {trained.data.train}",
    ]


def log_lines(
    metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], documents: Sequence[Document]
) -> list[str]:
    """What metrics.jsonl and events.jsonl say of the step, and where that is not what the shards say."""
    elsewhere = {"step", "epoch", "loss_by_source", "token_share_by_source"}
    lines = [f"metrics: {_facts(line, elsewhere)}" for line in metrics]
    lines += [] if metrics else ["metrics: metrics.jsonl has no line of this step: it has not been taken"]
    for event in events:
        lines.append(f"event {event.get('event')}: {_facts(event, {'step', 'event', 'time'})}".removesuffix(": "))
    sums = {
        "tokens": sum(len(document.ids) for document in documents),
        "label_tokens": sum(document.num_labels for document in documents),
    }
    for name, value in sums.items():
        lines += [
            f"WARNING: metrics.jsonl counted {line[name]:,} {name}, these documents have {value:,}: they are not those "
            "that the step took"
            for line in metrics
            if line.get(name, value) != value
        ]
    if foreign := set(named_documents(events)) - {document.doc_id for document in documents}:
        few = ", ".join(map(str, sorted(foreign)[:5]))
        lines.append(f"WARNING: events.jsonl names {len(foreign)} documents that are not in this step: {few}")
    return lines


def named_documents(events: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """The kinds of events that name each document."""
    named: dict[int, list[str]] = {}
    for event in events:
        for doc_id in set(event.get("doc_ids", ())):
            named.setdefault(doc_id, []).append(str(event.get("event")))
    return named


def source_table(shards: Shards, documents: Sequence[Document], metrics: Sequence[Mapping[str, Any]]) -> Table:
    """What each source has in the step, and its mean loss per label where metrics.jsonl has it."""
    table = Table("source", "documents", "tokens", "labels", "share of labels", "loss", title="by source")
    all_labels = sum(document.num_labels for document in documents)
    losses = {name: loss for line in metrics for name, loss in line.get("loss_by_source", {}).items()}
    for source_id, source in enumerate(shards.manifest["sources"]):
        mine = [document for document in documents if document.source_id == source_id]
        labels = sum(document.num_labels for document in mine)
        counts = (len(mine), sum(len(document.ids) for document in mine), labels)
        share = f"{labels / all_labels:.1%}" if all_labels else "–"
        loss = losses.get(source["name"])
        shown_loss = "–" if loss is None else f"{loss:.4f}"
        table.add_row(escape(_line(source["name"])), *(f"{count:,}" for count in counts), share, shown_loss)
    for column in table.columns:
        column.overflow = "fold"  # on a narrow terminal no digit is left out
    return table


def document_lines(
    shards: Shards,
    documents: Sequence[Document],
    texts: Sequence[Texts],
    found: Mapping[int, SourceRow],
    named: Mapping[int, Sequence[str]],
) -> Iterator[str]:
    """A line per pack, and two per document; one that an event names begins with an exclamation mark."""
    position = 0
    for document, text in zip(documents, texts, strict=True):
        if document.position != position:
            position = document.position
            yield f"row {position} · pack {document.pack}"
        name = shards.manifest["sources"][document.source_id]["name"]
        row = found.get(document.doc_id)
        place = row.place if row else f"row {document.source_row + 1} of the source"
        by = "".join(f" · {kind}" for kind in named.get(document.doc_id, ()))
        counts = f"{len(document.ids)} tokens · {document.num_labels} labels"
        yield f"{'!' if by else ' '} doc {document.doc_id} · {_line(name)} · {_line(place)} · {counts}{by}"
        prompt, response = _line(text.prompt), _line(text.response)
        if text.is_rows:
            shown = _start(prompt)
        else:  # the end of a rendered prompt, which begins like all others
            shown = prompt if len(prompt) <= SHOWN_CHARS else f"…{prompt[-SHOWN_CHARS:]}"
        yield f"    {'' if text.is_rows else '(tokens) '}{shown}{' → ' if shown else ''}{_start(response)}"


def changed_lines(documents: Sequence[Document], texts: Sequence[Texts], found: Mapping[int, SourceRow]) -> list[str]:
    """A line where rows of the files are not what was trained on."""
    changed = {
        document.doc_id
        for document, text in zip(documents, texts, strict=True)
        if document.doc_id in found and not text.is_rows
    }
    if not changed:
        return []
    where = found[min(changed)].place
    return [
        f"{len(changed)} documents are not what their files have now (first: doc {min(changed)}, {where}); "
        "their tokens are shown"
    ]


def _line(text: str) -> str:
    """On one line, with escapes for what would steer a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def _facts(line: Mapping[str, Any], without: set[str]) -> str:
    """The values of a line of a log; what is not measured is left out, a loss that was no number is null."""
    return " · ".join(
        f"{key} {_shown(value)}" if key != "doc_ids" else f"{len(value)} documents named"
        for key, value in line.items()
        if key not in without and (value is not None or key in ("loss", "grad_norm"))
    )


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else shorten(_line(str(value)))
