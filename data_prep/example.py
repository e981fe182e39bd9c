"""What stands between a row of input and its tokens: turns of a conversation, and the text a template makes of them."""

from typing import NamedTuple


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    text: str
    input: str = ""
    """Alpaca's `input`: context that belongs to a user's turn."""
    supervised: bool = False
    """Whether the model shall learn this turn; only an assistant's."""


class Example(NamedTuple):
    """The text of one document.

    Each of `texts` is encoded on its own; with `stop`, EOS follows each and is supervised where the last span ends at
    the end of the text. `spans[i]` are the supervised character ranges [start, end) of `texts[i]`, ascending,
    disjoint and not empty.
    """

    texts: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    stop: bool

    def responses(self) -> list[str]:
        """The supervised texts, in order."""
        return [text[a:b] for text, spans in zip(self.texts, self.spans, strict=True) for a, b in spans]


class Rejected(Exception):
    """A row that cannot be used; `reason` is a key of `data_prep.filters.MEANING`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
