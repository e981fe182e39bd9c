"""Workers: the same bytes for any number on either engine, in order; their end is told, or follows the job's."""

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from data_prep import blocks, workers
from data_prep.readers import RawBlock, block_rows, read_blocks
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.tokenizer import load_tokenizer
from tests import prep_jobs
from tests.prep_jobs import Ended, children, content, killed_at_end, run, start, state, wait_until
from tests.prep_support import alpaca_rows, prepare, write_json
from tests.tiny import make_tokenizer

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find processes in")
CLUSTER = """
import sys, ray
ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, configure_logging=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "tokenizer")
    write_json(folder / "rows.json", alpaca_rows(700))
    return folder


@pytest.fixture(scope="module")
def options(world: Path) -> dict[str, Any]:
    return {"sources": world / "rows.json", "tokenizer": world / "tokenizer", "heldout": 0.1, "dedup": "near"}


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("one")
    assert run(folder, **options, workers=1).code == 0
    return content(folder / "out")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster on this host with five CPUs, and the token that it was started with."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install .[ray])")
    token = secrets.token_hex(32)
    command = [sys.executable, "-c", CLUSTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
    ) as process:
        assert process.stdin
        assert process.stdout
        told = next(line for line in process.stdout if line.startswith("address "))
        yield f"{told.split()[1]} {token}"
        process.stdin.close()
        process.wait(60)


def on_ray(cluster: str) -> None:
    os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_TOKEN"] = cluster.split()
    os.environ["RAY_AUTH_MODE"] = "token"


def test_the_output_holds_these_files(by_one_worker: dict[str, bytes]) -> None:
    shards = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json", "manifest.json")
    assert set(by_one_worker) == {
        "report.json",
        *(f"{split}/{name}" for split in ("train", "heldout") for name in shards),
    }


@pytest.mark.parametrize("count", [2, 5])
def test_bytes_do_not_depend_on_workers(
    tmp_path: Path, options: dict[str, Any], by_one_worker: dict[str, bytes], count: int
) -> None:
    assert run(tmp_path, **options, workers=count).code == 0
    assert content(tmp_path / "out") == by_one_worker


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bytes_do_not_depend_on_the_engine(
    tmp_path: Path, options: dict[str, Any], by_one_worker: dict[str, bytes], cluster: str, count: int
) -> None:
    ended = run(tmp_path, **options, workers=count, engine="ray", patch=partial(on_ray, cluster))
    assert ended.code == 0, ended.stderr
    assert content(tmp_path / "out") == by_one_worker


def test_control_another_seed_gives_other_bytes(
    tmp_path: Path, options: dict[str, Any], by_one_worker: dict[str, bytes]
) -> None:
    assert run(tmp_path, **options, seed=1).code == 0
    found = content(tmp_path / "out")
    assert found.keys() == by_one_worker.keys()
    assert found["train/data-00000-of-00001.arrow"] != by_one_worker["train/data-00000-of-00001.arrow"]


@needs_proc
def test_sigterm_ends_a_job_on_ray(tmp_path: Path, options: dict[str, Any], cluster: str) -> None:
    with killed_at_end(
        start(tmp_path, **options, engine="ray", workers=2, patch=partial(slowly_on_ray, cluster))
    ) as job:
        wait_until(lambda: len(list(tmp_path.glob("out.work/blocks/*.safetensors"))) > 1)
        os.kill(job.process.pid, signal.SIGTERM)
        ended = job.end()
    assert ended.code == 143
    assert "Traceback" not in ended.stderr
    again = run(tmp_path, **options, workers=1)
    assert (again.code, again.reused > 1) == (0, True)


def slowly_on_ray(cluster: str) -> None:
    on_ray(cluster)
    slow_spill()


def slow_spill() -> None:
    from data_prep.spill import Spill

    add = Spill.add

    def slowly(spill: Spill, number: int, block: blocks.Block) -> blocks.Block:
        time.sleep(0.1)
        return add(spill, number, block)

    Spill.add = slowly


@needs_proc
def test_a_worker_of_ray_that_is_lost_is_told_and_the_work_kept(
    tmp_path: Path, options: dict[str, Any], cluster: str
) -> None:
    patch = partial(slowly_on_ray, cluster)
    with killed_at_end(start(tmp_path, **options, engine="ray", workers=1, patch=patch)) as job:
        wait_until(lambda: len(list(tmp_path.glob("out.work/blocks/*.safetensors"))) > 1)
        [worker] = processes_named("ray::_Worker")
        os.kill(worker, signal.SIGKILL)
        ended = job.end()
    assert "engine ray: a worker was lost" in ended.error
    again = run(tmp_path, **options, workers=1)
    assert (again.code, again.reused > 1) == (0, True)


def processes_named(name: str) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and name in (path / "cmdline").read_text(errors="replace"):
                found.append(int(path.name))
    return found


def test_an_unreachable_cluster_is_one_line(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install .[ray])")
    ended = run(tmp_path, **options, engine="ray", patch=unreachable)
    assert "engine ray: no cluster: nobody there; check RAY_ADDRESS" in ended.error


def unreachable() -> None:
    import ray

    ray.init = Mock(side_effect=ConnectionError("nobody\nthere"))


def test_ray_that_is_not_installed_is_one_line(tmp_path: Path, options: dict[str, Any]) -> None:
    ended = run(tmp_path, **options, engine="ray", patch=without_ray)
    assert ended.error.endswith("engine ray: the package is not installed; pip install 'sft-pipeline[ray]'")


def without_ray() -> None:
    sys.modules["ray"] = None


# The local engine


@pytest.fixture
def encoder(world: Path) -> blocks.Encoder:
    config = PrepConfig(sources=[{"path": "rows.json"}], tokenizer=str(world / "tokenizer"), seq_len=4096, out="out")
    return blocks.make_encoder(config, load_tokenizer(config.tokenizer))


@pytest.fixture
def raws(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[RawBlock]:
    monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", prep_jobs.SMALL_BLOCK_BYTES)
    found = list(read_blocks(0, world / "rows.json"))
    assert len(found) > 20
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_come_in_order_from_unequal_workers(
    encoder: blocks.Encoder, raws: list[RawBlock], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    encode = blocks.Encoder.encode

    def first_is_slow(encoder: blocks.Encoder, raw: RawBlock) -> blocks.Block:
        time.sleep(0.5 if raw.first_row == 1 else 0)
        return encode(encoder, raw)

    monkeypatch.setattr(blocks.Encoder, "encode", first_is_slow)
    encoded = list(workers.encode_blocks(raws, encoder, count))
    assert [block.num_rows for block in encoded] == [len(list(block_rows(raw))) for raw in raws]
    assert [block.keys.tolist() for block in encoded] == [encode(encoder, raw).keys.tolist() for raw in raws]
    assert multiprocessing.active_children() == []


def test_blocks_in_flight_are_bounded(encoder: blocks.Encoder, raws: list[RawBlock]) -> None:
    taken = []
    encoded = workers.encode_blocks((taken.append(raw) or raw for raw in raws * 3), encoder, 2)
    next(encoded)
    assert 2 <= len(taken) <= 12
    encoded.close()
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_told(
    encoder: blocks.Encoder, raws: list[RawBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks.Encoder, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(workers.WorkerLost, match="worker process was killed"):
        list(workers.encode_blocks(raws, encoder, 2))


def test_a_worker_killed_in_the_middle_of_its_answer_is_told(
    encoder: blocks.Encoder, raws: list[RawBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = blocks.Encoder.encode

    def answer_too_large_for_the_pipe(encoder: blocks.Encoder, raw: RawBlock) -> Any:
        if raw.first_row == 1:
            return encode(encoder, raw)
        time.sleep(0.3)  # until the first block is taken
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(10**7)

    monkeypatch.setattr(blocks.Encoder, "encode", answer_too_large_for_the_pipe)
    encoded = workers.encode_blocks(raws, encoder, 2)
    assert next(encoded).num_rows == len(list(block_rows(raws[0])))
    time.sleep(1.5)
    with pytest.raises(workers.WorkerLost, match="worker process was killed"):
        next(encoded)


def test_a_crash_in_a_worker_is_a_crash(
    encoder: blocks.Encoder,
    raws: list[RawBlock],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(blocks.Encoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="its traceback is above"):
        list(workers.encode_blocks(raws, encoder, 2))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_first_mistake_in_row_order_is_told(
    encoder: blocks.Encoder, raws: list[RawBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late_for_the_first(_: blocks.Encoder, raw: RawBlock) -> Any:
        time.sleep(0.3 if raw.first_row == 1 else 0)
        raise UserError(f"row {raw.first_row}")

    monkeypatch.setattr(blocks.Encoder, "encode", late_for_the_first)
    with pytest.raises(UserError, match="^row 1$"):
        list(workers.encode_blocks(raws, encoder, 2))
    assert multiprocessing.active_children() == []


@needs_proc
@pytest.mark.parametrize(
    ("whole_group", "number", "code"),
    [
        (False, signal.SIGKILL, -9),
        (False, signal.SIGTERM, 143),
        (True, signal.SIGTERM, 143),
        (True, signal.SIGINT, 130),
    ],
)
def test_workers_end_with_the_job(
    tmp_path: Path, options: dict[str, Any], whole_group: bool, number: int, code: int
) -> None:
    with killed_at_end(start(tmp_path, **options, workers=3, patch=slow_spill)) as job:
        wait_until(lambda: len(list(tmp_path.glob("out.work/blocks/*.safetensors"))) > 1)
        of_job = children(job.process.pid)
        assert len(of_job) == 3
        (os.killpg if whole_group else os.kill)(job.process.pid, number)
        ended: Ended = job.end()
        wait_until(lambda: all(state(pid)[0] == "Z" for pid in of_job))
    assert ended.code == code
    assert "Traceback" not in ended.stderr


def test_workers_auto_is_one_per_core(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(raw_blocks: Any, encoder: blocks.Encoder, count: int) -> Any:
        asked.append(count)
        return map(encoder.encode, raw_blocks)

    monkeypatch.setattr("data_prep.workers.encode_blocks", noted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 7, 9})
    given = {"sources": world / "rows.json", "tokenizer": world / "tokenizer"}
    prepare(tmp_path / "auto", **given, workers="auto")
    prepare(tmp_path / "two", **given, workers=2)
    assert asked == [3, 2]
