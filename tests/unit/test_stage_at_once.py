"""Many stage at once, or are stopped on the way: one copies, and nothing half looks whole.

Run: pytest tests/unit/test_stage_at_once.py
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft import staging
from sft.staging import RECORD
from tests import tiny
from tests.stage_support import assert_equal, assert_nothing_half, make_model, make_world, staged, touched

HOST = os.uname().nodename


@pytest.fixture
def world(tmp_path, prepared):
    return make_world(tmp_path, prepared)


SLOW = """
import os, sys, time
from sft import staging
from sft.errors import run_command
from sft.stage import main
chunks = staging._chunks
def slow(file, stop):
    for chunk in chunks(file, stop):
        time.sleep(0 if "/to/" in str(file.name) else {pause_s})
        yield chunk
staging._chunks, staging.CHUNK_BYTES = slow, 2**16
assert "torch" not in sys.modules
for number in range({forks}):
    if os.fork() == 0:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(f"{folder}/{{number}}-{{stream.name}}", os.O_CREAT | os.O_WRONLY), stream.fileno())
        break
else:
    if {forks}:
        sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range({forks})))
code = run_command(main)
assert "torch" not in sys.modules
print(os.getpid(), open("/proc/self/io").read(), file=sys.stderr, flush=True)
sys.exit(code)
"""


def start(arguments: list[str], pause_s: float, forks: int = 0, folder: str = "") -> subprocess.Popen:
    """`sft stage` in a process of its own that needs time for every 64 KiB of a source, and tells how much it wrote.

    With `forks`, in so many at once, whose output goes to `folder`.
    """
    command = [sys.executable, "-c", SLOW.format(pause_s=pause_s, forks=forks, folder=folder), *arguments]
    environment = tiny.rank_environment()
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_of_eight_at_once_one_copies(world, tmp_path):
    shutil.rmtree(tmp_path / "model")
    make_model(tmp_path / "model", num_bytes=2_000_000)
    folder = tmp_path / "said"
    folder.mkdir()
    ranks = start([*world, "--to", str(tmp_path / "to")], pause_s=0.05, forks=8, folder=str(folder))
    assert ranks.communicate(timeout=60) == ("", "")
    assert ranks.returncode == 0
    ends = [((folder / f"{n}-<stdout>").read_text(), (folder / f"{n}-<stderr>").read_text()) for n in range(8)]
    lines = {out for out, _ in ends}
    assert len(lines) == 1
    copies = shlex.split(lines.pop())
    assert_equal(tmp_path / "model", Path(copies[1]))
    written = sorted(int(re.search(r"^wchar: (\d+)$", err, re.MULTILINE)[1]) for _, err in ends)
    assert written[-1] > 2_000_000, "the kernel counted the copy in one process"
    assert written[-2] < 100_000, "and in no other"
    (writer,) = (re.search(r"^(\d+) rchar: ", err, re.MULTILINE)[1] for _, err in ends if "copying" in err)
    assert sum(err.count("copying") for _, err in ends) == 2, "model and shards"
    waited = sum(f"waiting for process {writer} on {HOST}, which is staging to {tmp_path}/to" in err for _, err in ends)
    assert waited >= 5, "control: they were there at the same time"
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(
        [staging.LOCK, Path(copies[1]).name, Path(copies[3]).name]
    )


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
        (signal.SIGINT, 130, "int"),
    ],
)
def test_a_signal_leaves_nothing_but_a_line(world, tmp_path, number, code, line):
    to = tmp_path / "to"
    process = start([*world, "--to", str(to)], pause_s=1.0)
    first = process.stderr.readline()
    assert "model.path: copying" in first
    while not list(to.glob("model-*.partial-*/model-0*")):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err.startswith(line)
    assert "Traceback" not in err
    assert [path.name for path in to.iterdir()] == [staging.LOCK]


def test_who_waits_goes_on_when_the_one_at_work_is_killed(world, tmp_path, capsys):
    to = tmp_path / "to"
    process = start([*world, "--to", str(to)], pause_s=30.0)
    while not list(to.glob("model-*.partial-*/model-0*")):
        time.sleep(0.01)
    threading.Timer(0.5, process.kill).start()
    copies, said = staged(world, to, capsys)
    process.communicate()
    assert f"waiting for process {process.pid} on {HOST}" in said
    assert_equal(tmp_path / "model", copies["--model.path"])
    assert not list(to.glob("*.partial*"))


# Two hosts, and a shared folder that locks within each of them only


def as_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename=name))


def test_hosts_without_a_common_lock_make_equal_copies(world, tmp_path, monkeypatch):
    """Both begin before one ends."""
    sources, to = [staging.model_source(tmp_path / "model")], tmp_path / "to"
    both = threading.Barrier(2, timeout=30)
    here = threading.local()
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename=here.name))
    monkeypatch.setattr(staging.fcntl, "flock", lambda *_: None)
    copy_files = staging._copy_files

    def together(source, partial):
        both.wait()
        entries = copy_files(source, partial)
        both.wait()
        return entries

    monkeypatch.setattr(staging, "_copy_files", together)
    said = []

    def work(name: str) -> list[Path]:
        here.name = name
        return staging.stage(sources, to, said.append)

    with ThreadPoolExecutor(2) as pool:
        (one,), (other,) = pool.map(work, ("n1", "n2"))
    assert one == other
    assert_equal(tmp_path / "model", one)
    assert {path.name for path in to.iterdir()} == {staging.LOCK, one.name}
    assert sum("another host was faster" in line for line in said) == 1
    assert sum("read back and equal" in line for line in said) == 1


def test_what_another_host_made_meanwhile_must_be_whole(world, tmp_path, monkeypatch):
    source, to = staging.model_source(tmp_path / "model"), tmp_path / "to"
    copy_files = staging._copy_files

    def late(source, partial):
        (to / source.name / "half").mkdir(parents=True)
        return copy_files(source, partial)

    monkeypatch.setattr(staging, "_copy_files", late)
    with pytest.raises(OSError, match="not empty"):
        staging.stage([source], to, lambda line: None)


def test_what_another_host_has_on_its_way_is_left_alone(world, tmp_path, monkeypatch):
    source, to = staging.model_source(tmp_path / "model"), tmp_path / "to"
    with pytest.MonkeyPatch.context() as patch:
        as_host("n2", patch)
        theirs = staging._partial(to / source.name)
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("half")
    os.utime(theirs / "config.json", (0, 0))
    (copy,) = staging.stage([source], to, lambda line: None)
    assert_equal(tmp_path / "model", copy)
    assert (theirs / "config.json").read_text() == "half"
    monkeypatch.setattr(staging, "ABANDONED_S", -1.0)
    staging.stage([source], to, lambda line: None)
    assert not theirs.exists(), "a container of another name left it long ago"


# Killed anywhere


def killed_at(n: int, work) -> bool:
    """Run `work` in a process that is killed at its n-th call that changes the disk, or chunk; whether it was."""
    child = os.fork()
    if child == 0:
        code, counting, count = 1, threading.Lock(), 0

        def reach() -> None:
            nonlocal count
            with counting:
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        def around(call):
            def counted(*args, **options):
                reach()  # to be killed after it is to be killed before the next one
                return call(*args, **options)

            return counted

        def chunks(file, stop, real=staging._chunks):
            for chunk in real(file, stop):
                reach()
                yield chunk

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(staging, "CHUNK_BYTES", 6000)
                for name in ("mkdir", "replace", "unlink", "rmdir", "utime"):
                    patch.setattr(os, name, around(getattr(os, name)))
                patch.setattr(os, "fsync", lambda descriptor: reach())  # a killed process loses nothing by it
                patch.setattr(staging, "_chunks", chunks)
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kills(tmp_path: Path, before) -> int:
    """Kill staging everywhere, each time on what `before` has made; nothing half may look whole, and the next completes
    it. Returns the number of kills."""
    model = small_model(tmp_path)
    for n in range(1000):
        to = tmp_path / f"to-{n}"
        before(to)
        was_killed = killed_at(n, lambda to=to: staging.stage([staging.model_source(model)], to, lambda line: None))
        assert_nothing_half(model, to)
        (copy,) = staging.stage([staging.model_source(model)], to, lambda line: None)
        assert_equal(model, copy)
        assert {path.name for path in to.iterdir()} == {staging.LOCK, copy.name}
        shutil.rmtree(to)
        if not was_killed:
            return n
    raise AssertionError("it never came to its end")


def small_model(tmp_path: Path) -> Path:
    """Three files, so that there are not too many moments to be killed at."""
    model = tmp_path / "small"
    if model.exists():
        return model
    model.mkdir()
    for name in ("config.json", "model-0-of-2.safetensors"):
        shutil.copyfile(tmp_path / "model" / name, model / name)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w0": "model-0-of-2.safetensors"}}')
    return model


@pytest.fixture
def no_fsync(monkeypatch):
    """A killed process loses nothing that the kernel has."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_every_kill_leaves_nothing_that_looks_whole(world, tmp_path, no_fsync):
    assert kills(tmp_path, lambda to: None) >= 18


def test_every_kill_while_a_damaged_copy_is_replaced(world, tmp_path, no_fsync):
    model = small_model(tmp_path)
    (whole,) = staging.stage([staging.model_source(model)], tmp_path / "whole", lambda line: None)
    touched(whole / "config.json")

    def before(to: Path) -> None:
        shutil.copytree(tmp_path / "whole", to)
        staging._partial(to / whole.name).mkdir()

    assert kills(tmp_path, before) >= 25


def test_control_a_copy_under_its_final_name_is_noticed(world, tmp_path, no_fsync, monkeypatch):
    def copy_in_place(source, to, say):
        (to / source.name).mkdir()
        entries = staging._copy_files(source, to / source.name)
        (to / source.name / RECORD).write_text(json.dumps({"files": entries}))

    monkeypatch.setattr(staging, "_copy", copy_in_place)
    with pytest.raises(AssertionError, match="has the name of a copy, and no staged.json"):
        kills(tmp_path, lambda to: None)
