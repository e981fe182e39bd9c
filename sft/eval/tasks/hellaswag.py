"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): rows to items, text for text as in lm_eval's task `hellaswag`."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft.errors import UserError
from sft.eval.tasks.item import Item

FEWSHOT_SEED = 1234
"""lm_eval's default fewshot_random_seed."""


@dataclass(frozen=True)
class HellaswagRow:
    """One row of a split. Two rows are the same document if all public fields agree."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, str, str, str]
    label: int
    source_id: str
    """Video or article the row was cut from; "" where the file does not say."""
    rest: str
    """Canonical JSON of the remaining fields: they only tell documents apart."""

    @property
    def query(self) -> str:
        """The context to be continued. capitalize() also lower-cases the rest of ctx_b."""
        return preprocess(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")

    @property
    def choices(self) -> tuple[str, ...]:
        """The four endings as scored; one at whose edge a tag stood keeps a blank there."""
        return tuple(preprocess(ending) for ending in self.endings)


def preprocess(text: str) -> str:
    """Remove WikiHow's tags in lm_eval's order: strip comes first, so a removed tag at an edge leaves its blank."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def build_items(
    validation: Sequence[HellaswagRow], train: Sequence[HellaswagRow], shots: int, limit: int | None
) -> list[Item]:
    """The first `limit` validation rows, each behind `shots` solved train rows of its own.

    The examples are those of lm_eval on one rank, for any number of ranks here.

    Raises:
        UserError: the train split is too small for `shots`.
    """
    rows = validation[:limit]
    prefixes = _solved_prefixes(rows, train, shots) if shots else [""] * len(rows)
    return [
        Item(
            task="hellaswag",
            subject="hellaswag",
            doc_id=doc_id,
            context=prefix + row.query,
            choices=row.choices,
            gold=row.label,
            cluster=row.source_id or f"row {doc_id}",
        )
        for doc_id, (row, prefix) in enumerate(zip(rows, prefixes, strict=True))
    ]


def _solved_prefixes(rows: Sequence[HellaswagRow], train: Sequence[HellaswagRow], shots: int) -> list[str]:
    if len(train) <= shots:
        raise UserError(
            f"HellaSwag: --shots.hellaswag {shots}, but the train split has {len(train)} rows; "
            f"each item draws {shots + 1} of them: use fewer shots or complete the train split"
        )
    rng = random.Random(FEWSHOT_SEED)
    return ["".join(_solved(train[index]) for index in _draw(rng, row, train, shots)) for row in rows]


def _draw(rng: random.Random, row: HellaswagRow, train: Sequence[HellaswagRow], shots: int) -> list[int]:
    """Indices of `shots` train rows other than `row`; one more is drawn, as lm_eval does, to replace `row` itself."""
    drawn = [index for index in rng.sample(range(len(train)), shots + 1) if train[index] != row][:shots]
    if len(drawn) == shots:
        return drawn
    others = [index for index in range(len(train)) if train[index] != row]
    if len(others) < shots:
        raise UserError(
            f"HellaSwag: the train split has only {len(others)} rows that differ from the tested one, "
            f"--shots.hellaswag is {shots}; use fewer shots or complete the train split"
        )
    return rng.sample(others, shots)


def _solved(row: HellaswagRow) -> str:
    return f"{row.query} {row.choices[row.label]}\n\n"
