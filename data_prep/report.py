"""The fate of every input row: collected, checked to add up, written to report.json and shown as a table."""

import io
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from data_prep.filters import MEANING
from sft.prep_options import Source

EXAMPLES = 5
"""Row numbers listed per reason."""
WRITE_BYTES_PER_S = 200e6
"""Assumed of the disk in the estimate of a dry run, which cannot measure it: a busy network file system."""


@dataclass
class Tally:
    """How many rows met a fate, and the first of them."""

    count: int = 0
    first_rows: list[int] = field(default_factory=list)
    """Row numbers from 1, at most `EXAMPLES`."""

    def add(self, rows: NDArray[np.int64]) -> None:
        """Count rows; their numbers within the source are from 0 and ascend."""
        self.count += len(rows)
        self.first_rows = sorted(self.first_rows + (rows[:EXAMPLES] + 1).tolist())[:EXAMPLES]


@dataclass
class SourceFate:
    """Counts of one source while the job runs."""

    name: str
    source: Source
    rows: int = 0
    train_rows: int = 0
    heldout_rows: int = 0
    train_documents: int = 0
    """Rows of the training split counted as often as they are used."""
    train_tokens: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    truncated: Tally = field(default_factory=Tally)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    """Rows that share text with an evaluation item: row, item, text."""

    @property
    def path(self) -> str:
        """As the user named it."""
        return self.source.path

    def drop(self, reason: str, rows: NDArray[np.int64]) -> None:
        """Count rows [n] of this source, from 0, that leave for `reason`."""
        self.dropped.setdefault(reason, Tally()).add(rows)

    def count(self, reason: str) -> int:
        """Rows that left for `reason`."""
        return self.dropped[reason].count if reason in self.dropped else 0

    def describe(self, all_train_tokens: int) -> dict[str, Any]:
        """The source as it stands in report.json.

        Raises:
            RuntimeError: rows in and rows out do not add up; a defect of this program.
        """
        lost = self.rows - self.train_rows - self.heldout_rows - sum(tally.count for tally in self.dropped.values())
        low, high = int(self.source.weight), int(self.source.weight) + 1
        used_wrong = not self.train_rows * low <= self.train_documents <= self.train_rows * high
        if lost or (used_wrong and self.source.role == "data"):
            raise RuntimeError(f"rows of {self.path} do not add up: {self}")
        return {
            "name": self.name,
            **self.source.model_dump(mode="json", exclude={"name"}),
            "rows_in": self.rows,
            "rows_train": self.train_rows,
            "rows_heldout": self.heldout_rows,
            "documents_train": self.train_documents,
            "tokens_train": self.train_tokens,
            "token_share": self.train_tokens / all_train_tokens,
            "truncated": vars(self.truncated),
            "dropped": {
                reason: {**vars(self.dropped[reason]), "meaning": MEANING[reason]}
                for reason in MEANING
                if self.count(reason)
            },
            "contaminated": self.overlaps,
        }


def describe_split(
    lengths: NDArray[np.int32], targets: NDArray[np.int64], num_packs: int, seq_len: int
) -> dict[str, Any]:
    """Totals, fill and the spread of document lengths (in tokens) of one split."""
    tokens = int(lengths.sum(dtype=np.int64))
    points = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    spread = {name: int(np.percentile(lengths, point, method="lower")) for name, point in points.items()}
    return {
        "packs": num_packs,
        "documents": len(lengths),
        "tokens": tokens,
        "labels": int(targets.sum()),
        "fill": tokens / (num_packs * seq_len),
        "document_tokens": {**spread, "mean": float(lengths.mean())},
    }


def output_bytes(lengths: NDArray[np.int32]) -> int:
    """Disk that a split of documents of `lengths` takes: ids and labels, and 14 bytes for each document."""
    return 8 * int(lengths.sum(dtype=np.int64)) + 14 * len(lengths) + (1 << 16)


def summary_tables(report: dict[str, Any]) -> list[Table]:
    """The report as two compact tables: rows by source, and what was packed."""
    rows = Table("source", "rows in", "train", "held out", "dropped", "tokens", "share", title="rows")
    for source in report["sources"]:
        dropped = sum(item["count"] for item in source["dropped"].values())
        counts = (source["rows_in"], source["rows_train"], source["rows_heldout"], dropped, source["tokens_train"])
        rows.add_row(escape(source["name"]), *(f"{count:,}" for count in counts), f"{source['token_share']:.1%}")
    packed = Table("split", "packs", "documents", "tokens", "targets", "fill", title="packs")
    for split, item in report["splits"].items():
        totals = (item["packs"], item["documents"], item["tokens"], item["labels"])
        packed.add_row(split, *(f"{total:,}" for total in totals), f"{item['fill']:.2%}")
    for column in (*rows.columns, *packed.columns):
        column.overflow = "fold"  # on a narrow terminal no digit is left out
    return [rows, packed]


def summary_lines(report: dict[str, Any], dry_run: bool) -> list[str]:
    """What else a user wants to know: encoder, rates, disk, near-duplicates, overlaps with evaluation items."""
    timings, disk = report["timings_s"], report["disk_bytes"]
    lines = []
    for source in report["sources"]:
        reasons = [f"{item['count']:,} {reason}" for reason, item in source["dropped"].items()]
        reasons += [f"{source['truncated']['count']:,} truncated (kept)"] if source["truncated"]["count"] else []
        lines += [f"{source['name']}: {', '.join(reasons)}"] if reasons else []
    for split, item in report["splits"].items():
        spread = ", ".join(f"{point} {value:,.0f}" for point, value in item["document_tokens"].items())
        lines.append(f"{split}: tokens per document: {spread}")
    encoder = report["tokenizer"]["encoder"]
    stages = ", ".join(f"{stage} {timings[stage]:.2f} s" for stage in timings if stage not in ("total", "rows_per_s"))
    lines += [
        f"tokens by {encoder['used']}, equal to {encoder['reference']} on {encoder['equal']}/{encoder['texts']} texts",
        f"time: {stages}; {timings['rows_per_s']:,.0f} rows/s encoded",
    ]
    if dry_run:
        written_s = disk["output"] / WRITE_BYTES_PER_S
        lines.append(
            f"a real run needs {disk['output'] / 2**20:,.1f} MiB for the output, {disk['while_running'] / 2**20:,.1f} "
            f"MiB while it runs, and about {timings['total'] + written_s:.0f} s"
        )
    if report["near_duplicates"]:
        found = report["near_duplicates"]
        lines.append(f"near-duplicates: {found['clusters']:,} clusters, the largest of {found['largest_rows']:,} rows")
    hits = [(source["name"], hit) for source in report["sources"] for hit in source["contaminated"]]
    if items := report["decontamination"]:
        lines.append(
            f"decontamination: {items['items']:,} evaluation items, {len(items['too_short_to_check']):,} of them too "
            f"short to check; {len(hits):,} rows overlap"
        )
    lines += [f"{name}: row {hit['row']} overlaps with {hit['item']}" for name, hit in hits[:EXAMPLES]]
    if len(hits) > EXAMPLES:
        lines.append(f"... and {len(hits) - EXAMPLES:,} more rows overlap with evaluation items: see report.json")
    return lines


def escape_unprintable(stream: TextIO) -> None:
    """Write what the stream's encoding lacks as \\u escapes: text from data and paths must not end a command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
