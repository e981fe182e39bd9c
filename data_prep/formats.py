"""Rows to turns: what each format means, and what is wrong with a row that does not have it.

A conversation that ends with anything but an assistant's turn is cut after the last one: nothing could be learned
from the rest. One that begins with the assistant is allowed here; the template says whether it has a place for it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_prep.example import Turn
from sft.errors import UserError
from sft.prep_options import Source

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}


class RowError(Exception):
    """A malformed row; `problem` says what is wrong, which value, and what to do, but not in which file or row."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def parse_row(value: Any, source: Source) -> list[Turn] | str:
    """The turns of a row, or its whole text for format text. Fields that the format does not know are ignored.

    Of the assistant's turns, `source.train_on` chooses those that are supervised; in messages and conversations a
    turn's own `weight: 0` (OpenAI) or `train: false` (axolotl) excludes it.

    Raises:
        RowError: the row is no object, a field is missing or of another kind, a role is unknown, or the assistant
            says nothing.
    """
    if not isinstance(value, dict):
        raise RowError(f"got {shorten(value)}, expected an object with the fields of format {source.format}")
    return _FORMATS[source.format].parse(value, source)


def check_columns(source: Source) -> None:
    """Refuse a column mapping from names that the format does not have.

    Raises:
        UserError: a key of `columns` is none of the format's fields.
    """
    fields = _FORMATS[source.format].fields
    for name in source.columns:
        if name not in fields:
            raise UserError(
                f"source {source.path}: columns: format {source.format} has no field {shorten(name)}; "
                f"its fields are {', '.join(fields)}, each followed by the source's own name for it"
            )


def shorten(value: Any) -> str:
    """A value as JSON, cut to one short line for an error message."""
    try:
        text = json.dumps(value[:80] if isinstance(value, str | list) else value, default=repr)
    except (RecursionError, TypeError, ValueError):
        text = f"a {type(value).__name__} that is nested too deeply to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_alpaca(row: dict[str, Any], source: Source) -> list[Turn]:
    columns = source.columns
    instruction = _text(row, columns.get("instruction", "instruction"), source)
    name = columns.get("input", "input")
    # Stanford's own reader takes a missing input for an empty one.
    context = _text(row, name, source) if name in row else ""
    turns = []
    name = columns.get("system", "system")
    if system := _optional_text(row, name, source):
        turns.append(Turn("system", system))
    name = columns.get("history", "history")
    if row.get(name) is not None:
        turns += _history(row[name], name, source.train_on == "all")
    turns.append(Turn("user", instruction, context))
    turns.append(Turn("assistant", _output(row, source), "", True))
    return turns


def _output(row: dict[str, Any], source: Source) -> str:
    name = source.columns.get("output", "output")
    other = source.columns.get("response", "response")
    if other not in row:
        return _text(row, name, source)
    response = _text(row, other, source)
    if name in row and _text(row, name, source) != response:
        raise RowError(
            f"fields '{name}' and '{other}' differ: {shorten(row[name])} and {shorten(response)}; keep the one to learn"
        )
    return response


def _history(pairs: Any, name: str, supervised: bool) -> list[Turn]:
    if not isinstance(pairs, list):
        raise RowError(f"field '{name}' is {shorten(pairs)}, expected a list of [instruction, response] pairs")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"{name}[{index}] is {shorten(pair)}, expected two texts: [instruction, response]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1], "", supervised)]
    return turns


def _parse_messages(row: dict[str, Any], source: Source) -> list[Turn]:
    columns = source.columns
    return _conversation(
        row,
        columns.get("messages", "messages"),
        role_key=columns.get("role", "role"),
        text_key=columns.get("content", "content"),
        source=source,
    )


def _parse_sharegpt(row: dict[str, Any], source: Source) -> list[Turn]:
    columns = source.columns
    name = columns.get("conversations", "conversations")
    turns = _conversation(
        row, name, role_key=columns.get("from", "from"), text_key=columns.get("value", "value"), source=source
    )
    field = columns.get("system", "system")
    if system := _optional_text(row, field, source):
        if turns[0].role == "system":
            raise RowError(f"field '{field}' is {shorten(system)}, and '{name}' begins with a system turn; keep one")
        turns.insert(0, Turn("system", system))
    return turns


def _parse_text(row: dict[str, Any], source: Source) -> str:
    return _text(row, source.columns.get("text", "text"), source)


def _conversation(row: dict[str, Any], name: str, role_key: str, text_key: str, source: Source) -> list[Turn]:
    if name not in row:
        raise _missing(row, name, source)
    entries = row[name]
    if not isinstance(entries, list) or not entries:
        raise RowError(f"field '{name}' is {shorten(entries)}, expected a list of turns {{{role_key}, {text_key}}}")
    turns: list[Turn] = []
    last = -1
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise RowError(f"{name}[{index}] is {shorten(entry)}, expected a turn {{{role_key}, {text_key}}}")
        role = entry.get(role_key)
        known = ROLES.get(role) if isinstance(role, str) else None
        if known is None:
            raise RowError(f"{name}[{index}].{role_key} is {shorten(role)}, expected one of {', '.join(ROLES)}")
        text = entry.get(text_key)
        if not isinstance(text, str):
            text = _joined_text(text, f"{name}[{index}].{text_key}")
        if known == "assistant":
            last = index
            turns.append(Turn(known, text, "", _is_trained(entry, f"{name}[{index}]")))
        else:
            turns.append(Turn(known, text))
    if last < 0:
        raise RowError(f"field '{name}' has no turn of the assistant, so there is nothing to learn; remove the row")
    del turns[last + 1 :]
    if source.train_on == "last":
        turns[:last] = [turn._replace(supervised=False) for turn in turns[:last]]
    return turns


def _is_trained(entry: Mapping[str, Any], where: str) -> bool:
    for key in ("tool_calls", "function_call"):
        if entry.get(key):
            raise RowError(f"{where}.{key} is {shorten(entry[key])}, which is not text; write the call into the turn")
    weight, train = entry.get("weight"), entry.get("train")
    if weight not in (None, 0, 1):
        raise RowError(f"{where}.weight is {shorten(weight)}, expected 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}.train is {shorten(train)}, expected true or false")
    return weight != 0 and train is not False


def _joined_text(parts: Any, where: str) -> str:
    """The text of OpenAI's list of parts, which are laid end to end."""
    if not isinstance(parts, list) or not parts:
        raise RowError(f"{where} is {shorten(parts)}, expected text, or a list of {{type: text, text}}")
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RowError(f"{where}[{index}] is {shorten(part)}, expected {{type: text, text}}")
        texts.append(text)
    return "".join(texts)


def _text(row: dict[str, Any], field: str, source: Source) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if field not in row:
        raise _missing(row, field, source)
    raise RowError(f"field '{field}' is {shorten(value)}, expected text; quote it, or use \"\" for none")


def _optional_text(row: dict[str, Any], field: str, source: Source) -> str:
    """Empty where the field is missing or null: a table has no other way to leave it out."""
    return "" if row.get(field) is None else _text(row, field, source)


def _missing(row: dict[str, Any], field: str, source: Source) -> RowError:
    found = ", ".join(sorted(map(str, row))) or "none"
    return RowError(
        f"field '{field}' is missing, found {shorten(found)}; add it, map it in the source's columns, or set the "
        f"source's format (now {source.format})"
    )


class _Format(NamedTuple):
    parse: Callable[[dict[str, Any], Source], list[Turn] | str]
    fields: tuple[str, ...]


_FORMATS = {
    "alpaca": _Format(_parse_alpaca, ("instruction", "input", "output", "response", "system", "history")),
    "messages": _Format(_parse_messages, ("messages", "role", "content")),
    "sharegpt": _Format(_parse_sharegpt, ("conversations", "from", "value", "system")),
    "text": _Format(_parse_text, ("text",)),
}
