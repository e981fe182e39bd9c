"""Which files a source names, and their bytes: kinds, folders, decompression, and one line for each way this fails."""

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sft.errors import UserError

Kind = Literal["array", "lines", "parquet", "arrow"]
_KINDS: dict[str, Kind] = {".json": "array", ".jsonl": "lines", ".parquet": "parquet", ".arrow": "arrow"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_KINDS_TEXT = ".json, .jsonl, each also .gz or .zst, or .parquet"
_CHUNK_BYTES = 2**20


def source_files(path: str) -> list[Path]:
    """The files of a source, in the order in which their rows count.

    `path` is a file; a folder, of which all files of known kinds are meant, sorted, except those below a name that
    begins with "." or "_" (links to folders are followed); a folder that `datasets` saved, with the data files in
    their own order; or a glob (** goes into folders).

    Raises:
        UserError: nothing there, no file of a known kind, a link to no file, several splits, or a folder that cannot
            be read.
    """
    with file_errors(path):
        if os.path.isdir(path):
            return _folder_files(Path(path))
        if os.path.lexists(path) or not glob.has_magic(path):
            is_file = stat.S_ISREG(os.stat(path).st_mode)
            kind_of(Path(path))
            if not is_file:
                raise UserError(f"source {path}: is no regular file; write it to one first")
            return [Path(path)]
        files = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(name)]
        if not files:
            raise UserError(f"source {path}: matches no file; check sources[].path")
        return _of_known_kinds(path, files)


def check_apart(path: str, out: Path) -> None:
    """Refuse an output (its real path) where the next run would take it for input.

    Raises:
        UserError: `out` lies in the source folder `path`, or below the ** of a glob.
    """
    folder = os.path.realpath(path.partition("**")[0] or ".") if "**" in path else os.path.realpath(path)
    inside = os.path.isdir(folder) and out.is_relative_to(folder)
    if inside and not any(part.startswith((".", "_")) for part in out.relative_to(folder).parts):
        raise UserError(f"out {out}: lies in source {path}, which would read it next time; choose another folder")


def kind_of(path: Path) -> Kind:
    """How the rows of a file are written, by its name.

    Raises:
        UserError: the name has none of the known endings.
    """
    kind = _kind_or_none(path)
    if kind is None:
        raise UserError(f"source {path}: not a {_KINDS_TEXT} file; convert it, or rename it if it is one")
    return kind


def file_digest(path: str | Path) -> str:
    """sha256 of the bytes of a file, as they are on disk.

    Raises:
        UserError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    with file_errors(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Turn what the system says about a file into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"source {path}: no such file; check sources[].path") from None
    except IsADirectoryError:
        raise UserError(f"source {path}: is a folder; give the file") from None
    except OSError as error:
        name = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"source {path}: cannot be read: {reason}{name}; check the path and its permissions") from None


class TextFile:
    """The decompressed bytes of a .json or .jsonl file, without a byte order mark."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._codec = _CODECS.get(path.suffix.lower())
        self._is_start = True
        self._told = 0
        with ExitStack() as stack:
            self._file = stack.enter_context(open(path, "rb"))
            self._stream: Any = self._file
            if self._codec:
                self._stream = stack.enter_context(pa.CompressedInputStream(self._file, self._codec))
            self._stack = stack.pop_all()

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes (a few more at first); fewer only at the end of the file, then none.

        Raises:
            UserError: the compressed data is damaged or ends early, or the text is UTF-16.
        """
        if not self._is_start:
            return self._read_fully(size)
        self._is_start = False
        text = self._read_fully(size + 3)
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"source {self._path}: is UTF-16; save it as UTF-8")
        return text.removeprefix(b"\xef\xbb\xbf")

    def newly_used_bytes(self) -> int:
        """Bytes on disk that were read since the last call."""
        before, self._told = self._told, self._file.tell()
        return self._told - before

    def _read_fully(self, size: int) -> bytes:
        parts = []
        try:
            while size and (part := self._stream.read(size)):
                parts.append(part)
                size -= len(part)
        except OSError as error:
            if error.errno is not None:  # the disk's own, not the decompressor's
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"source {self._path}: not a whole {self._codec} file: {reason}; copy or compress it again"
            ) from None
        return b"".join(parts)


def _kind_or_none(path: Path) -> Kind | None:
    name = path.name.lower()
    stem, ending = os.path.splitext(name)
    if ending not in _CODECS:
        return _KINDS.get(ending)
    kind = _KINDS.get(os.path.splitext(stem)[1])
    return kind if kind in ("array", "lines") else None


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json"))) or "none found"
        raise UserError(f"source {folder}: holds several splits ({splits}); give the folder of one of them")
    if (folder / "state.json").is_file():
        return _saved_dataset_files(folder)
    return _of_known_kinds(folder, sorted(_walk(folder)))


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Everything below a folder that is no folder; links to folders are followed, unless they lead back up."""
    here = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            if not entry.is_dir():
                yield Path(entry.path)
            elif os.path.realpath(entry.path) not in here:
                yield from _walk(Path(entry.path), here)


def _of_known_kinds(source: str | Path, files: list[Path]) -> list[Path]:
    known = [path for path in files if _kind_or_none(path)]
    if not known:
        raise UserError(f"source {source}: no file in it is {_KINDS_TEXT}; check sources[].path")
    for path in known:
        if not path.is_file():
            problem = "is no regular file; move it away" if path.exists() else "is a link to no file; mend it"
            raise UserError(f"source {source}: {path} {problem}")
        if _kind_or_none(path) == "arrow":
            raise UserError(f"source {source}: {path} belongs to a `datasets` folder; make that a source of its own")
    return known


def _saved_dataset_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    try:
        described = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in described["_data_files"]]
        is_plain = all(isinstance(name, str) and name == Path(name).name for name in names)
        has_indices = bool(described.get("_indices_data_files"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"source {state}: does not list the data files of a `datasets` folder; save it again") from None
    if has_indices or not is_plain or not names:
        problem = "selects rows by an index" if has_indices else "names no data files in this folder"
        raise UserError(f"source {state}: {problem}; save it again with a newer `datasets`")
    files = [folder / name for name in names]
    for path in files:
        if not path.is_file():
            raise UserError(f"source {folder}: {path.name} is missing, which state.json names; copy the whole folder")
    return files
