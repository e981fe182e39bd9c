"""The fate of every input row: collected, checked to add up, written to report.json and shown as a table."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from data_prep.filters import MEANING

EXAMPLES = 5
"""Row numbers listed per reason."""


@dataclass
class SourceFate:
    """Counts of one source while the job runs. Row numbers start at 1."""

    name: str
    path: str
    format: str
    weight: float
    rows: int = 0
    train_rows: int = 0
    heldout_rows: int = 0
    train_documents: int = 0
    """Rows of the training split counted as often as the weight uses them."""
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    truncated: list[int] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The source as it stands in report.json.

        Raises:
            RuntimeError: rows in and rows out do not add up; a defect of this program.
        """
        lost = self.rows - self.train_rows - self.heldout_rows - sum(map(len, self.dropped.values()))
        low, high = int(self.weight), int(self.weight) + 1
        if lost or not self.train_rows * low <= self.train_documents <= self.train_rows * high:
            raise RuntimeError(f"rows of {self.path} do not add up: {self}")
        return {
            "name": self.name,
            "path": self.path,
            "format": self.format,
            "weight": self.weight,
            "rows_in": self.rows,
            "rows_train": self.train_rows,
            "rows_heldout": self.heldout_rows,
            "documents_train": self.train_documents,
            "truncated": _counted(self.truncated),
            "dropped": {
                reason: {**_counted(self.dropped[reason]), "meaning": MEANING[reason]}
                for reason in MEANING
                if self.dropped.get(reason)
            },
        }


def describe_split(manifest: dict[str, Any], lengths: NDArray[np.int32]) -> dict[str, Any]:
    """Totals, fill and the spread of document lengths (in tokens) of one split."""
    points = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    spread = {name: int(np.percentile(lengths, point, method="lower")) for name, point in points.items()}
    return {
        **manifest["totals"],
        "fill": manifest["fill"],
        "document_tokens": {**spread, "mean": float(lengths.mean())},
    }


def summary_tables(report: dict[str, Any]) -> list[Table]:
    """The report as two compact tables: rows by source, and what was written."""
    rows = Table("source", "rows", "train", "held out", "truncated", "dropped", title="input rows")
    for source in report["sources"]:
        reasons = ", ".join(f"{item['count']} {reason}" for reason, item in source["dropped"].items())
        counts = (source["rows_in"], source["rows_train"], source["rows_heldout"], source["truncated"]["count"])
        rows.add_row(source["name"], *(f"{count:,}" for count in counts), reasons or "none")
    written = Table("split", "packs", "documents", "tokens", "targets", "fill", title="packed")
    for split, item in report["splits"].items():
        counts = (item["packs"], item["documents"], item["tokens"], item["labels"])
        written.add_row(split, *(f"{count:,}" for count in counts), f"{item['fill']:.2%}")
    return [rows, written]


def escape_unprintable(stream: TextIO) -> None:
    """Write what the stream's encoding lacks as \\u escapes: text from data and paths must not end a command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _counted(row_numbers: Sequence[int]) -> dict[str, Any]:
    ordered = sorted(row_numbers)
    return {"count": len(ordered), "first_rows": ordered[:EXAMPLES]}
