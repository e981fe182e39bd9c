"""Checkpoints of our own: each rank's slices of fp32 weights and moments, in safetensors and JSON.

    <run out>/checkpoints/step-00000500/
        rank-00000-of-00002.safetensors   "<parameter>|fp32", and by sft.moments "|exp_avg" …: 1-D slices of this rank;
                                          "|ema" where an average is kept; "|constant": of frozen parameters and
                                          buffers; the header's `slices`: where each begins in the flattened parameter
        meta.json                         step, shapes, identities to compare on resume; size and digest of every file
        COMPLETE                          written last: size and digest of meta.json; without it this is no checkpoint

Until all of them are on the disk the folder is called step-00000500.partial, and one that is being deleted .deleted:
what is killed on the way leaves no folder with a checkpoint's name, and the next save clears it up. Learning rate, data
order and seeds follow from the step, so they are not stored. Slices carry global offsets, so any number of ranks can
read what another number wrote. docs/checkpoints.md says why DeepSpeed's own checkpoints are not used.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from sft.errors import UserError
from sft.folders import sync_folder
from sft.zero_state import STATES, Held

FORMAT_VERSION = 2
CONSTANT = "constant"
CHUNK_BYTES = 2**24
"""Hashed and written at a time."""
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes (https://github.com/huggingface/safetensors#format)."""


@dataclass(frozen=True)
class Piece:
    """A 1-D run of a flattened tensor on its way to a file."""

    name: str
    state: str
    """A key of sft.zero_state.state_tensors, or CONSTANT."""
    start: int
    tensor: Held
    """On any device; it is brought to the host chunk by chunk."""


# Writing


def write_pieces(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """One safetensors file, streamed to the disk; returns its entry for meta.json: bytes and xxh3_128.

    The library's own writer would hold a second copy of everything, and the digest would cost a second pass.
    """
    # readers view the bytes in place: every tensor must begin at a multiple of its element size
    pieces = sorted(pieces, key=lambda piece: -piece.tensor.element_size())
    header: dict[str, Any] = {
        "__metadata__": {"slices": json.dumps({p.name: (p.start, p.tensor.numel()) for p in pieces})}
    }
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        header[f"{piece.name}|{piece.state}"] = {
            "dtype": DTYPE_NAMES[piece.tensor.dtype],
            "shape": [piece.tensor.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for part in _file_parts(text, pieces):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def publish(folder: Path, step: int, meta: dict[str, Any]) -> Path:
    """Turn step-….partial, in which all rank files are on the disk, into a checkpoint; returns its folder.

    Whatever had the name of this step before (it was not complete, or was set aside) goes when the new one is there.
    """
    partial, final = partial_folder(folder, step), step_folder(folder, step)
    entry = write_json(partial / "meta.json", {"format_version": FORMAT_VERSION, "step": step, **meta})
    write_json(partial / "COMPLETE", {"meta.json": entry})
    sync_folder(partial)
    replaced = final.with_name(final.name + ".replaced")
    _remove(replaced)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(folder)
    _remove(replaced)
    return final


def delete(checkpoint: Path) -> None:
    """Remove a checkpoint; the name goes first, so that a half-deleted folder never looks like one."""
    doomed = checkpoint.with_name(checkpoint.name + ".deleted")
    _remove(doomed)
    os.replace(checkpoint, doomed)
    sync_folder(checkpoint.parent)
    _remove(doomed)


def make_room(folder: Path) -> None:
    """Make the folder of checkpoints, without what killed saves and deletions have left."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder)


def clear_abandoned(folder: Path) -> None:
    """Remove what saves and deletions that were killed have left."""
    for suffix in (".partial", ".replaced", ".deleted"):
        for abandoned in folder.glob(f"step-*{suffix}"):
            _remove(abandoned)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one again; returns its new place."""
    damaged = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    os.replace(checkpoint, damaged)
    sync_folder(checkpoint.parent)
    return damaged


# Finding


def newest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next((checkpoint for checkpoint in reversed(list_checkpoints(folder)) if is_complete(checkpoint)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there, meta.json is as it was written, and every file that it lists has its size.

    The contents of those are compared by `damage`.
    """
    try:
        marker = json.loads((checkpoint / "COMPLETE").read_text())
        text = (checkpoint / "meta.json").read_bytes()
        if marker["meta.json"] != _entry(text):
            return False
        files = json.loads(text)["files"]
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digests(checkpoint: Path) -> dict[str, str]:
    """What was written to each file of a complete checkpoint, by name: xxh3_128.

    Raises:
        UserError: it is not complete.
    """
    files = {**read_meta(checkpoint)["files"], **json.loads((checkpoint / "COMPLETE").read_text())}
    return {name: files[name]["xxh3_128"] for name in sorted(files)}


def damage(checkpoint: Path, written: Mapping[str, str]) -> list[str]:
    """Which of these files, by name and digest, do not hold what was written, a line each."""
    lines = []
    for name, digest in written.items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            lines.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found != digest:
            lines.append(f"{name} has digest {found}, written was {digest}")
    return lines


def check_undamaged(checkpoint: Path) -> None:
    """Compare every digest, by one process.

    Raises:
        UserError: a file does not hold what was written.
    """
    if lines := damage(checkpoint, digests(checkpoint)):
        raise UserError(f"checkpoint {checkpoint}: {lines[0]}; it is damaged, use another")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, complete or not; a copy under another name is none."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def list_torn(folder: Path) -> list[Path]:
    """Checkpoint folders that are not complete."""
    return [checkpoint for checkpoint in list_checkpoints(folder) if not is_complete(checkpoint)]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps after which it was written; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def partial_folder(folder: Path, step: int) -> Path:
    """Where it is written."""
    return folder / f"step-{step:08d}.partial"


def rank_file(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a complete checkpoint.

    Raises:
        UserError: the checkpoint is not complete, or of another format version.
    """
    if not is_complete(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint}: not complete (no COMPLETE marker, or meta.json or a file's size is not what "
            "was written); use another"
        )
    meta = json.loads((checkpoint / "meta.json").read_text())
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {checkpoint}: has format {meta.get('format_version')}, and this version reads "
            f"{FORMAT_VERSION}; go on with the version that wrote it, or choose another --out"
        )
    return meta


# Comparing


def check_identity(checkpoint: Path, meta: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to resume another run's checkpoint.

    Raises:
        UserError: names every value that differs.
    """
    saved = meta["identity"]
    differing = [key for key in identity if saved.get(key) != identity[key]]
    if differing:
        changes = "; ".join(f"{key}: was {saved.get(key)}, now {identity[key]}" for key in differing)
        raise UserError(
            f"checkpoint {checkpoint} belongs to another run ({changes}); choose another --out, or restore the setting"
        )


def check_shapes(checkpoint: Path, saved: dict[str, list[int]], current: dict[str, list[int]]) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UserError: names the first parameter that differs.
    """
    if wrong := [name for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)]:
        name = wrong[0]
        there_and_here = f"{saved.get(name)} there, {current.get(name)} here"
        raise UserError(
            f"checkpoint {checkpoint}: is of another model: shape of {name} is {there_and_here}; choose another --out"
        )


# Reading


class Pieces:
    """Random access to flattened tensors across the rank files of a complete checkpoint, memory-mapped.

    Files are opened when they are needed, the nearest ones first: a rank that goes on with the number of ranks that
    wrote needs one, and not the thousand.
    """

    def __init__(self, checkpoint: Path, files: Sequence[str] | None = None, position: float = 0.0) -> None:
        """`files`: names in meta.json, read from there if left out; `position`: of this rank among all, in [0, 1)."""
        names = list(read_meta(checkpoint)["files"]) if files is None else sorted(files)
        self._checkpoint = checkpoint
        self._unopened = sorted(names, key=lambda name: abs(names.index(name) / len(names) - position), reverse=True)
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        self._keys: set[str] = set()

    def read(self, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened tensor `name`, on the CPU, in the dtype that was saved.

        Raises:
            UserError: the files do not hold all of them.
        """
        while (found := self._find(name, start, numel)) is None and self._unopened:
            self._open(self._unopened.pop())
        if found is None:
            raise UserError(
                f"checkpoint {self._checkpoint}: does not hold elements {start} to {start + numel} of {name}|{state}; "
                "it is damaged"
            )
        parts = [file.get_slice(f"{name}|{state}")[low:high] for low, high, file in found]
        return torch.cat(parts) if parts else torch.empty(0)

    def _find(self, name: str, start: int, numel: int) -> list[tuple[int, int, Any]] | None:
        """The runs of pieces that make up these elements, in order; None where the opened files lack some."""
        runs = []
        expected = start
        for piece_start, piece_numel, file in sorted(self._where.get(name, []), key=lambda piece: piece[0]):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high and low == expected:
                runs.append((low - piece_start, high - piece_start, file))
                expected = high
        return runs if expected == start + numel else None

    def _open(self, file_name: str) -> None:
        file: Any = safe_open(self._checkpoint / file_name, framework="pt")
        self._keys |= set(file.keys())
        for name, (start, numel) in json.loads(file.metadata()["slices"]).items():
            self._where.setdefault(name, []).append((start, numel, file))

    def _open_all(self) -> None:
        while self._unopened:
            self._open(self._unopened.pop())

    def holds(self, state: str) -> bool:
        """Whether anything was saved of one of STATES or of EMA."""
        self._open_all()
        return any(key.endswith(f"|{state}") for key in self._keys)

    def weights(self, name: str, shape: Sequence[int], state: str = STATES[0]) -> torch.Tensor:
        """A whole parameter (its weights, or `state` EMA, fp32 where it was trained) or buffer."""
        self._open_all()
        state = CONSTANT if f"{name}|{CONSTANT}" in self._keys else state
        return self.read(name, state, 0, math.prod(shape)).reshape(tuple(shape))


# Bytes


def _file_parts(header: bytes, pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        for part in piece.tensor.split(CHUNK_BYTES // piece.tensor.element_size()):
            yield part.cpu().view(torch.uint8).numpy().data


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write and sync; returns the entry of the file: bytes and xxh3_128."""
    text = (json.dumps(value, indent=1) + "\n").encode()
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return _entry(text)


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


def _remove(folder: Path) -> None:
    """Remove a folder if it is there; another thread may be at it, too.

    Raises:
        OSError: it cannot be removed.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)  # says why
