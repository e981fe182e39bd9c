"""One multiple-choice question, ready to be put into a prompt, and what identifies a list of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Item:
    """A question with four answers of which one is right, and what stands before it."""

    task: str
    subject: str
    """MMLU subject; for HellaSwag the name of the task."""
    doc_id: int
    """Row number in the original split."""
    description: str
    """What the task says before everything else; "" for HellaSwag."""
    shots: tuple[tuple[str, str], ...]
    """Solved examples: (question, answer)."""
    question: str
    choices: tuple[str, ...]
    """Texts as scored, without the delimiter."""
    gold: int
    """Index of the right choice."""
    cluster: str
    """Items that share a source (subject, video, article) have correlated scores."""

    @property
    def name(self) -> str:
        """How messages call this item."""
        return f"{self.task} item {self.doc_id}" if self.subject == self.task else f"{self.subject} item {self.doc_id}"

    @property
    def solved(self) -> str:
        """Shots and question as plain text; an answer is " " + choice."""
        return "".join(f"{question} {answer}\n\n" for question, answer in self.shots) + self.question

    @property
    def context(self) -> str:
        """Everything before the answer as plain text: description, solved examples, question."""
        return self.description + self.solved


def digest_items(items: Sequence[Item]) -> str:
    """sha256 of the canonical JSON of all items: equal if and only if the same questions were asked the same way.

    Shots that are the item's before are null: MMLU's are the same within a subject, and longer than its questions.
    """
    digest = hashlib.sha256()
    before: tuple[tuple[str, str], ...] | None = None
    for item in items:
        fields = vars(item) | {"shots": None if item.shots == before else item.shots}
        digest.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
        before = item.shots
    return digest.hexdigest()
