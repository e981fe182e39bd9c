"""Rows of the public files as MMLU subjects and HellaSwag rows; every row is checked."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.eval.tasks.files import read_rows
from sft.eval.tasks.hellaswag import HellaswagRow
from sft.eval.tasks.item import NUM_CHOICES
from sft.eval.tasks.layout import choose_copy, find_split_files, join_shards
from sft.eval.tasks.mmlu import LETTERS, MmluRow, MmluSubject, category_of

MMLU_FIELDS = {"question", "choices", "answer"}
HELLASWAG_FIELDS = {"activity_label", "ctx_a", "ctx_b", "endings"}
HELLASWAG_TEXTS = ("activity_label", "ctx_a", "ctx_b")
ALL = "all"
"""The hub's folder that holds every subject once more."""


def load_mmlu(data: Path) -> tuple[list[MmluSubject], str]:
    """Subjects in alphabetical order, and a line that says where they were found and how many.

    Raises:
        UserError: nothing found, or the files or a row are not what their layout promises.
    """
    files = find_split_files(data, MMLU_FIELDS, ("dev", "test"), by_subject=True)
    chosen, source = choose_copy(files, "test", "MMLU", data)
    rows: dict[tuple[str, str], list[MmluRow]] = {}
    origins: dict[tuple[str, str], Path] = {}
    tables = join_shards(chosen)
    for place, split in sorted(tables, key=lambda table: (table[0] == ALL, table)):
        paths = tables[place, split]
        for subject, group in _read_mmlu(paths, place).items():
            if (subject, split) not in rows:
                rows[subject, split], origins[subject, split] = group, paths[0]
            elif place != ALL:  # `all` only fills in what the subjects' own folders lack
                raise UserError(
                    f"{origins[subject, split]} and {paths[0]}: both hold {split} rows of {subject}; remove one of them"
                )
    subjects = sorted({subject for subject, _ in rows})
    if untested := [subject for subject in subjects if (subject, "test") not in rows]:
        raise UserError(
            f"--data {data}: MMLU {untested[0]} has dev rows but no test rows; complete or remove the subject"
        )
    found = [MmluSubject(name, rows.get((name, "dev"), []), rows[name, "test"]) for name in subjects]
    return found, f"{source}: {_describe_subjects(found)}"


def load_hellaswag(data: Path, need_train: bool) -> tuple[list[HellaswagRow], list[HellaswagRow], str]:
    """The validation rows, the train rows (none unless needed), and a line that says where they were found.

    Raises:
        UserError: nothing found, or the files or a row are not what their layout promises.
    """
    splits = ("validation", "train") if need_train else ("validation",)
    files = find_split_files(data, HELLASWAG_FIELDS, splits, by_subject=False)
    chosen, source = choose_copy(files, "validation", "HellaSwag", data)
    tables = join_shards(chosen)
    validation, train = (
        [
            _hellaswag_row(row, path, number)
            for path in tables.get(("", split), [])
            for number, row in enumerate(read_rows(path))
        ]
        for split in ("validation", "train")
    )
    return (
        validation,
        train,
        f"{source}: {len(validation)} validation rows" + (f", {len(train)} train rows" if need_train else ""),
    )


def _read_mmlu(paths: list[Path], place: str) -> dict[str, list[MmluRow]]:
    """Rows by subject; `place` is the subject that the file's name or folder gives."""
    rows: dict[str, list[MmluRow]] = defaultdict(list)
    for path in paths:
        for number, row in enumerate(read_rows(path)):
            rows[_subject_of(row, place.replace(" ", "_"), path, number)].append(_mmlu_row(row, path, number))
    return rows


def _subject_of(row: dict[str, Any], place: str, file: Path, number: int) -> str:
    """The row's own `subject`; else the place's, which may be any folder's name. The prompt names the subject."""
    if place != ALL and row.get("subject") in (None, ""):
        return place
    subject = _text(row, "subject", file, number).replace(" ", "_")
    if subject != place and category_of(place):
        raise UserError(
            f"{file} row {number}: field 'subject' is {subject!r}, but the file's name or folder says {place!r}; "
            "correct one of them"
        )
    return subject


def _describe_subjects(subjects: list[MmluSubject]) -> str:
    unknown = [subject.name for subject in subjects if not category_of(subject.name)]
    known = f"{len(subjects)} subject{'s' * (len(subjects) > 1)}"
    others = f" ({len(unknown)} not among MMLU's own, first {unknown[0]})" if unknown else ""
    return f"{known}{others}, {sum(len(subject.test) for subject in subjects)} test rows"


def _mmlu_row(row: dict[str, Any], file: Path, number: int) -> MmluRow:
    choices = _four_texts(row, "choices", file, number)
    answer = row.get("answer")
    if answer in LETTERS:
        answer = LETTERS.index(answer)
    gold = _index(answer, file, number, "answer", "a letter A to D or")
    return MmluRow(_text(row, "question", file, number), choices, gold)


def _hellaswag_row(row: dict[str, Any], file: Path, number: int) -> HellaswagRow:
    activity_label, ctx_a, ctx_b = (_text(row, field, file, number) for field in HELLASWAG_TEXTS)
    rest = {key: value for key, value in row.items() if key not in (*HELLASWAG_TEXTS, "endings", "label", "source_id")}
    return HellaswagRow(
        activity_label=activity_label,
        ctx_a=ctx_a,
        ctx_b=ctx_b,
        endings=_four_texts(row, "endings", file, number),
        label=_index(row.get("label"), file, number, "label", ""),
        source_id=str(row.get("source_id") or ""),
        rest=json.dumps(rest, sort_keys=True, default=str),
    )


def _text(row: dict[str, Any], field: str, file: Path, number: int) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{file} row {number}: field '{field}' is {_show(value)}; need a text")
    _check_characters(value, field, file, number)
    return value


def _four_texts(row: dict[str, Any], field: str, file: Path, number: int) -> tuple[str, str, str, str]:
    value = row.get(field)
    if not isinstance(value, list) or len(value) != NUM_CHOICES or not all(isinstance(text, str) for text in value):
        raise UserError(f"{file} row {number}: field '{field}' is {_show(value)}; need {NUM_CHOICES} texts")
    for text in value:
        _check_characters(text, field, file, number)
    return value[0], value[1], value[2], value[3]


def _check_characters(text: str, field: str, file: Path, number: int) -> None:
    """JSON can spell half of a surrogate pair, which is no character: tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{file} row {number}: field '{field}' holds {ascii(text[error.start])} at character {error.start}, "
            "half of a surrogate pair; correct the text"
        ) from None


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
