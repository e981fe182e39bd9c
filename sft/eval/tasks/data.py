"""Rows of the public files as MMLU subjects and HellaSwag rows; every row is checked."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.eval.tasks.fields import INDEX, LETTERS_OR_INDEX, choice_field, four_texts_field, text_field
from sft.eval.tasks.files import read_rows
from sft.eval.tasks.hellaswag import HellaswagRow
from sft.eval.tasks.layout import choose_copy, find_split_files, join_shards
from sft.eval.tasks.mmlu import LETTERS, MmluRow, MmluSubject, category_of

MMLU_FIELDS = {"question", "choices", "answer"}
HELLASWAG_FIELDS = {"activity_label", "ctx_a", "ctx_b", "endings"}
HELLASWAG_TEXTS = ("activity_label", "ctx_a", "ctx_b")
ALL = "all"
"""The hub's folder that holds every subject once more."""
MMLU_SUBJECTS, MMLU_TEST_ROWS = 57, 14_042
HELLASWAG_ROWS = {"validation": 10_042, "train": 39_905}
"""What the public releases hold, like the two above."""
MOST_DUPLICATES = 0.02
"""Share of a table's rows; the public ones hold up to 1 % (us_foreign_policy)."""


@dataclass(frozen=True)
class _Duplicates:
    """Rows of one scored table that ask what an earlier row asked."""

    count: int
    first: tuple[str, str]
    """Where the first such row and its original stand."""


def load_mmlu(data: Path) -> tuple[list[MmluSubject], str]:
    """Subjects in alphabetical order, and a line that says where they were found, how many, and whether all.

    Raises:
        UserError: nothing found, or the files or a row are not what their layout promises.
    """
    files = find_split_files(data, MMLU_FIELDS, ("dev", "test"), by_subject=True)
    chosen, source = choose_copy(files, "test", "MMLU", data)
    rows: dict[tuple[str, str], list[tuple[str, MmluRow]]] = {}
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
    duplicates = [_find_duplicates(rows[subject, "test"]) for subject in subjects]
    found = [
        MmluSubject(name, *([row for _, row in rows.get((name, split), [])] for split in ("dev", "test")))
        for name in subjects
    ]
    return found, f"{source}: {_describe_subjects(found)}{_describe_duplicates(duplicates)}"


def load_hellaswag(data: Path, need_train: bool) -> tuple[list[HellaswagRow], list[HellaswagRow], str]:
    """The validation rows, the train rows (none unless needed), and a line that says where they were found.

    Raises:
        UserError: nothing found, or the files or a row are not what their layout promises.
    """
    splits = ("validation", "train") if need_train else ("validation",)
    files = find_split_files(data, HELLASWAG_FIELDS, splits, by_subject=False)
    chosen, source = choose_copy(files, "validation", "HellaSwag", data)
    tables = join_shards(chosen)
    if need_train and ("", "train") not in tables:
        raise UserError(
            f"--data {data}: {source} has no train split, which --shots.hellaswag above 0 draws from; "
            "put it beside the validation split, or use 0 shots"
        )
    placed = {split: _read_hellaswag(tables["", split]) for split in splits}
    duplicates = _find_duplicates(
        [
            (place, (row.activity_label, row.ctx_a, row.ctx_b, row.endings, row.label))
            for place, row in placed["validation"]
        ]
    )
    validation, train = ([row for _, row in placed.get(split, [])] for split in ("validation", "train"))
    counts = describe_rows(len(validation), "validation")
    if need_train:
        counts += f", {describe_rows(len(train), 'train')}"
    return validation, train, f"{source}: {counts}{_describe_duplicates([duplicates])}"


def describe_subjects(names: Sequence[str], num_rows: int) -> str:
    """How many subjects and test rows there are, and how many the public release has where that differs."""
    unknown = [name for name in names if not category_of(name)]
    others = f" ({len(unknown)} not among MMLU's own, first {unknown[0]})" if unknown else ""
    line = f"{len(names)} subject{'s' * (len(names) > 1)}{others}, {num_rows:,} test rows"
    if (len(names), num_rows) == (MMLU_SUBJECTS, MMLU_TEST_ROWS):
        return line
    return f"{line}; the public release has {MMLU_SUBJECTS} and {MMLU_TEST_ROWS:,}"


def _describe_subjects(subjects: Sequence[MmluSubject]) -> str:
    return describe_subjects([subject.name for subject in subjects], sum(len(subject.test) for subject in subjects))


def describe_rows(count: int, split: str) -> str:
    """How many rows a split of HellaSwag has, and how many the public release has where that differs."""
    line, public = f"{count:,} {split} rows", HELLASWAG_ROWS[split]
    if count == public:
        return line
    consequence = ": the solved examples, and so the prompts, differ from published ones" if split == "train" else ""
    return f"{line} (the public release has {public:,}{consequence})"


def _find_duplicates(rows: Sequence[tuple[str, Hashable]]) -> _Duplicates | None:
    """Rows (place, what is scored) that are equal to an earlier one; more than a few are an error."""
    seen: dict[Hashable, str] = {}
    again = [(seen[row], place) for place, row in rows if seen.setdefault(row, place) != place]
    if not again:
        return None
    original, copy = again[0]
    if len(again) > MOST_DUPLICATES * len(rows):
        raise UserError(
            f"{original} and {copy}: the same item twice, {len(again)} such rows of {len(rows)} would count again; "
            "is the file several ones concatenated? Remove the copies"
        )
    return _Duplicates(len(again), again[0])


def _describe_duplicates(tables: Sequence[_Duplicates | None]) -> str:
    found = [table for table in tables if table]
    if not found:
        return ""
    count = sum(table.count for table in found)
    items = "item stands" if count == 1 else "items stand"
    original, copy = found[0].first
    return f"; {count} {items} there twice{', first' * (count > 1)}: {original} and {copy}"


def _read_mmlu(paths: list[Path], place: str) -> dict[str, list[tuple[str, MmluRow]]]:
    """Rows with their places, by subject; `place` is the subject that the file's name or folder gives."""
    rows: dict[str, list[tuple[str, MmluRow]]] = defaultdict(list)
    for where, row in _rows_of(paths):
        rows[_subject_of(row, place.replace(" ", "_"), where)].append((where, _mmlu_row(row, where)))
    return rows


def _read_hellaswag(paths: list[Path]) -> list[tuple[str, HellaswagRow]]:
    return [(where, _hellaswag_row(row, where)) for where, row in _rows_of(paths)]


def _rows_of(paths: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of one table."""
    is_empty = True
    for path in paths:
        for number, row in enumerate(read_rows(path)):
            is_empty = False
            yield f"{path} row {number}", row
    if is_empty:
        raise UserError(f"{paths[0]}: no rows; complete the file, or remove it with all that belongs to it")


def _subject_of(row: dict[str, Any], place: str, where: str) -> str:
    """The row's own `subject`; else the place's, which may be any folder's name. The prompt names the subject."""
    if place != ALL and row.get("subject") in (None, ""):
        return place
    subject = text_field(row, "subject", where).replace(" ", "_")
    if subject != place and category_of(place):
        raise UserError(
            f"{where}: field 'subject' is {subject!r}, but the file's name or folder says {place!r}; "
            "correct one of them"
        )
    return subject


def _mmlu_row(row: dict[str, Any], where: str) -> MmluRow:
    choices = four_texts_field(row, "choices", where)
    if row.get("answer") in LETTERS:
        row = row | {"answer": LETTERS.index(row["answer"])}
    return MmluRow(text_field(row, "question", where), choices, choice_field(row, "answer", where, LETTERS_OR_INDEX))


def _hellaswag_row(row: dict[str, Any], where: str) -> HellaswagRow:
    activity_label, ctx_a, ctx_b = (text_field(row, field, where) for field in HELLASWAG_TEXTS)
    endings = four_texts_field(row, "endings", where)
    if row.get("label") in (None, ""):
        raise UserError(
            f"{where}: has no label, as in the public test split, which cannot be scored; use the validation split"
        )
    rest = {key: value for key, value in row.items() if key not in (*HELLASWAG_TEXTS, "endings", "label", "source_id")}
    return HellaswagRow(
        activity_label=activity_label,
        ctx_a=ctx_a,
        ctx_b=ctx_b,
        endings=endings,
        label=choice_field(row, "label", where, INDEX),
        source_id=str(row.get("source_id") or ""),
        rest=json.dumps(rest, sort_keys=True, default=str),
    )
