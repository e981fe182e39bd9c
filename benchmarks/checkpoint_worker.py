"""One side of benchmarks/checkpoint.py on real ranks: trains, saves, loads. Started by it, with the facts as JSON."""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint_peers import DcpSaver, DeepSpeedSaver, Peer, sync_files
from sft import checkpoint, resume, zero_state
from sft.config import RunConfig
from sft.engine import build_engine, choose_numerics, join
from sft.inputs import open_inputs
from sft.metrics import Recorder
from sft.preemption import StopRequest
from sft.rendezvous import meet
from sft.saver import Saver
from sft.sequence import share_packs
from sft.settings import load
from sft.signals import Inbox
from sft.step import Run, train_step
from sft.watchdog import Watchdog

WARMUP_STEPS = 2
CHUNK_BYTES = 2**24


def main() -> None:
    """Measure one side and write the figures of the slowest rank."""
    facts = json.loads(next(argument for argument in sys.argv[1:] if argument.startswith("{")))
    flags = [text for name, value in facts["options"].items() for text in (f"--{name}", str(value))]
    config = load(RunConfig, flags, prog="checkpoint_worker")
    inputs = open_inputs(config, int(os.environ["WORLD_SIZE"]))
    device = join(meet(60.0))
    stop = StopRequest(Inbox(), None)
    numerics = choose_numerics(config, device, inputs.model_config)
    out = Path(config.out)
    saved: list[dict[str, Any]] = []

    def record(kind: str, _step: int, **told: Any) -> None:
        if kind == "save":
            saved.append(told)

    with Recorder(config, out, False, inputs.total_steps) as recorder:
        watch = Watchdog(dist.get_rank(), dist.get_world_size(), 60.0, 900.0, recorder.last_words, out)
        engine = build_engine(config, inputs.strategy, numerics)
        saver = make_saver(facts["side"], engine, config, int(os.environ["LOCAL_SIZE"]), record)
        run = Run(config, inputs, {}, numerics, engine, out, recorder, watch, stop, saver, share_packs(1), 0.0)
        figures = save_while_training(run, saved, facts["saves"], facts["plain_steps"])
        figures |= load_again(run, facts["saves"])
        saver.wait_for_deletions()
        stop.close()
        num_bytes = 4 * len(zero_state.STATES) * sum(x.numel() for x in zero_state.flat_tensors(engine.optimizer))
        figures["plain_write_s"] = [plain_write_s(out, num_bytes) for _ in range(facts["saves"])]
    write_slowest(figures, num_bytes, Path(facts["result"]))


def make_saver(side: str, engine: Any, config: RunConfig, local_ranks: int, record: Any) -> Saver | Peer:
    """What writes the checkpoints of a side."""
    folder = Path(config.out) / "checkpoints"
    if side == "ours":
        return Saver(engine, folder, {}, config.checkpoint, local_ranks, record)
    return {"deepspeed": DeepSpeedSaver, "dcp": DcpSaver}[side](engine, folder, record)


def save_while_training(run: Run, saved: list[dict[str, Any]], saves: int, plain_steps: int) -> dict[str, Any]:
    """Steps without a save, then `saves` times: begin, train on until it is on the disk, and a little longer.

    Returns:
        plain_step_s: of every step with no save under way (warm-up left out); saving_step_s: of every other.
        For each save: stall_s, what the saver says training waited; lost_s, by how much the time from its beginning
        to its end was longer than that many plain steps; durable_s, from its beginning to its publication; gib.
    """
    step = 0

    def train() -> dict[str, Any]:
        nonlocal step
        line = train_step(run, step)
        assert line is not None
        step += 1
        return line

    for _ in range(WARMUP_STEPS):
        train()
    plain = [train()["step_time_s"] for _ in range(plain_steps)]
    windows = []
    for _ in range(saves):
        run.saver.take_stall_s()
        before, began_s = len(saved), time.perf_counter()
        run.saver.begin(step, None)
        lines, begin_s = [], time.perf_counter() - began_s
        while len(saved) == before:
            lines.append(train())
        windows.append((begin_s, lines))
        plain += [train()["step_time_s"] for _ in range(plain_steps)]
    usual = sorted(plain)[len(plain) // 2]
    times = [(begin_s, [line["step_time_s"] for line in lines]) for begin_s, lines in windows]
    return {
        "plain_step_s": plain,
        "saving_step_s": [seconds for _, steps in times for seconds in steps],
        "stall_s": [sum(line["save_stall_s"] for line in lines) for _, lines in windows],
        "lost_s": [begin_s + sum(steps) - len(steps) * usual for begin_s, steps in times],
        "durable_s": [told["save_time_s"] for told in saved],
        "gib": [told["gib"] for told in saved],
        "copies": bool(getattr(run.saver, "copies", False)),
    }


def load_again(run: Run, times: int) -> dict[str, Any]:
    """Save, train on, and load what was saved, `times` times, from a page cache that does not hold it.

    Returns:
        check_s: comparing digests, which ours alone has; load_s: the rest.
    """
    run.saver.begin(10**6, None)
    expected = fingerprint(run)
    run.saver.finish()
    figures: dict[str, Any] = {"check_s": [], "load_s": []}
    for step in range(times):
        train_step(run, step)
        assert fingerprint(run) != expected, "a step changed nothing: loading would prove nothing"
        gc.collect()
        forget_pages(run.checkpoints)
        dist.barrier()
        began_s = time.perf_counter()
        newest = resume.choose(lambda: checkpoint.newest_complete(run.checkpoints), damaged) if is_ours(run) else None
        checked_s = time.perf_counter()
        if newest is not None:
            resume.load(run.engine, newest)
        else:
            run.saver.load()
        dist.barrier()
        figures["check_s"].append(checked_s - began_s)
        figures["load_s"].append(time.perf_counter() - checked_s)
        assert fingerprint(run) == expected, "loaded is not what was saved"
    return figures


def is_ours(run: Run) -> bool:
    """Whether this is the side of our own saver."""
    return isinstance(run.saver, Saver)


def damaged(what: str, _aside: Path) -> None:
    """A checkpoint of this benchmark has no reason to be."""
    raise AssertionError(what)


def fingerprint(run: Run) -> list[float]:
    """Sums of this rank's state: weights and both moments, of each flat tensor."""
    tensors = zero_state.state_tensors(run.engine.optimizer)
    return [float(flat.sum(dtype=torch.float64)) for flats in tensors.values() for flat in flats]


def forget_pages(folder: Path) -> None:
    """Drop what the page cache holds of these files, so that reading them means reading the disk."""
    sync_files(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_write_s(folder: Path, num_bytes: int) -> float:
    """Seconds to write and sync that many bytes to one file per rank: no saver can be faster on this disk."""
    path = folder / f"plain-{dist.get_rank()}"
    chunk = os.urandom(CHUNK_BYTES)
    dist.barrier()
    began_s = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, num_bytes, CHUNK_BYTES):
            file.write(chunk[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - began_s
    path.unlink()
    return seconds


def write_slowest(figures: dict[str, Any], num_bytes: int, result: Path) -> None:
    """For every figure and repetition the largest of all ranks; bytes of state of all ranks together."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (figures, num_bytes))
    if dist.get_rank() == 0:
        worst = {
            name: [max(values) for values in zip(*(told[name] for told, _ in everyone), strict=True)]
            for name, value in figures.items()
            if isinstance(value, list)
        }
        result.write_text(json.dumps({**figures, **worst, "state_bytes": sum(count for _, count in everyone)}))
    dist.barrier()


if __name__ == "__main__":
    main()
