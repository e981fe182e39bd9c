"""Finished blocks on disk while a job runs: memory stays flat, and a killed job goes on where it was.

`<out>.work/` holds the content key of the job, `tokens.bin` (the ids of all documents, int32, end to end) and one file
per finished block with everything else. Blocks are written in order; a block counts once its file has its name, and
the digests in it are those of its tokens and of itself. The folder is locked while a job works in it and removed when
it is done.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from data_prep.blocks import Block, Overlap
from data_prep.documents import Encoded
from data_prep.workers import WorkerLost
from sft.errors import UserError

OWN_NAMES = {"lock", "key", "tokens.bin", "blocks", "new"}
WAIT_S = 3.0
"""For a lock: workers notice that their job was killed when they have finished a block."""
NO_IDS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class FileIds:
    """The ids of a file, read piece by piece: a mapping would count as this process's memory, and a pack's documents
    stand anywhere in it."""

    descriptor: int

    def __getitem__(self, piece: slice) -> NDArray[np.int32]:
        size = 4 * (piece.stop - piece.start)
        found = os.pread(self.descriptor, size, 4 * piece.start)
        if len(found) != size:
            raise OSError(errno.EIO, "tokens.bin in the work folder was cut short while the job ran")
        return np.frombuffer(found, dtype="<i4")


@dataclass(frozen=True, eq=False)
class Spill:
    """The work folder of a running job."""

    folder: Path
    tokens: BinaryIO

    def finished(self) -> Iterator[Block]:
        """The blocks that an earlier run has left behind, in order and without ids; anything torn is cut off."""
        end = 0
        for number in range(len(os.listdir(self.folder / "blocks"))):
            loaded = _load_block(self._block_file(number))
            if loaded is None:
                break
            block, num_tokens, digest = loaded
            self.tokens.seek(end)
            if xxhash.xxh3_64_hexdigest(self.tokens.read(4 * num_tokens)) != digest:
                break
            end += 4 * num_tokens
            yield block
        self.tokens.truncate(end)
        self.tokens.seek(end)

    def add(self, number: int, block: Block) -> Block:
        """Write block `number`, and return it without its ids."""
        ids = np.ascontiguousarray(block.encoded.ids)
        self.tokens.write(ids.data)
        self.tokens.flush()
        file = self._block_file(number)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(_block_bytes(block, len(ids), xxhash.xxh3_64_hexdigest(ids.data)))
        temporary.replace(file)
        return without_ids(block)

    def ids(self) -> "FileIds":
        """All ids so far."""
        return FileIds(self.tokens.fileno())

    def new_output(self) -> Path:
        """An empty folder in which to build the output."""
        folder = self.folder / "new"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _block_file(self, number: int) -> Path:
        return self.folder / "blocks" / f"{number:08d}.safetensors"


@contextmanager
def work_folder(out: Path, key: str) -> Iterator[Spill]:
    """The locked work folder of the job `key` that writes `out`; removed when the body succeeds.

    Raises:
        UserError: another process works on the same output, or something else has the folder's name.
        OSError: the folder cannot be made or written.
    """
    folder = _work_path(out)
    _check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, out):
        recorded = folder / "key"
        if not recorded.is_file() or recorded.read_text(encoding="ascii", errors="replace") != key:
            for name in ("key", "tokens.bin"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "blocks", ignore_errors=True)
            (folder / "blocks").mkdir()
            (folder / "tokens.bin").touch()
            recorded.write_text(key, encoding="ascii")
        try:
            with open(folder / "tokens.bin", "r+b") as tokens:
                yield Spill(folder, tokens)
        except UserError as error:
            if not isinstance(error, WorkerLost):
                shutil.rmtree(folder)  # other input or options are another job, which could not use these blocks
            raise
        shutil.rmtree(folder)


def remove_leftover(out: Path) -> None:
    """Remove the work folder of a job that was killed after its output had its name.

    Raises:
        OSError: the folder cannot be removed.
    """
    folder = _work_path(out)
    if folder.is_dir():
        with suppress(UserError):  # not ours; or another process holds it, and that one removes it
            _check_own(folder)
            with _locked(folder, out):
                shutil.rmtree(folder)


def without_ids(block: Block) -> Block:
    """The block as it is kept in memory."""
    return replace(block, encoded=replace(block.encoded, ids=NO_IDS))


def _work_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def _check_own(folder: Path) -> None:
    """Refuse to work in, and in the end to remove, what sft prep has not made. Of a removal that was cut short any
    part may be left."""
    names = os.listdir(folder) if folder.is_dir() else [folder.name] if os.path.lexists(folder) else []
    if names and OWN_NAMES.isdisjoint(names):
        raise UserError(f"out: {folder} is needed for work and is no work folder of sft prep; move it away")


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    with open(folder / "lock", "a+", encoding="utf-8") as lock:
        try:
            _take(lock)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UserError(
                f"out {out}: another sft prep is writing it ({owner}); wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # those three: a network file system without locks; then the user sees to it
        if not (folder / "lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
            raise UserError(f"out {out}: another sft prep finished with it at this moment; run again")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


def _take(lock: TextIO) -> None:
    """Lock a file. The workers of a job that was killed hold its lock until they have ended too, so wait for them.

    Raises:
        BlockingIOError: another process still holds it.
        OSError: the file system cannot lock.
    """
    give_up_s = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(0.05)


def _block_bytes(block: Block, num_tokens: int, digest: str) -> bytes:
    arrays: dict[str, NDArray[Any]] = {
        "rows": block.rows,
        "keys": block.keys,
        "lengths": block.encoded.lengths,
        "num_runs": block.encoded.num_runs,
        "runs": block.encoded.runs,
        "truncated": block.truncated,
    }
    if block.signatures is not None:
        arrays["signatures"] = block.signatures
    rest = {
        "source_id": block.source_id,
        "num_rows": block.num_rows,
        "groups": block.groups,
        "dropped": block.dropped,
        "overlaps": [[overlap.row, overlap.item, overlap.text] for overlap in block.overlaps],
        "num_tokens": num_tokens,
        "digest": digest,
    }
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    text = json.dumps(rest)
    return safetensors.numpy.save(contiguous, metadata={"block": text, "digest": _digest(text, contiguous)})


def _load_block(file: Path) -> tuple[Block, int, str] | None:
    """(block, tokens, digest of its tokens), or None where the file is missing or not as it was written."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            text, digest = tensors.metadata()["block"], tensors.metadata()["digest"]
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
    if _digest(text, arrays) != digest:
        return None
    rest = json.loads(text)
    block = Block(
        source_id=rest["source_id"],
        num_rows=rest["num_rows"],
        rows=arrays["rows"],
        keys=arrays["keys"],
        encoded=Encoded(NO_IDS, arrays["lengths"], arrays["num_runs"], arrays["runs"]),
        truncated=arrays["truncated"],
        signatures=arrays.get("signatures"),
        groups=tuple(rest["groups"]),
        dropped=tuple((row, reason) for row, reason in rest["dropped"]),
        overlaps=tuple(Overlap(*overlap) for overlap in rest["overlaps"]),
    )
    return block, rest["num_tokens"], rest["digest"]


def _digest(text: str, arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return str(digest.hexdigest())
