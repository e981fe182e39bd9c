"""An output that a killed job goes on with: <out>.partial grows, <out>.job says how it is made and what is whole."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sft.errors import UserError

Identity = Mapping[str, str | int | float | list[str]]
"""Everything that the bytes of the output depend on, by the names that messages use."""


@dataclass
class Progress:
    """What has been written so far, counted at the last whole window."""

    rows: int = 0
    """Rows of the input."""
    variants: int = 0
    size_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Variants that were not worth writing, by reason."""


def finished(out: Path, identity: Identity) -> Progress | None:
    """What a finished output holds; None where there is none yet.

    Raises:
        UserError: a file of that name exists, and this command did not make it.
    """
    if not out.exists():
        return None
    job = _read_job(out)
    if job is None or job[1].size_bytes != out.stat().st_size:
        raise UserError(f"--out {out}: exists and is no output of sft augment; give another name")
    if changes := _changes(job[0], identity):
        raise UserError(f"--out {out}: exists, made otherwise: {changes}; give another name")
    return job[1]


@contextmanager
def open_partial(out: Path, identity: Identity) -> Iterator[tuple[BinaryIO, Progress]]:
    """Begin the output, or go on after its last whole window; one process at a time.

    Raises:
        UserError: another process writes it, its partial file was begun with other settings or is damaged.
    """
    partial = _beside(out, ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another sft augment writes it now; wait for it, or give another name"
            ) from None
        if out.exists():
            raise UserError(f"--out {out}: another sft augment has just finished it")
        size_bytes = os.fstat(file.fileno()).st_size
        job = _read_job(out) if size_bytes else None
        progress = job[1] if job else Progress()
        if job and (changes := _changes(job[0], identity)):
            raise UserError(
                f"--out {out}: {partial.name} was begun otherwise: {changes}; delete it, or give another name"
            )
        if size_bytes < progress.size_bytes:
            raise UserError(f"--out {out}: {partial.name} is shorter than it was; delete it to begin again")
        file.truncate(progress.size_bytes)
        file.seek(0, os.SEEK_END)
        yield file, progress


def save_progress(file: BinaryIO, out: Path, identity: Identity, progress: Progress) -> None:
    """Make what was written last: after this, a killed job goes on from here."""
    file.flush()
    os.fsync(file.fileno())
    progress.size_bytes = file.tell()
    temporary = _beside(out, ".job.tmp")
    temporary.write_text(json.dumps({"made_by": identity, **vars(progress)}, indent=1), encoding="utf-8")
    os.replace(temporary, _beside(out, ".job"))


def publish(out: Path) -> None:
    """Give the whole file its final name."""
    os.replace(_beside(out, ".partial"), out)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _read_job(out: Path) -> tuple[Identity, Progress] | None:
    try:
        job = json.loads(_beside(out, ".job").read_bytes())
        made_by = dict(job.pop("made_by"))
        return made_by, Progress(**{**job, "dropped": Counter(job["dropped"])})
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--out {out}: {out.name}.job is not what sft augment wrote; delete it and the output"
        ) from error


def _changes(before: Identity, now: Identity) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
