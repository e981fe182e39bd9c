"""Do the counts of a prepared folder add up: arrays with manifest, weights with copies, splits with each other, report
with all of them?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_prep.contracts import Contract, Counted, Problem


class MadeSource(BaseModel):
    name: str
    rows: int
    weight: float
    role: Literal["data", "replay"] = "data"


class MadeWith(BaseModel):
    overlong: Literal["drop", "truncate", "error"]


class Made(BaseModel):
    """What the checks rely on in a manifest, besides what every reader of shards relies on."""

    split: str
    fill: float
    settings: MadeWith
    template: str | list[str]
    """Text of the chat template, or the Alpaca prompts."""
    sources: list[MadeSource]
    special_ids: list[int]


class Count(BaseModel):
    count: int


class SourceReport(BaseModel):
    name: str
    rows_in: int
    rows_train: int
    rows_heldout: int
    documents_train: int
    truncated: Count
    dropped: dict[str, Count]


class SplitReport(BaseModel):
    packs: int
    documents: int
    tokens: int
    labels: int
    fill: float


class Report(BaseModel):
    """What the checks rely on in report.json."""

    content_key: str
    sources: list[SourceReport]
    splits: dict[str, SplitReport]


@dataclass(frozen=True, eq=False)
class Tally:
    """One split: its manifest, and what was counted in its arrays; `doc_ids`, `source_ids` are [documents]."""

    manifest: dict[str, Any]
    made: Made
    packs: int
    tokens: int
    labels: int
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]
    cut: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The split: train or heldout."""
        return self.made.split


def contract_of(manifest: dict[str, Any], made: Made) -> Contract:
    """The promises of a manifest about its arrays."""
    tokenizer = manifest["tokenizer"]
    bos, eos = tokenizer["bos_id"], tokenizer["eos_id"]
    special = frozenset(made.special_ids) | {eos}
    is_chat = isinstance(made.template, str)
    return Contract(
        seq_len=manifest["seq_len"],
        vocab_size=tokenizer["vocab_size"],
        bos_id=bos,
        stop_ids=special - ({bos} - {eos}) if is_chat else frozenset({eos}),
        special_ids=special,
        repeats_bos=is_chat,
        truncates=made.settings.overlong == "truncate",
        rows_of_sources=tuple(source.rows for source in made.sources),
    )


def add_up(manifest: dict[str, Any], made: Made, counted: Sequence[Counted]) -> Tally:
    """The counts of a split from those of its batches."""
    return Tally(
        manifest=manifest,
        made=made,
        packs=sum(each.packs for each in counted),
        tokens=sum(each.tokens for each in counted),
        labels=sum(each.labels for each in counted),
        doc_ids=np.concatenate([np.empty(0, dtype=np.int64), *(each.doc_ids for each in counted)]),
        source_ids=np.concatenate([np.empty(0, dtype=np.int16), *(each.source_ids for each in counted)]),
        cut=np.unique(np.concatenate([np.empty(0, dtype=np.int64), *(each.cut for each in counted)])),
    )


def check_totals(tally: Tally) -> Iterator[Problem]:
    """The manifest's totals and fill against the arrays."""
    found = {"packs": tally.packs, "documents": len(tally.doc_ids), "tokens": tally.tokens, "labels": tally.labels}
    for name, count in found.items():
        said = tally.manifest["totals"][name]
        if said != count:
            yield Problem("totals", f"{tally.name}: the manifest says {said} {name}, its shards hold {count}")
    fill = tally.tokens / max(1, tally.packs * tally.manifest["seq_len"])
    if abs(tally.made.fill - fill) > 1e-9:
        yield Problem("totals", f"{tally.name}: the manifest says fill {tally.made.fill}, its shards give {fill}")


def check_copies(tally: Tally) -> Iterator[Problem]:
    """A document is in training as often as its source's weight says, and held out once.

    A replay source repeats its rows as its ratio needs, so its copies have no bound here.
    """
    ids, first, copies = np.unique(tally.doc_ids, return_index=True, return_counts=True)
    for source_id, source in enumerate(tally.made.sources):
        mine = tally.source_ids[first] == source_id
        weight = source.weight if tally.name == "train" else 1
        low, high = max(1, int(weight)), int(np.ceil(weight))
        if source.role == "replay" and tally.name == "train":
            continue
        bad = np.flatnonzero(mine & (ids >= 0) & ((copies < low) | (copies > high)))
        if len(bad):
            wanted = str(low) if low == high else f"{low} or {high}"
            text = f"doc {ids[bad[0]]} of source {source.name} is there {copies[bad[0]]} times, not {wanted}"
            more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
            yield Problem("document ids", f"{tally.name}: {text}{more}")


def check_splits(tallies: Sequence[Tally]) -> Iterator[Problem]:
    """Two splits are of one build and share no document."""
    first, *others = tallies
    for other in others:
        if other.manifest["content_key"] != first.manifest["content_key"]:
            yield Problem("splits", f"{first.name} and {other.name} are of two builds: their content keys differ")
        shared = np.intersect1d(first.doc_ids, other.doc_ids)
        if len(shared):
            more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
            yield Problem("splits", f"doc {shared[0]} is in {first.name} and in {other.name}{more}")


def check_report(report: Report, tallies: Sequence[Tally]) -> Iterator[Problem]:
    """report.json against the manifests, and every source's rows in = rows out + Σ reasons."""
    for tally in tallies:
        totals = {**tally.manifest["totals"], "fill": tally.made.fill}
        told = report.splits.get(tally.name)
        if tally.manifest["content_key"] != report.content_key:
            yield Problem("report", f"report.json is of another build than {tally.name}: their content keys differ")
        if told is None:
            yield Problem("report", f"report.json does not know the split {tally.name}")
            continue
        for name, said in told.model_dump().items():
            if abs(said - totals[name]) > 1e-9:
                text = f"report.json says {said} {name} of {tally.name}, the manifest {totals[name]}"
                yield Problem("report", text)
    for source in report.sources:
        out = source.rows_train + source.rows_heldout + sum(reason.count for reason in source.dropped.values())
        if source.rows_in != out:
            yield Problem("report", f"report.json: source {source.name}: {source.rows_in} rows in, but {out} out")
    for tally in tallies:
        if [(s.name, s.rows) for s in tally.made.sources] != [(s.name, s.rows_in) for s in report.sources]:
            yield Problem("report", f"report.json lists other sources or rows than the manifest of {tally.name}")


def check_documents_told(report: Report, tally: Tally) -> Iterator[Problem]:
    """The report's documents and rows per source against the document ids in the arrays."""
    _, first = np.unique(tally.doc_ids, return_index=True)
    size = len(report.sources)
    rows = np.bincount(tally.source_ids[first], minlength=size)
    documents = np.bincount(tally.source_ids, minlength=size)
    for source_id, source in enumerate(report.sources):
        is_train = tally.name == "train"
        told = (source.rows_train, source.documents_train) if is_train else (source.rows_heldout, source.rows_heldout)
        found = (int(rows[source_id]), int(documents[source_id]))
        if told != found:
            yield Problem(
                "report",
                f"report.json says {told[0]} rows and {told[1]} documents of source {source.name} in {tally.name}, "
                f"the shards hold {found[0]} and {found[1]}",
            )


def check_cut(report: Report, tallies: Sequence[Tally]) -> Iterator[Problem]:
    """No more documents end without a stop token than rows were truncated."""
    cut = len(np.unique(np.concatenate([tally.cut for tally in tallies])))
    truncated = sum(source.truncated.count for source in report.sources)
    if tallies[0].made.settings.overlong == "truncate" and cut > truncated:
        text = f"{cut} documents end without a stop token, but report.json counts {truncated} truncated rows"
        yield Problem("stop tokens", text)
