"""A job that is killed anywhere and started again gives the bytes of one that was not, and uses its finished blocks."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from data_prep import blocks, build, readers
from data_prep.spill import Spill
from tests.prep_jobs import (
    SMALL_BLOCK_BYTES,
    Stop,
    children,
    content,
    killed_at_end,
    run,
    start,
    state,
    wait_until,
)
from tests.prep_support import alpaca_rows, flags, refused, write_json
from tests.tiny import make_tokenizer

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find processes in")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "tokenizer")
    write_json(folder / "large.json", alpaca_rows(700))
    write_json(folder / "small.json", alpaca_rows(40))
    return folder


@pytest.fixture(scope="module")
def large(world: Path) -> dict[str, Any]:
    return {"sources": world / "large.json", "tokenizer": world / "tokenizer", "heldout": 0.1}


@pytest.fixture(scope="module")
def small(world: Path) -> dict[str, Any]:
    return {"sources": world / "small.json", "tokenizer": world / "tokenizer", "heldout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, large: dict[str, Any], small: dict[str, Any]
) -> dict[str, dict[str, bytes]]:
    """The output of both jobs, by the name of their input."""
    found = {}
    for options in (large, small):
        folder = tmp_path_factory.mktemp("uninterrupted")
        assert run(folder, **options).code == 0
        found[options["sources"].stem] = content(folder / "out")
    return found


def num_blocks(path: Path) -> int:
    before, readers.BLOCK_BYTES = readers.BLOCK_BYTES, SMALL_BLOCK_BYTES
    try:
        return len(list(readers.read_blocks(0, path)))
    finally:
        readers.BLOCK_BYTES = before


def work(tmp_path: Path) -> Path:
    return tmp_path / "out.work"


def kept_after_kill(tmp_path: Path, options: dict[str, Any], at_event: int) -> list[Path]:
    """Files of the blocks that are finished when a job is killed."""
    assert run(tmp_path, **options, stop=Stop(at_event)).code == -signal.SIGKILL
    return sorted((work(tmp_path) / "blocks").glob("*.safetensors"))


NEVER = Stop(at_event=10**9)


def test_killed_before_any_change_of_a_file(
    tmp_path: Path, small: dict[str, Any], uninterrupted: dict[str, dict[str, bytes]]
) -> None:
    """A job ends itself before its n-th change of a file or folder: all n of beginning and end, some in between."""
    whole = run(tmp_path, **small, stop=NEVER)
    assert (whole.code, content(tmp_path / "out")) == (0, uninterrupted["small"])
    events = [*range(5), *range(5, whole.changes - 11, 9), *range(whole.changes - 11, whole.changes)]
    assert len(events) >= 18
    reused = []
    for event in events:
        out, left = tmp_path / str(event), tmp_path / f"{event}.work"
        assert run(tmp_path, **small, out=out, stop=Stop(event)).code == -signal.SIGKILL
        assert not out.exists() or content(out) == uninterrupted["small"]
        again = run(tmp_path, **small, out=out)
        assert (again.code, content(out), left.exists()) == (0, uninterrupted["small"], False), event
        reused.append(again.reused)
    assert reused[0] == 0
    assert max(reused) == num_blocks(small["sources"]), "a kill while the shards are written loses no block"


@needs_proc
@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_random_moments(
    tmp_path: Path, large: dict[str, Any], uninterrupted: dict[str, dict[str, bytes]], workers: int, whole_group: bool
) -> None:
    """One job, killed again and again at seeded moments, by turns with and without its workers."""
    moments = random.Random(f"{workers} {whole_group}")
    reused = []
    for _ in range(8):
        stop = Stop(after_s=moments.uniform(0.01, 0.12), whole_group=whole_group)
        with killed_at_end(start(tmp_path, **large, workers=workers, stop=stop, patch=slow_blocks)) as job:
            ended = job.end()
            reused.append(ended.reused)
        if (tmp_path / "out").exists():
            break
        assert ended.code == -signal.SIGKILL
    last = run(tmp_path, **large)
    assert (last.code, content(tmp_path / "out")) == (0, uninterrupted["large"])
    assert len(reused) > 3
    told = [count for count in reused if count]  # none where the job was killed before it could tell
    assert told
    assert told == sorted(told), "no finished block is lost"


def slow_blocks() -> None:
    """A job of about half a second, so that it outlives several kills."""
    add = Spill.add

    def slowly(spill: Spill, number: int, block: blocks.Block) -> blocks.Block:
        time.sleep(0.01)
        return add(spill, number, block)

    Spill.add = slowly


def test_finished_blocks_are_not_encoded_again(tmp_path: Path, large: dict[str, Any]) -> None:
    kept = kept_after_kill(tmp_path, large, at_event=100)
    total = num_blocks(large["sources"])
    assert 10 < len(kept) < total
    again = run(tmp_path, **large, patch=count_encoded)
    assert again.reused == len(kept)
    assert again.stdout.count("encoded a block") == total - len(kept)
    fresh = run(tmp_path, **large, out=tmp_path / "fresh", patch=count_encoded)
    assert (fresh.reused, fresh.stdout.count("encoded a block")) == (0, total)
    assert content(tmp_path / "fresh") == content(tmp_path / "out")


def count_encoded() -> None:
    encode = blocks.Encoder.encode

    def counted(encoder: blocks.Encoder, raw: readers.RawBlock) -> blocks.Block:
        os.write(1, b"encoded a block\n")
        return encode(encoder, raw)

    blocks.Encoder.encode = counted


def cut_tokens(folder: Path) -> int:
    blocks_before = sorted((folder / "blocks").glob("*.safetensors"))[:20]
    os.truncate(folder / "tokens.bin", 4 * sum(load_file(block)["lengths"].sum() for block in blocks_before) + 2)
    return 20


def cut_block(folder: Path) -> int:
    block = sorted((folder / "blocks").glob("*.safetensors"))[7]
    os.truncate(block, block.stat().st_size // 2)
    return 7


def flip_token(folder: Path) -> int:
    with open(folder / "tokens.bin", "r+b") as tokens:
        tokens.seek(5)
        byte = tokens.read(1)[0]
        tokens.seek(5)
        tokens.write(bytes([byte ^ 1]))
    return 0


def lose_block(folder: Path) -> int:
    (folder / "blocks" / f"{9:08d}.safetensors").unlink()
    return 9


def foreign_block(folder: Path) -> int:
    shutil.copy(folder / "blocks" / f"{4:08d}.safetensors", folder / "blocks" / f"{5:08d}.safetensors")
    return 5


def nothing(folder: Path) -> int:
    return len(list((folder / "blocks").glob("*.safetensors")))


@pytest.mark.parametrize("damage", [nothing, cut_tokens, cut_block, flip_token, lose_block, foreign_block])
def test_only_whole_blocks_are_used_again(
    tmp_path: Path,
    large: dict[str, Any],
    uninterrupted: dict[str, dict[str, bytes]],
    damage: Callable[[Path], int],
) -> None:
    assert len(kept_after_kill(tmp_path, large, at_event=100)) > 20
    first_bad = damage(work(tmp_path))
    again = run(tmp_path, **large)
    assert (again.code, again.reused) == (0, first_bad)
    assert content(tmp_path / "out") == uninterrupted["large"]
    assert not work(tmp_path).exists()


def test_blocks_of_another_job_are_wiped(
    tmp_path: Path, large: dict[str, Any], uninterrupted: dict[str, dict[str, bytes]]
) -> None:
    assert len(kept_after_kill(tmp_path, {**large, "seed": 7}, at_event=100)) > 20
    kept = len(kept_after_kill(tmp_path, large, at_event=40))
    assert kept < 20, "the killed job began anew"
    ended = run(tmp_path, **large)
    assert (ended.code, ended.reused) == (0, kept)
    assert content(tmp_path / "out") == uninterrupted["large"]


@needs_proc
def test_two_jobs_into_one_folder(
    tmp_path: Path, large: dict[str, Any], uninterrupted: dict[str, dict[str, bytes]]
) -> None:
    with killed_at_end(start(tmp_path, **large, patch=wait_before_writing)) as first:
        wait_until((work(tmp_path) / "waiting").exists)
        second = run(tmp_path, **large)
        other = run(tmp_path, **{**large, "heldout": 0.2})
        for line in (second.error, other.error):
            assert "another sft prep is writing it (process " in line
            assert str(first.process.pid) in line
        (work(tmp_path) / "waiting").unlink()
        assert first.end().code == 0
    assert content(tmp_path / "out") == uninterrupted["large"]
    assert "up to date" in run(tmp_path, **large).stdout, "control: nobody writes any more"


def wait_before_writing() -> None:
    new_output = Spill.new_output

    def waiting(spill: Spill) -> Path:
        flag = spill.folder / "waiting"
        flag.touch()
        wait_until(lambda: not flag.exists())
        return new_output(spill)

    Spill.new_output = waiting


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_while_encoding_keeps_the_work(
    tmp_path: Path, large: dict[str, Any], uninterrupted: dict[str, dict[str, bytes]], workers: int
) -> None:
    ended = run(tmp_path, **large, workers=workers, patch=small_files_only)
    assert f"out {tmp_path / 'out'}: cannot be written: File too large; check space" in ended.error
    assert "finished work is kept" in ended.error
    assert not (tmp_path / "out").exists()
    again = run(tmp_path, **large)
    assert (again.code, again.reused > 0) == (0, True)
    assert content(tmp_path / "out") == uninterrupted["large"]


def test_a_disk_too_small_for_the_output_is_told_before_writing(
    tmp_path: Path, large: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    argv = flags(**large, seq_len=1024, workers=1, out=tmp_path / "out")
    line = refused(capsys, build.main, argv)
    assert "GiB are needed, 0.0 GiB are free" in line
    assert not (tmp_path / "out").exists()
    assert list((work(tmp_path) / "blocks").iterdir())
    monkeypatch.undo()
    build.main(argv)
    assert "1 finished blocks of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").exists()


@needs_proc
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_job_and_workers_and_keeps_the_work(
    tmp_path: Path,
    large: dict[str, Any],
    uninterrupted: dict[str, dict[str, bytes]],
    number: int,
    code: int,
    workers: int,
) -> None:
    with killed_at_end(start(tmp_path, **large, workers=workers, patch=wait_before_writing)) as job:
        wait_until(lambda: len(list((work(tmp_path) / "blocks").glob("*.safetensors"))) > 1)
        of_job = children(job.process.pid) if workers > 1 else []
        os.killpg(job.process.pid, number)
        ended = job.end()
        wait_until(lambda: all(state(pid)[0] == "Z" for pid in of_job))
    assert ended.code == code
    assert "Traceback" not in ended.stderr
    assert ("interrupted" in ended.stderr) == (number == signal.SIGINT)
    assert not (tmp_path / "out").exists()
    (work(tmp_path) / "waiting").unlink(missing_ok=True)
    again = run(tmp_path, **large)
    assert (again.code, again.reused > 0) == (0, True)
    assert content(tmp_path / "out") == uninterrupted["large"]
