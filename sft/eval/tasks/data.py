"""Finds MMLU and HellaSwag under a folder, by content and in any public layout, and checks every row.

MMLU: <subject>/{dev,test}*.{parquet,jsonl} (the hub's cais/mmlu, also its folder `all`) and
{dev,test}/<subject>_{dev,test}.csv (Hendrycks' tree). HellaSwag: {train,validation}*.{parquet,jsonl} (the hub's
Rowan/hellaswag) and hellaswag_{train,val}.jsonl (Zellers' files).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.eval.tasks.files import SUFFIXES, peek_fields, read_rows
from sft.eval.tasks.hellaswag import HellaswagRow
from sft.eval.tasks.item import NUM_CHOICES
from sft.eval.tasks.mmlu import LETTERS, MmluRow, MmluSubject

SPLIT_NAME = re.compile(r"(?:(?P<subject>.+)_)?(?P<split>dev|test|validation|val|train)(?:-\d{5}-of-\d{5})?")
MMLU_FIELDS = {"question", "choices", "answer"}
HELLASWAG_FIELDS = {"activity_label", "ctx_a", "ctx_b", "endings"}
HELLASWAG_TEXTS = ("activity_label", "ctx_a", "ctx_b")


@dataclass(frozen=True)
class _File:
    path: Path
    root: Path
    """Folder of the whole data set: files with the same root and suffix belong together."""
    subject: str
    split: str


def load_mmlu(data: Path) -> tuple[list[MmluSubject], str]:
    """Subjects in alphabetical order, and a line that says where they were found.

    Raises:
        UserError: nothing found, or a row is not what its layout promises.
    """
    files = [_locate_mmlu(file, *name) for file, name in _candidates(data) if peek_fields(file) >= MMLU_FIELDS]
    chosen, source = _choose([file for file in files if file.split in ("dev", "test")], "test", "MMLU", data)
    rows: dict[tuple[str, str], list[MmluRow]] = defaultdict(list)
    names = {file.subject for file in chosen}
    for file in chosen:
        if file.subject == "all" and len(names) > 1:
            continue  # the hub holds every subject twice: alone and in `all`
        for number, row in enumerate(read_rows(file.path)):
            subject = _text(row, "subject", file.path, number) if file.subject == "all" else file.subject
            rows[subject, file.split].append(_mmlu_row(row, file.path, number))
    subjects = sorted({subject for subject, _ in rows})
    if untested := [subject for subject in subjects if (subject, "test") not in rows]:
        raise UserError(
            f"--data {data}: MMLU {untested[0]} has dev rows but no test rows; complete or remove the subject"
        )
    return [MmluSubject(name, rows.get((name, "dev"), []), rows[name, "test"]) for name in subjects], source


def load_hellaswag(data: Path, need_train: bool) -> tuple[list[HellaswagRow], list[HellaswagRow], str]:
    """The validation rows, the train rows (none unless needed), and a line that says where they were found.

    Raises:
        UserError: nothing found, or a row is not what its layout promises.
    """
    files = [
        _File(file, file.parent, "hellaswag", "validation" if split == "val" else split)
        for file, (_, split) in _candidates(data)
        if split != "test" and peek_fields(file) >= HELLASWAG_FIELDS
    ]
    chosen, source = _choose(files, "validation", "HellaSwag", data)
    splits = {
        split: [
            _hellaswag_row(row, file.path, number)
            for file in chosen
            if file.split == split
            for number, row in enumerate(read_rows(file.path))
        ]
        for split in (("validation", "train") if need_train else ("validation",))
    }
    return splits["validation"], splits.get("train", []), source


def _candidates(data: Path) -> Iterable[tuple[Path, tuple[str, str]]]:
    """Files whose name ends in a split's name, with (subject in the name or "", split)."""
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; give the folder that holds MMLU and HellaSwag")
    for file in sorted(data.rglob("*")):
        match = SPLIT_NAME.fullmatch(file.stem)
        is_auxiliary = file.parent.name == "auxiliary_train"  # its mc_test.csv is no test split
        if match and file.suffix in SUFFIXES and file.is_file() and not is_auxiliary:
            yield file, (match["subject"] or "", match["split"])


def _locate_mmlu(file: Path, subject: str, split: str) -> _File:
    if subject:
        return _File(file, file.parent.parent if file.parent.name == split else file.parent, subject, split)
    return _File(file, file.parent.parent, file.parent.name, split)


def _choose(files: Sequence[_File], needed: str, name: str, data: Path) -> tuple[list[_File], str]:
    """One copy of the data set: hub formats before CSV, then the first by path."""
    groups: dict[tuple[int, Path], list[_File]] = defaultdict(list)
    for file in files:
        groups[SUFFIXES.index(file.path.suffix), file.root].append(file)
    usable = sorted(key for key, group in groups.items() if any(file.split == needed for file in group))
    if not usable:
        raise UserError(
            f"--data {data}: holds no {name} {needed} split; expected the layout of the Hugging Face hub "
            "or of the original release, see the README"
        )
    first, *others = [f"{root} ({SUFFIXES[suffix][1:]})" for suffix, root in usable]
    ignored = f", not from {', '.join(others)}" if others else ""
    return groups[usable[0]], f"{name} from {first}{ignored}"


def _mmlu_row(row: dict[str, Any], file: Path, number: int) -> MmluRow:
    choices = row.get("choices")
    if not (
        isinstance(choices, list) and len(choices) == NUM_CHOICES and all(isinstance(text, str) for text in choices)
    ):
        raise UserError(f"{file} row {number}: field 'choices' is {_show(choices)}; need {NUM_CHOICES} texts")
    answer = row.get("answer")
    if answer in LETTERS:
        answer = LETTERS.index(answer)
    gold = _index(answer, file, number, "answer", "a letter A to D or")
    return MmluRow(_text(row, "question", file, number), (choices[0], choices[1], choices[2], choices[3]), gold)


def _hellaswag_row(row: dict[str, Any], file: Path, number: int) -> HellaswagRow:
    endings = row.get("endings")
    if not (
        isinstance(endings, list) and len(endings) == NUM_CHOICES and all(isinstance(text, str) for text in endings)
    ):
        raise UserError(f"{file} row {number}: field 'endings' is {_show(endings)}; need {NUM_CHOICES} texts")
    activity_label, ctx_a, ctx_b = (_text(row, field, file, number) for field in HELLASWAG_TEXTS)
    rest = {key: value for key, value in row.items() if key not in (*HELLASWAG_TEXTS, "endings", "label", "source_id")}
    return HellaswagRow(
        activity_label=activity_label,
        ctx_a=ctx_a,
        ctx_b=ctx_b,
        endings=(endings[0], endings[1], endings[2], endings[3]),
        label=_index(row.get("label"), file, number, "label", ""),
        source_id=str(row.get("source_id") or ""),
        rest=json.dumps(rest, sort_keys=True, default=str),
    )


def _text(row: dict[str, Any], field: str, file: Path, number: int) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{file} row {number}: field '{field}' is {_show(value)}; need a text")
    return value


def _index(value: Any, file: Path, number: int, field: str, also: str) -> int:
    """0 to 3, given as a number or as a digit (the hub's HellaSwag labels are text)."""
    if isinstance(value, str) and value in ("0", "1", "2", "3"):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NUM_CHOICES:
        return value
    raise UserError(
        f"{file} row {number}: field '{field}' is {_show(value)}; need {f'{also} ' if also else ''}a number 0 to 3"
    )


def _show(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]
