"""SIGKILL before and after everything that a save does to the disk: there always is a whole checkpoint to go on from.

Each kill is real: a forked process saves beside an older checkpoint and is killed at the n-th call that changes the
disk. Run: pytest tests/unit/test_checkpoint_kills.py
"""

import os
import shutil
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sft import checkpoint
from sft.checkpoint import newest_complete, partial_folder, step_folder
from sft.config import CheckpointSection
from tests import saved

KEEP_ONE = CheckpointSection(keep_last=1, keep_best=False)
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "ftruncate")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the kernel has: fsync is counted and logged here, and costs no time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Boundaries:
    """Counts the calls that change the disk, and kills this process at one of them."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.log: list[tuple[str, str]] = []

    def reach(self, call: str, path: str) -> None:
        if len(self.log) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.log.append((call, path))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Before and after every call of CALLS, and at every write of a file: before, in the middle, after."""
        for name in CALLS:
            patch.setattr(os, name, self._around(name, getattr(os, name)))
        opened = Path.open

        def open_counted(path, mode="r", *args, **options):
            file = opened(path, mode, *args, **options)
            return Written(file, path, self) if "w" in mode else file

        patch.setattr(Path, "open", open_counted)

    def _around(self, name: str, call: Callable) -> Callable:
        def counted(target, *args, **options):
            is_open = isinstance(target, int)
            path = os.readlink(f"/proc/self/fd/{target}") if is_open else _whole_path(target, options.get("dir_fd"))
            self.reach(f"before {name}", path)
            result = call(target, *args, **options)
            self.reach(f"after {name}", str(args[0]) if name in ("replace", "rename") else path)
            return result

        return counted


class Written:
    """A file whose every write reaches the disk in two halves, with boundaries around them."""

    def __init__(self, file, path: Path, boundaries: Boundaries) -> None:
        self._file, self._path, self._boundaries = file, str(path), boundaries
        self.flush, self.fileno, self.tell = file.flush, file.fileno, file.tell

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, content) -> None:
        half = len(content) // 2
        for part in (content[:half], content[half:]):
            self._boundaries.reach("write", self._path)
            self._file.write(part)
            self._file.flush()


def _whole_path(target, dir_fd) -> str:
    return str(target) if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{target}"


def killed_at(n: int | None, save: Callable[[], None]) -> bool:
    """Run `save` in a process that is killed at boundary n; whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                Boundaries(n).install(patch)
                save()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def survived(folder: Path, base: int, new: int) -> int:
    """The step to go on from, which must be whole, and either the one before the save or the new one."""
    newest = newest_complete(folder)
    assert newest is not None, "nothing to go on from"
    step = base if newest == step_folder(folder, base) else new
    saved.assert_holds(newest, step)
    return step


def steps_survived(tmp_path: Path, before: Callable[[Path], None], save: Callable[[Path], None]) -> list[int]:
    """Kill `save` at every boundary, each time on what `before` has made; the step to go on from after each.

    The save that follows, of the step that a resumed run comes to, must succeed and leave itself alone in the folder.
    """
    found = []
    while True:
        folder = tmp_path / f"kill-{len(found)}"
        before(folder)
        was_killed = killed_at(len(found), partial(save, folder))
        step = survived(folder, base=1, new=2)
        following = max(step + 1, 2)
        saved.save_and_prune(folder, following, KEEP_ONE)
        assert [path.name for path in folder.iterdir()] == [f"step-{following:08d}"]
        saved.assert_holds(step_folder(folder, following), following)
        shutil.rmtree(folder)
        if not was_killed:
            return found
        found.append(step)


def one_checkpoint(folder: Path) -> None:
    saved.save(folder, 1)


def next_save(folder: Path) -> None:
    saved.save_and_prune(folder, 2, KEEP_ONE)


def test_every_kill_leaves_a_whole_checkpoint(tmp_path):
    found = steps_survived(tmp_path, one_checkpoint, next_save)
    assert found == sorted(found), "once the new one is there, it stays"
    assert found.count(1) >= 40, "control: there are boundaries before the new one counts"
    assert found.count(2) >= 12, "control: and after it, while the older one is deleted"


def test_every_kill_while_leftovers_are_cleared_and_a_torn_folder_is_replaced(tmp_path):
    def with_leftovers(folder: Path) -> None:
        one_checkpoint(folder)
        (saved.save(folder, 2) / "COMPLETE").unlink()
        for suffix in (".partial", ".replaced", ".deleted"):
            shutil.copytree(step_folder(folder, 1), folder / f"step-00000002{suffix}")

    found = steps_survived(tmp_path, with_leftovers, next_save)
    assert found == sorted(found)
    assert found.count(1) >= 60
    assert found.count(2) >= 12


def test_kills_at_many_bytes_of_a_rank_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.checkpoint.CHUNK_BYTES", 2048)
    found = steps_survived(tmp_path, one_checkpoint, next_save)
    assert found == sorted(found)
    assert found.count(1) >= 80


# Controls: what a save must not do, and that the harness above sees it


def control_deleted_first(folder: Path) -> None:
    checkpoint.delete(step_folder(folder, 1))
    saved.save(folder, 2)


def control_marked_first(folder: Path) -> None:
    """COMPLETE first, and files that have their size before they have their bytes."""
    whole = partial_folder(folder.parent / "elsewhere", 2)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    entries = {name: checkpoint._entry(content) for name, content in contents.items()}
    early = partial_folder(folder, 2)
    early.mkdir()
    for name, content in contents.items():
        (early / name).write_bytes(bytes(len(content)))
    final = checkpoint.publish(folder, 2, saved.meta(entries))
    for name, content in contents.items():
        (final / name).write_bytes(content)
    checkpoint.delete(step_folder(folder, 1))


def control_not_cleared(folder: Path) -> None:
    """Half of a deletion, under a name that nothing clears up."""
    saved.save(folder, 2)
    (step_folder(folder, 1) / "COMPLETE").unlink()
    shutil.rmtree(step_folder(folder, 1))


@pytest.mark.parametrize(
    ("wrong", "seen_as"),
    [
        (control_deleted_first, "nothing to go on from"),
        (control_marked_first, "has digest"),
        (control_not_cleared, "step-00000001"),
    ],
)
def test_control_a_wrong_order_is_noticed(tmp_path, wrong, seen_as):
    saved.write_files(tmp_path / "elsewhere", 2)
    with pytest.raises(AssertionError, match=seen_as):
        steps_survived(tmp_path, one_checkpoint, wrong)


# A power cut: what was not synced before something later may be lost


def unsynced(log: list[tuple[str, str]], folder: Path) -> list[str]:
    """What is not on the disk when the new checkpoint gets its name, and what is deleted before the name is."""
    commit = log.index(("after replace", str(step_folder(folder, 2))))
    before, after = log[:commit], log[commit:]
    last = {entry: index for index, entry in enumerate(before)}
    written = dict.fromkeys(path for call, path in before if call == "write")
    lacking = [path for path in written if last.get(("after fsync", path), -1) < last["write", path]]
    unnamed = str(partial_folder(folder, 2))
    last_file = max(index for (call, _), index in last.items() if call == "write")
    lacking += [unnamed] if last.get(("after fsync", unnamed), -1) < last_file else []
    named = after.index(("after fsync", str(folder)))
    old = str(step_folder(folder, 1))
    lacking += [old] if ("before replace", old) in log[: commit + named] else []
    return lacking


def logged(folder: Path, save: Callable[[Path], None]) -> list[tuple[str, str]]:
    one_checkpoint(folder)
    boundaries = Boundaries()
    with pytest.MonkeyPatch.context() as patch:
        boundaries.install(patch)
        save(folder)
    return boundaries.log


def test_everything_is_synced_before_it_counts(tmp_path):
    assert unsynced(logged(tmp_path, next_save), tmp_path) == []


def test_control_a_folder_that_is_not_synced_is_noticed(tmp_path, monkeypatch):
    real = checkpoint.sync_folder
    monkeypatch.setattr("sft.checkpoint.sync_folder", lambda folder: real(tmp_path))
    assert unsynced(logged(tmp_path, next_save), tmp_path) == [str(partial_folder(tmp_path, 2))]


def test_control_a_file_that_is_not_synced_is_noticed(tmp_path, monkeypatch):
    def write_unsynced(path, value):
        with path.open("wb") as file:
            file.write(b"{}")
        return {"bytes": 2, "xxh3_128": ""}

    monkeypatch.setattr("sft.checkpoint.write_json", write_unsynced)
    partly = partial_folder(tmp_path, 2)
    log = logged(tmp_path, lambda folder: saved.save(folder, 2))
    assert unsynced(log, tmp_path)[:2] == [str(partly / "meta.json"), str(partly / "COMPLETE")]
