"""Files of instructions that a model shall answer: those of `sft drift`, and of the samples during training."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError

A_FILE = "give a .txt, .json or .jsonl file"


@dataclass(frozen=True)
class Prompt:
    """One instruction, with the text that it is about where there is one."""

    instruction: str
    input: str = ""

    @property
    def shown(self) -> str:
        """Both in one text, for the report."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


def read_prompts(option: str, path: Path, remedy: str = A_FILE) -> list[Prompt]:
    """The instructions of a file: one per line (.txt), or rows of instruction and input (.json, .jsonl), as Alpaca's.

    Args:
        option: what named the file, for messages.
        path: the file.
        remedy: what else could be given.

    Raises:
        UserError: the file is missing, of another kind, not UTF-8 or not valid JSON, or holds no instruction.
    """
    what = f"{option} {path}"
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{what}: is of no known kind; {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror or error}; give a readable file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line in text.split("\n") if line.strip()]
    else:
        prompts = [_read_row(f"{what}, {place}", row) for place, row in _rows(what, text, path.suffix)]
    if not prompts:
        raise UserError(f"{what}: holds no instruction; add some, or {remedy}")
    return prompts


def _rows(what: str, text: str, suffix: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row of a JSON array, or of each line."""
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parse(f"{what}, line {number}", line)
        return
    rows = _parse(what, text)
    if not isinstance(rows, list):
        raise UserError(f'{what}: is no array of rows; write [{{"instruction": …, "input": …}}, …]')
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {' '.join(str(error).split())}; correct it") from None


def _read_row(where: str, row: Any) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f'{where}: is no object; write {{"instruction": …, "input": …}}')
    fields = {"instruction": row.get("instruction", ""), "input": row.get("input") or ""}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} is {json.dumps(value)[:80]}, no text; correct it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: {name} holds half of a surrogate pair, which no tokenizer encodes; remove it")
    if not fields["instruction"].strip():
        raise UserError(f"{where}: has no instruction; add one, or remove the row")
    return Prompt(**fields)
