"""One multiple-choice question, ready to be scored, and what identifies a list of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Item:
    """A context and four continuations of which one is right."""

    task: str
    subject: str
    """MMLU subject; for HellaSwag the name of the task."""
    doc_id: int
    """Row number in the original split."""
    context: str
    """Everything before the answer: description, solved examples, question."""
    choices: tuple[str, ...]
    """Texts as scored, without the delimiter: a continuation is " " + choice."""
    gold: int
    """Index of the right choice."""
    cluster: str
    """Items that share a source (subject, video, article) have correlated scores."""

    @property
    def name(self) -> str:
        """How messages call this item."""
        return f"{self.subject} item {self.doc_id}"


def digest_items(items: Sequence[Item]) -> str:
    """sha256 of the canonical JSON of all items: equal if and only if the same questions were asked the same way."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()
