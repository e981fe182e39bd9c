"""Which files under a folder are a benchmark's, which of them belong together, and which copy is read.

MMLU: <subject>/{dev,test}*.{parquet,jsonl} (the hub's cais/mmlu, also its folder `all`) and
{dev,test}/<subject>_{dev,test}.csv (Hendrycks' tree). HellaSwag: {train,validation}*.{parquet,jsonl} (the hub's
Rowan/hellaswag) and hellaswag_{train,val}.jsonl (Zellers' files).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.errors import UserError
from sft.eval.tasks.files import SUFFIXES, peek_fields

SPLIT_NAME = re.compile(
    r"(?:(?P<subject>.+)_)?(?P<split>dev|test|validation|val|train)(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?"
)


@dataclass(frozen=True)
class SplitFile:
    """One table of a split, or one shard of it."""

    path: Path
    root: Path
    """Folder of the whole data set: files with the same root and suffix belong together."""
    subject: str
    """What the file's name or folder says; "" for a benchmark without subjects."""
    split: str
    table: tuple[Path, str, int]
    """Folder, name without the shard's number, number of shards: equal for the shards of one table."""
    shard: int
    is_empty: bool
    """Without rows nothing tells what it is a table of: it counts as its neighbours' benchmark."""


def find_split_files(data: Path, fields: set[str], splits: Collection[str], by_subject: bool) -> list[SplitFile]:
    """All tables below `data` that are named after one of the splits and whose rows, if any, have the fields, by path.

    Raises:
        UserError: the folder or a file cannot be read.
    """
    found = []
    for path, match in _named_like_splits(data):
        split = "validation" if match["split"] == "val" else match["split"]
        if split not in splits:
            continue
        present = peek_fields(path)
        if present is not None and not present >= fields:
            continue
        root, subject = path.parent, ""
        if by_subject and match["subject"]:
            root, subject = root.parent if root.name == match["split"] else root, match["subject"]
        elif by_subject:
            root, subject = root.parent, root.name
        stem = path.stem.partition(f"-{match['shard']}-of-")[0]
        table = (path.parent, stem + path.suffix, int(match["shards"] or 0))
        found.append(SplitFile(path, root, subject, split, table, int(match["shard"] or 0), present is None))
    return found


def choose_copy(files: Sequence[SplitFile], needed: str, name: str, data: Path) -> tuple[list[SplitFile], str]:
    """One copy of the data set, hub formats before CSV, then the first by path; and a line that says which.

    Raises:
        UserError: no copy has the needed split.
    """
    groups: dict[tuple[int, Path], list[SplitFile]] = defaultdict(list)
    for file in files:
        groups[SUFFIXES.index(file.path.suffix), file.root].append(file)
    usable = sorted(
        key
        for key, group in groups.items()
        if any(file.split == needed for file in group) and not all(file.is_empty for file in group)
    )
    if not usable:
        raise UserError(
            f"--data {data}: holds no {name} {needed} split; expected the layout of the Hugging Face hub "
            "or of the original release, see docs/evaluation-data.md"
        )
    first, *others = [f"{root} ({SUFFIXES[suffix][1:]})" for suffix, root in usable]
    ignored = f", not from {', '.join(others)}" if others else ""
    return groups[usable[0]], f"{name} from {first}{ignored}"


def join_shards(files: Iterable[SplitFile]) -> dict[tuple[str, str], list[Path]]:
    """The paths of each (subject, split) in the order of their rows.

    Raises:
        UserError: shards are missing, or there are two tables for one split.
    """
    groups: dict[tuple[str, str], list[SplitFile]] = defaultdict(list)
    for file in files:
        groups[file.subject, file.split].append(file)
    for group in groups.values():
        group.sort(key=lambda file: (file.table, file.shard))
        first, last = group[0], group[-1]
        if first.table != last.table:
            raise UserError(
                f"{first.path} and {last.path}: two tables for one split, its items would count twice; remove one"
            )
        shards, needed = [file.shard for file in group], list(range(max(first.table[2], 1)))
        if shards != needed:
            raise UserError(
                f"{first.path}: rows of shards {', '.join(map(str, shards))} were found, need those of "
                f"0 to {len(needed) - 1}; complete the download"
            )
    return {key: [file.path for file in group] for key, group in groups.items()}


def _named_like_splits(data: Path) -> list[tuple[Path, re.Match[str]]]:
    """Files whose name ends in a split's name."""
    try:
        if not data.is_dir():
            raise UserError(f"--data {data}: no such folder; give the folder that holds MMLU and HellaSwag")
        files = sorted(data.resolve().rglob("*"))  # resolved: `.` has no name that could tell a subject
    except OSError as error:
        raise UserError(
            f"--data {data}: cannot be read: {error.strerror or error}; give the folder that holds MMLU and HellaSwag"
        ) from None
    found = []
    for path in files:
        match = SPLIT_NAME.fullmatch(path.stem)
        is_auxiliary = path.parent.name == "auxiliary_train"  # its mc_test.csv is no test split
        if match and path.suffix in SUFFIXES and path.is_file() and not is_auxiliary:
            found.append((path, match))
    return found
