"""What the drift probe asks: a fixed part of MMLU and HellaSwag as token documents, before any process group exists.

Prompts and ids are those of `sft eval` with plain text. Continuations whose inputs are equal (the letters of MMLU)
share a document, so that their context is computed once.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft.config import ProbeSection
from sft.errors import UserError
from sft.eval.requests import Prompting, Request, build_requests, digest_requests
from sft.eval.tasks import data, hellaswag, mmlu
from sft.eval.tasks.item import Item, digest_items
from sft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One input, and the continuations that are scored behind it."""

    ids: np.ndarray
    """int32, the last token of the continuations left out."""
    cells: tuple[int, ...]
    """Which scores these are: 4 item + choice, items counted through all tasks."""
    continuations: tuple[np.ndarray, ...]
    """The scored ids of each cell, int32."""


@dataclass(frozen=True)
class ProbeItems:
    """What is asked, the same in every probe of a run."""

    items: list[Item]
    """Of all tasks, one after the other."""
    documents: list[Document]
    """Longest first; all cells of all items, each once."""
    digest: str
    """Equal if and only if the same items are asked by the same ids, cut at the same place."""

    def rows(self) -> dict[str, slice]:
        """Where the items of each task stand."""
        tasks = [item.task for item in self.items]
        return {task: slice(tasks.index(task), tasks.index(task) + tasks.count(task)) for task in dict.fromkeys(tasks)}


def open_probe(settings: ProbeSection, tokenizer: Tokenizer, max_length: int) -> ProbeItems | None:
    """Read and tokenise the probe's items; None where no data are set.

    Args:
        settings: what to ask, and how much of it.
        tokenizer: the model's own.
        max_length: tokens of an input at most; a longer one loses its beginning.

    Raises:
        UserError: data are missing, malformed or too few for the shots, or the tokenizer cannot be scored.
    """
    if settings.data is None:
        return None
    try:
        items = [item for task in dict.fromkeys(settings.tasks) for item in _load_items(task, settings)]
        requests = build_requests(items, tokenizer, max_length, Prompting()).requests
    except UserError as error:
        raise UserError(f"eval.probe: {error}") from None
    return ProbeItems(
        items=items,
        documents=group_documents(requests, max_length),
        digest=f"{digest_items(items)} {digest_requests(requests)} {max_length}",
    )


def _load_items(task: str, settings: ProbeSection) -> list[Item]:
    folder = Path(str(settings.data))
    if task == "mmlu":
        subjects, _ = data.load_mmlu(folder)
        items = [item for subject in subjects for item in mmlu.build_items(subject, settings.shots.mmlu, None)]
    else:
        shots = settings.shots.hellaswag
        validation, train, _ = data.load_hellaswag(folder, need_train=shots > 0)
        items = hellaswag.build_items(validation, train, shots, None)
    return spread(items, settings.items)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, or all where there are fewer, at even distances: each MMLU subject has its share."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def group_documents(requests: Sequence[Request], max_length: int) -> list[Document]:
    """One document per distinct input, longest first; equal lengths in the order of their first request."""
    cells: dict[bytes, list[int]] = defaultdict(list)
    clipped = [request.clip(max_length) for request in requests]
    for cell, (ids, _) in enumerate(clipped):
        cells[ids.astype("<i4").tobytes()].append(cell)
    documents = [
        Document(clipped[group[0]][0], tuple(group), tuple(clipped[cell][1] for cell in group))
        for group in cells.values()
    ]
    return sorted(documents, key=lambda document: -len(document.ids))


def cut_forwards(documents: Sequence[Document], tokens: int) -> list[list[Document]]:
    """Documents, in order, in forwards of at most `tokens` tokens; a longer one has a forward to itself."""
    forwards: list[list[Document]] = []
    room = 0
    for document in documents:
        if not forwards or len(document.ids) > room:
            forwards.append([])
            room = tokens
        forwards[-1].append(document)
        room -= len(document.ids)
    return forwards
