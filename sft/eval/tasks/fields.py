"""Fields of a row that a file holds, checked: every error names the row, the field and its value."""

from typing import Any

from sft.errors import UserError
from sft.eval.tasks.item import NUM_CHOICES

LETTERS_OR_INDEX = "a letter A to D or a number 0 to 3"
INDEX = "a number 0 to 3"


def text_field(row: dict[str, Any], field: str, place: str) -> str:
    """A text; `place` says in messages where the row stands.

    Raises:
        UserError: the field is missing, no text, or holds half of a surrogate pair.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{place}: field '{field}' is {show(value)}; need a text")
    _check_characters(value, field, place)
    return value


def four_texts_field(row: dict[str, Any], field: str, place: str) -> tuple[str, str, str, str]:
    """The four choices.

    Raises:
        UserError: the field is missing, no list of four texts, or one of them holds half of a surrogate pair.
    """
    value = row.get(field)
    if not isinstance(value, list) or len(value) != NUM_CHOICES or not all(isinstance(text, str) for text in value):
        raise UserError(f"{place}: field '{field}' is {show(value)}; need {NUM_CHOICES} texts")
    for text in value:
        _check_characters(text, field, place)
    return value[0], value[1], value[2], value[3]


def choice_field(row: dict[str, Any], field: str, place: str, need: str = INDEX) -> int:
    """An index 0 to 3, given as a number or as a digit (the hub's HellaSwag labels are text).

    Raises:
        UserError: it is something else.
    """
    value = row.get(field)
    if isinstance(value, str) and value in ("0", "1", "2", "3"):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NUM_CHOICES:
        return value
    raise UserError(f"{place}: field '{field}' is {show(value)}; need {need}")


def show(value: Any) -> str:
    """A value in a message: one line, not too long."""
    return "missing" if value is None else repr(value)[:80]


def _check_characters(text: str, field: str, place: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character: tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field '{field}' holds {ascii(text[error.start])} at character {error.start}, "
            "half of a surrogate pair; correct the text"
        ) from None
