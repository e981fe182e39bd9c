"""Rows of evaluation files: MMLU and HellaSwag as the drift job reads them, and other tables with text."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
PASSED_OVER = "auxiliary_train"
"""MMLU's folder of training questions."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLIT_NAME = re.compile(r"(?:(?P<subject>.+)_)?(?P<split>dev|test|validation|val|train)(?:-(?P<shard>\d{5})-of-\d{5})?")
MMLU_FIELDS = {"question", "choices"}
HELLASWAG_FIELDS = {"ctx_a", "ctx_b", "endings"}
HELLASWAG_TRAIN = "hellaswag/train"
MMLU_COLUMNS = 6
CSV_FIELD_LIMIT = 10_000_000
"""Characters; csv's own default of 131,072 would refuse long passages."""


class Row(NamedTuple):
    """One row of an evaluation file."""

    name: str
    """mmlu/<subject>/<split>#<row>, hellaswag/<split>#<row>, or <file>#<row>; rows count from 0 as the drift job's
    doc_id does: within the subject, across the shards of a split."""
    fields: dict[str, Any]


def read_eval_rows(paths: list[str]) -> Iterator[Row]:
    """All rows of the files and of the files below the folders, by path; a folder `all` comes last.

    Of folders the training splits, which no job scores, are passed over: HellaSwag's train, MMLU's auxiliary_train.

    Raises:
        UserError: a path does not exist, a folder holds no such file, or a file is not a table of texts.
    """
    for path in map(Path, paths):
        for files in _splits(_files(path)):
            count: Counter[str] = Counter()
            for file in files:
                number = -1
                for number, fields in enumerate(_read(file)):
                    place = _place(file, fields)
                    if place == HELLASWAG_TRAIN and file != path:
                        break
                    yield Row(f"{place or file.name}#{count[place] if place else number}", fields)
                    count[place] += 1
                if number < 0:
                    raise UserError(f"decontaminate {file}: holds no rows; give files of evaluation items")


def _files(path: Path) -> list[Path]:
    try:
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise UserError(f"decontaminate {path}: a {path.suffix or 'nameless'} file; need {', '.join(SUFFIXES)}")
            return [path]
        if not path.is_dir():
            raise UserError(f"decontaminate {path}: no such file or folder; correct the path")
        found = [file for file in sorted(path.rglob("*")) if _is_table(file.relative_to(path)) and file.is_file()]
    except (OSError, ValueError) as error:
        raise UserError(f"decontaminate {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise UserError(f"decontaminate {path}: holds no {', '.join(SUFFIXES)} file; give the folder of the items")
    return sorted(found, key=lambda file: (file.parent.name == "all", file))


def _is_table(file: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.parts)
    return not is_hidden and file.suffix in SUFFIXES and file.name not in METADATA and file.parent.name != PASSED_OVER


def _splits(files: list[Path]) -> list[list[Path]]:
    """Files, those together that are shards of one split: their rows are counted on."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        match = SPLIT_NAME.fullmatch(file.stem)
        shard = match["shard"] if match else None
        stem = file.stem.partition(f"-{shard}-of-")[0] if shard else file.stem
        groups.setdefault((file.parent, stem + file.suffix), []).append(file)
    return list(groups.values())


def _place(file: Path, fields: dict[str, Any]) -> str:
    """Task, subject and split; "" for a table that is neither MMLU nor HellaSwag."""
    match = SPLIT_NAME.fullmatch(file.stem)
    split = "validation" if match and match["split"] == "val" else match["split"] if match else file.stem
    if fields.keys() >= HELLASWAG_FIELDS:
        return f"hellaswag/{split}"
    if fields.keys() >= MMLU_FIELDS:
        named = match["subject"] if match and match["subject"] else file.resolve().parent.name
        return f"mmlu/{fields.get('subject') or named}/{split}"
    return ""


def _read(file: Path) -> Iterator[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
        elif file.suffix == ".csv":
            yield from _read_csv(file)
        else:
            yield from _read_json(file)
    except UnicodeDecodeError as error:
        raise UserError(f"decontaminate {file}: not UTF-8 at byte {error.start}; convert the file") from None
    except OSError as error:
        raise UserError(f"decontaminate {file}: cannot be read: {error.strerror or error}") from None


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"decontaminate {file}: not a whole parquet file: {' '.join(str(error).split())}") from None


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """An object per line, or one array of objects."""
    text = file.read_text(encoding="utf-8-sig")
    is_lines = file.suffix == ".jsonl"
    # at \n only: splitlines would also cut at U+2028
    for line, document in enumerate(text.split("\n") if is_lines else [text], start=1):
        if is_lines and not document.strip():
            continue
        where = f"decontaminate {file}" + (f" line {line}" if is_lines else "")
        try:
            parsed = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}; give files of evaluation items") from None
        rows = [parsed] if is_lines else parsed
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            need = "one JSON object per line" if is_lines else "one array of JSON objects"
            raise UserError(f"{where}: is not a table of evaluation items; need {need}")
        yield from rows


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    """MMLU's six columns, with or without a header; any other table needs a header."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            is_named = len(header) > 1 and header[0].lower() == "question" and header[-1].lower() == "answer"
            is_mmlu = len(header) == MMLU_COLUMNS and (is_named or SPLIT_NAME.fullmatch(file.stem) is not None)
            for cells in chain([header] if is_mmlu and not is_named else [], reader):
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"decontaminate {file} line {reader.line_num}: {len(cells)} columns, the first line has "
                        f"{len(header)}; correct the line"
                    )
                if cells and is_mmlu:
                    yield {"question": cells[0], "choices": cells[1:5], "answer": cells[5]}
                elif cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"decontaminate {file} line {reader.line_num}: not valid CSV: {error}") from None
