"""Rows and their variants: which variants are worth keeping, what is written for them, and a user's own hook."""

import copy
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import UserError, shorten

Row = dict[str, Any]

EMPTY = "empty"
UNCHANGED = "unchanged"
DUPLICATE = "duplicate"
BLANK = "blank"
UNFINISHED = "unfinished"
TOO_LONG = "too_long"
SEVERAL_LINES = "several_lines"
UNKNOWN_CHARACTERS = "unknown_characters"
INVALID_UNICODE = "invalid_unicode"

MEANING = {
    EMPTY: "nothing but white space came back",
    UNCHANGED: "equals the original but for white space",
    DUPLICATE: "equals an earlier variant of its row but for white space",
    BLANK: "the original has no text in the fields to rewrite",
    UNFINISHED: "had not ended after max_new_tokens",
    TOO_LONG: "the original is longer than the model's input",
    SEVERAL_LINES: "the original has line breaks, which these models turn into spaces",
    UNKNOWN_CHARACTERS: "original or variant holds characters that the model's tokenizer does not know",
    INVALID_UNICODE: "the original holds half of a surrogate pair",
}
OWN_FIELDS = ("augmented_from", "augmentation", "variant")
"""What a variant has beside the fields of its original."""


class Dropped(NamedTuple):
    """A variant that is not worth writing; `reason` is a key of MEANING."""

    reason: str


Variant = Row | Dropped
"""The fields that replace those of the original, or why there are none."""
Hook = Callable[[list[Row]], Any]


def written_variants(number: int, row: Row, variants: Sequence[Variant], label: str) -> Iterator[Row | Dropped]:
    """For each variant the row to write, or why it is dropped.

    Args:
        number: of the row in its file, from 1: what `augmented_from` says where the row has no `id`.
        row: the original.
        variants: what was made of it.
        label: goes into `augmentation`.
    """
    origin = number if row.get("id") is None else row["id"]
    seen: set[str] = set()
    for index, variant in enumerate(variants):
        if isinstance(variant, Dropped):
            yield variant
        elif reason := _reason(row, variant, seen):
            yield Dropped(reason)
        else:
            yield {**row, **variant, **dict(zip(OWN_FIELDS, (origin, label, index), strict=True))}


def _reason(row: Row, variant: Row, seen: set[str]) -> str | None:
    if not variant:
        return BLANK
    if not any(str(value).strip() for value in variant.values()):
        return EMPTY
    if all(key in row and _normal(value) == _normal(row[key]) for key, value in variant.items()):
        return UNCHANGED
    text = json.dumps({key: _normal(value) for key, value in variant.items()}, sort_keys=True)
    if text in seen:
        return DUPLICATE
    seen.add(text)
    return None


def _normal(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


def to_line(row: Row, where: str) -> bytes:
    """One line of JSON; `where` names the row in errors.

    Raises:
        UserError: a value that JSON cannot hold, as a date or a NaN from a parquet file.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {error}; convert the field to text or numbers") from None
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a field that was copied
        return json.dumps(row).encode() + b"\n"


def load_hook(name: str) -> Hook:
    """The function that `module:function` names, imported from the current folder first.

    Raises:
        UserError: not of that form, no such module, or no such function in it.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise UserError(f"--hook {name}: must be module:function")
    module_name, function = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--hook {name}: {error}; modules are looked for in {os.getcwd()}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--hook {name}: {module.__file__} has no function {function}")
    return found


def hook_digest(hook: Hook) -> str:
    """sha256 of the file that the hook's module was read from."""
    file = sys.modules[hook.__module__].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def call_hook(hook: Hook, name: str, first: int, rows: Sequence[Row]) -> list[list[Variant]]:
    """The hook's variants of each row. It gets copies: what it does to them does not reach the originals.

    Raises:
        UserError: it returned something else than a list of dicts for each row, or a field of OWN_FIELDS.
    """
    found = hook(copy.deepcopy(list(rows)))
    where = f"--hook {name}: for the batch from row {first}"
    if not isinstance(found, list) or len(found) != len(rows):
        got = f"{len(found)} items" if isinstance(found, list) else type(found).__name__
        raise UserError(
            f"{where} it returned {got}, expected a list with one list of variants for each of {len(rows)} rows"
        )
    for index, variants in enumerate(found):
        if not isinstance(variants, list) or not all(isinstance(variant, dict) for variant in variants):
            raise UserError(
                f"{where} item {index} is {shorten(repr(variants))}, expected a list of dicts, the variants"
            )
        for variant in variants:
            if odd := next((key for key in variant if not isinstance(key, str) or key in OWN_FIELDS), None):
                raise UserError(f"{where} a variant has the field {odd!r}; leave it out, sft augment sets {OWN_FIELDS}")
            to_line(variant, f"{where} a variant")
    return found
