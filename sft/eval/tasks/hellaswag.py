"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): rows to items, text for text as in lm_eval's task `hellaswag`."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    validation: Sequence[HellaswagRow],
    train: Sequence[HellaswagRow],
    shots: int,
    limit: int | None,
    *,
    draw: Literal["lm_eval", "fixed"] = "lm_eval",
    world: int = 1,
) -> list[Item]:
    """The first `limit` validation rows, each behind `shots` solved train rows.

    Args:
        validation: rows to be asked.
        train: rows to draw the examples from; may be empty without shots.
        shots: examples of each item.
        limit: None for all rows.
        draw: lm_eval: fresh examples for every item, as lm_eval draws them; fixed: one draw for all items.
        world: draw as lm_eval does on that many ranks, whatever the number of ranks here: each has a generator of its
            own, which advances with the rows of that rank.

    Raises:
        UserError: the train split is too small for `shots`.
    """
    rows = validation[:limit]
    if not shots:
        drawn: list[list[int]] = [[] for _ in rows]
    elif draw == "fixed":
        drawn = [_draw_once(validation, train, shots)] * len(rows)
    else:
        _check_pool(train, shots + 1, shots)
        rngs = [random.Random(FEWSHOT_SEED) for _ in range(world)]
        drawn = [_draw(rngs[number % world], row, train, shots) for number, row in enumerate(rows)]
    solved = {index: (row.query, row.choices[row.label]) for index in set().union(*drawn) for row in [train[index]]}
    return [
        Item(
            task="hellaswag",
            subject="hellaswag",
            doc_id=doc_id,
            description="",
            shots=tuple(solved[index] for index in indices),
            question=row.query,
            choices=row.choices,
            gold=row.label,
            cluster=row.source_id or f"row {doc_id}",
        )
        for doc_id, (row, indices) in enumerate(zip(rows, drawn, strict=True))
    ]


def _draw(rng: random.Random, row: HellaswagRow, train: Sequence[HellaswagRow], shots: int) -> list[int]:
    """Indices of `shots` train rows other than `row`; one more is drawn, as lm_eval does, to replace `row` itself."""
    drawn = [index for index in rng.sample(range(len(train)), shots + 1) if train[index] != row][:shots]
    if len(drawn) == shots:
        return drawn
    return rng.sample(_others(train, {row}, shots), shots)


def _draw_once(validation: Sequence[HellaswagRow], train: Sequence[HellaswagRow], shots: int) -> list[int]:
    """Indices of `shots` train rows none of which is ever asked, with or without a limit."""
    _check_pool(train, shots, shots)
    return random.Random(FEWSHOT_SEED).sample(_others(train, set(validation), shots), shots)


def _check_pool(train: Sequence[HellaswagRow], need: int, shots: int) -> None:
    if len(train) < need:
        raise UserError(
            f"HellaSwag: --shots.hellaswag {shots}, but the train split has {len(train)} rows; "
            f"each draw takes {need} of them: use fewer shots or complete the train split"
        )


def _others(train: Sequence[HellaswagRow], asked: set[HellaswagRow], shots: int) -> list[int]:
    others = [index for index, row in enumerate(train) if row not in asked]
    if len(others) < shots:
        raise UserError(
            f"HellaSwag: the train split has only {len(others)} rows that differ from the tested "
            f"{'one' if len(asked) == 1 else 'ones'}, --shots.hellaswag is {shots}; use fewer shots or complete the "
            "train split"
        )
    return others
