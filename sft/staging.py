"""Folders copied to a host's own disk, once per host: what of them is copied, under which name, and when it counts.

    <to>/model-<key>/                  the files, and staged.json, written last: source, size, time, sha256 of each file
    <to>/model-<key>.partial-<host>/   on its way, or left by a process that was killed: the next one removes it
    <to>/sft-stage.lock                held by the process at work

Some shared file systems lock within a host only: so no host touches what another one has on its way there, until
nothing has changed in it for an hour.

The key is a digest of the source, so a source that has changed gets another folder. A shard folder's is the sha256 of
its manifest, which holds those of the shards. A model folder has no manifest, and reading it whole for its name would
take as long as copying it: its key is over name, size and time of every file, the content of small files and samples
of large ones.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.shards import MANIFEST, read_manifest
from sft.errors import UserError
from sft.folders import sync_folder
from sft.progress import track
from sft.weight_files import num_parameters, weight_files

RECORD = "staged.json"
LOCK = "sft-stage.lock"
STAGED = re.compile(r"(model|train|heldout)-[0-9a-f]{16}")
PARTIAL = ".partial-"
ABANDONED_S = 3600.0
"""A container of another name may have left it on this host's disk: reading back one file is the longest pause."""
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "tokenizer*")
"""What transformers may read of a model folder besides weights: config, generation config, tokenizer, templates."""
SMALL_BYTES = 2**25
SAMPLES = 16
SAMPLE_BYTES = 2**16
CHUNK_BYTES = 2**24
"""Hashed and written at a time."""
THREADS = 4
"""Files copied at the same time: one core hashes about as fast as one disk of a few years ago reads."""
LOOK_S = 0.2
GIB = 2**30


@dataclass(frozen=True)
class Source:
    """A folder to be staged."""

    option: str
    """What named it: model.path."""
    folder: Path
    name: str
    """Of its copy: model-<key>."""
    files: Mapping[str, tuple[int, int]]
    """Size in bytes and time of the last change in ns, by name, when the key was made."""
    digests: Mapping[str, str]
    """sha256 that a file must have, for those of which the source says it."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


def model_source(folder: Path) -> Source:
    """What training reads of a model folder; not optimizer states, pickles or the same weights in other files.

    Raises:
        UserError: it is none, or its weights are not whole.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path {folder}: holds no config.json; give a local folder with config and safetensors")
    num_parameters(folder)
    names = {_plain("model.path", folder, os.path.relpath(path, folder)) for path in weight_files(folder)}
    names |= {path.name for path in folder.iterdir() if _is_beside_weights(path)}
    files = {name: _size_and_time(folder / name) for name in sorted(names)}
    parts = [[name, *files[name], _fingerprint(folder / name)] for name in files]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return Source("model.path", folder, f"model-{key}", files, {})


def shard_source(option: str, folder: Path) -> Source:
    """A shard folder, for `option` data.train or data.heldout.

    Raises:
        UserError: it is none, or a shard is missing or cut short.
    """
    entries = {_plain(option, folder, entry["file"]): entry for entry in read_manifest(folder)["shards"]}
    for name, entry in entries.items():
        if not (folder / name).is_file() or _size_and_time(folder / name)[0] != entry["bytes"]:
            raise UserError(
                f"{option} {folder / name}: is missing or has not the {entry['bytes']} bytes that the manifest says; "
                "copy it again or prepare again"
            )
    key = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    digests = {name: entry["sha256"] for name, entry in entries.items()}
    names = {*digests, *(path.name for path in folder.glob("*.json") if path.name != RECORD)}
    files = {name: _size_and_time(folder / name) for name in sorted(names)}
    return Source(option, folder, f"{option.removeprefix('data.')}-{key[:16]}", files, {**digests, MANIFEST: key})


def stage(sources: Sequence[Source], to: Path, say: Callable[[str], None]) -> list[Path]:
    """Folders below `to` that hold equal copies of `sources`, in their order; made here, or found.

    Processes of a host that call this together wait for the first one. A copy that is found is checked by names,
    sizes and times of all files and the sha256 of those up to 32 MiB; one that fails is made again.

    Args:
        say: shows one line to the user.

    Raises:
        UserError: `to` is not usable, has no room, or is another user's; a source is damaged or changes meanwhile;
            the disk does not give back what was written.
    """
    _check_place(sources, to)
    to.mkdir(parents=True, exist_ok=True)
    with _locked(to, say):
        _remove_left(to)
        missing = [source for source in sources if not _is_there(source, to, say)]
        _check_room(missing, to)
        for source in missing:
            _copy(source, to, say)
        wanted = {source.name for source in sources}
        others = sorted(path.name for path in to.iterdir() if STAGED.fullmatch(path.name) and path.name not in wanted)
        if missing and others:
            say(f"{to} also holds {', '.join(others)}: remove what no run reads any more; sft never does")
    return [to / source.name for source in sources]


# Sources


def _is_beside_weights(path: Path) -> bool:
    return path.name != RECORD and path.is_file() and any(fnmatch(path.name, kind) for kind in BESIDE_WEIGHTS)


def _plain(option: str, folder: Path, name: str) -> str:
    if "/" in name or name in ("", ".", ".."):
        raise UserError(
            f"{option} {folder}: names the file {name!r}, which is not directly in it; copy the folder again"
        )
    return name


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _fingerprint(path: Path) -> str:
    """sha256 of a small file; of a large one, that of pieces spread evenly from its first to its last byte."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SMALL_BYTES:
            digest.update(file.read())
        else:
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


# The place


def _check_place(sources: Sequence[Source], to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to}: is a file; choose a folder on this host's own disk")
    for source in sources:
        folder = source.folder.resolve()
        if folder == to.resolve() or folder in to.resolve().parents:
            raise UserError(
                f"--to {to}: lies in {source.option} {source.folder}; choose a folder on this host's own disk"
            )


@contextmanager
def _locked(to: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `to`, which ends with this process at the latest."""
    path = to / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except PermissionError:
        if not path.exists():
            raise
        raise _another_users(path, to) from None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise _another_users(path, to)
        _wait_for_lock(descriptor, to, say)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, to: Path, say: Callable[[str], None]) -> None:
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                said = True
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                say(f"waiting for {owner}, which is staging to {to}")
            time.sleep(LOOK_S)
        except OSError as error:
            reason = f"its file system has no locks ({error.strerror})"
            raise UserError(f"--to {to}: {reason}; choose a folder on this host's own disk") from None
        else:
            return


def _another_users(path: Path, to: Path) -> UserError:
    try:
        owner = path.owner()
    except KeyError:
        owner = str(path.stat().st_uid)
    return UserError(
        f"--to {to}: {path.name} in it belongs to user {owner}; choose a folder of your own, as {to}/$USER"
    )


def _check_room(missing: Sequence[Source], to: Path) -> None:
    need, free = sum(source.num_bytes for source in missing), shutil.disk_usage(to).free
    if need > free:
        what = ", ".join(source.option for source in missing)
        raise UserError(
            f"--to {to}: {what} need {need / GIB:,.2f} GiB there, but {free / GIB:,.2f} GiB are free; remove "
            "older copies or choose another folder"
        )


# Copies


def _remove_left(to: Path) -> None:
    """Of processes that were killed: this host's at once, as this process has the lock."""
    for left in to.glob(f"*{PARTIAL}*"):
        name, _, host = left.name.partition(PARTIAL)
        is_own = host == os.uname().nodename
        if STAGED.fullmatch(name) and (is_own or time.time() - _last_change_s(left) > ABANDONED_S):
            shutil.rmtree(left, ignore_errors=not is_own)  # a third host may be at it, too


def _last_change_s(folder: Path) -> float:
    """By the change time, which a copied file has not from its source. Now, where it is just being removed."""
    try:
        return max(path.stat().st_ctime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return time.time()


def _is_there(source: Source, to: Path, say: Callable[[str], None]) -> bool:
    """Whether the copy exists; a damaged one is removed."""
    target = to / source.name
    if not target.exists():
        return False
    if target.stat().st_uid != os.geteuid():
        raise _another_users(target, to)
    problem = _find_problem(source, target)
    if problem is None:
        say(f"{source.option}: {target} is complete")
        return True
    say(f"{source.option}: {target}: {problem}; copied again")
    doomed = _partial(target)
    os.replace(target, doomed)
    shutil.rmtree(doomed)
    return False


def _find_problem(source: Source, target: Path) -> str | None:
    try:
        entries = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
        if entries.keys() != source.files.keys():
            return f"{RECORD} is of other files"
        for name, entry in entries.items():
            if not (target / name).is_file():
                return f"{name} is gone"
            if _size_and_time(target / name) != (entry["bytes"], entry["mtime_ns"]):
                return f"{name} has changed since"
            if entry["bytes"] <= SMALL_BYTES and _sha256(target / name) != entry["sha256"]:
                return f"{name} has another sha256 now"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be checked ({error!r})"
    return None


def _copy(source: Source, to: Path, say: Callable[[str], None]) -> None:
    """Copy beside the final name, check, and rename: until then, nothing that is killed here looks complete."""
    target, began_s = to / source.name, time.monotonic()
    partial = _partial(target)
    say(f"{source.option}: copying {source.num_bytes / GIB:,.2f} GiB from {source.folder} to {target}")
    try:
        partial.mkdir()
        entries = _copy_files(source, partial)
        for name, before in source.files.items():
            if _size_and_time(source.folder / name) != before:
                raise UserError(f"{source.option} {source.folder / name}: changed meanwhile; stage it when it is final")
        record = {"source": str(source.folder.absolute()), "host": os.uname().nodename, "files": entries}
        with (partial / RECORD).open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        try:
            os.replace(partial, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or _find_problem(source, target) is not None:
                raise
            say(f"{source.option}: {target} is complete: another host was faster")
            return
        sync_folder(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    took_s = time.monotonic() - began_s
    say(f"{source.option}: {target} is complete: {len(entries)} files in {took_s:.1f} s, read back and equal")


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}{PARTIAL}{os.uname().nodename}")


def _copy_files(source: Source, partial: Path) -> dict[str, dict[str, Any]]:
    """Size, time and sha256 of every file of the copy."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(THREADS)
    names = sorted(source.files, key=lambda name: -source.files[name][0])
    try:
        futures = {pool.submit(_copy_file, source, name, partial / name, stop): name for name in names}
        finished = as_completed(futures)
        entries = {}
        for _ in track(names, f"stage {source.option}", visible=True):
            future = next(finished)
            entries[futures[future]] = future.result()
        return {name: entries[name] for name in source.files}
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _copy_file(source: Source, name: str, target: Path, stop: threading.Event) -> dict[str, Any]:
    """Copy one file's content and time, then read it back.

    The kernel is asked to forget the written pages first, so that a disk's bytes are compared and not those of the
    memory that they came from; a file system in memory has no others.
    """
    origin = source.folder / name
    digest = hashlib.sha256()
    with origin.open("rb") as reader, target.open("xb") as writer:
        for chunk in _chunks(reader, stop):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        status = os.fstat(reader.fileno())
        os.utime(writer.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        os.fsync(writer.fileno())
        os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    sha256 = digest.hexdigest()
    if source.digests.get(name, sha256) != sha256:
        raise UserError(f"{source.option} {origin}: its sha256 is not the manifest's; copy it again or prepare again")
    if _sha256(target, stop) != sha256:
        raise UserError(
            f"--to {target}: reads back different from what was written; disk or memory of {os.uname().nodename} is "
            "faulty: stage to another disk, and have it looked at"
        )
    size, time_ns = _size_and_time(target)
    return {"bytes": size, "mtime_ns": time_ns, "sha256": sha256}


def _sha256(path: Path, stop: threading.Event | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file, stop or threading.Event()):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: BinaryIO, stop: threading.Event) -> Iterator[bytes]:
    while not stop.is_set() and (chunk := file.read(CHUNK_BYTES)):
        yield chunk
