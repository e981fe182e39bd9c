"""Started by tests: training runs on forked ranks, so that imports are paid for once.

    run_worker PLAN.json FOLDER

The plan is a list of stages, one after the other; a stage is a list of runs at the same time. A run is {"name",
"ranks", "options": run options by flag} and perhaps "out": the run folder below FOLDER (default: the name), "patches":
{one of PATCHES: its argument}; and, done to `out` before the start: "copy_of": where it is copied from, "remove":
files and folders in it, "flip": checkpoints in which a bit is flipped, and "files": {name: text} that it holds.
Written to FOLDER: ends.jsonl, what every rank says (<name>.<rank>.out and .err), and the packs it reads (<name>.packs).
"""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sft.step
import sft.training
from sft import batch, checkpoint, lr_finder, order, resume, schedule, zero_state
from sft.errors import run_rank
from sft.model import PackedCausalLM
from sft.ports import free_port
from sft.train import main as train
from tests.dist import invented_memory
from tests.dist.forked import set_rank
from tests.dist.watchdog_worker import append, send


def main(argv: list[str]) -> None:
    """All stages of the plan."""
    plan, folder = map(Path, argv)
    for runs in json.loads(plan.read_text()):
        ranks: dict[int, tuple[str, int]] = {}
        try:
            for run in runs:
                make_ready(run, folder / run.setdefault("out", run["name"]))
                port = free_port()
                for rank in range(run["ranks"]):
                    pid = os.fork()
                    if pid == 0:
                        become_rank(run, rank, port, folder)
                        run_rank(lambda _, run=run: train_patched(run, folder))
                    ranks[pid] = (run["name"], rank)
            while ranks:
                pid, status = os.wait()
                name, rank = ranks.pop(pid)
                append(folder / "ends.jsonl", run=name, rank=rank, code=os.waitstatus_to_exitcode(status))
        finally:
            send(signal.SIGKILL, list(ranks))


def make_ready(run: dict[str, Any], out: Path) -> None:
    """What is done to the run folder before the start."""
    if "copy_of" in run:
        shutil.copytree(out.parent / run["copy_of"], out)
    for path in run.get("remove", []):
        if (out / path).is_dir():
            shutil.rmtree(out / path)
        else:
            (out / path).unlink()
    for saved in run.get("flip", []):
        flip(out / "checkpoints" / saved)
    for name, text in run.get("files", {}).items():
        out.mkdir(exist_ok=True)
        (out / name).write_text(text)


def flip(saved: Path) -> None:
    """Flip a bit in the middle of the first rank's file."""
    path = sorted(saved.glob("rank-*"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def become_rank(run: dict[str, Any], rank: int, port: str, folder: Path) -> None:
    """Make this forked process a rank with its own output."""
    set_rank(rank, run["ranks"], port)
    for descriptor, kind in ((1, "out"), (2, "err")):
        stream = os.open(folder / f"{run['name']}.{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(stream, descriptor)


def train_patched(run: dict[str, Any], folder: Path) -> None:
    """Train with what the run's patches do to it."""
    note_packs(folder / f"{run['name']}.packs")
    for name, argument in run.get("patches", {}).items():
        PATCHES[name](argument)
    flags = [text for name, value in run["options"].items() for text in (f"--{name}", str(value))]
    train([*flags, "--out", str(folder / run["out"])])


STEP = 0
"""The step (from 1) that this rank is in."""


def note_packs(path: Path) -> None:
    """Write down which packs this rank reads in which forward of which step."""
    step_rows, from_shards = order.step_rows, batch.from_shards
    forward = 0

    def noted_step(seed: int, step: int, *sizes: int) -> order.Rows:
        global STEP
        nonlocal forward
        if step + 1 != STEP:
            STEP, forward = step + 1, 0
        return step_rows(seed, step, *sizes)

    def noted_packs(shards: Any, rows: order.Rows, device: torch.device, seeds: Sequence[int] = ()) -> batch.MicroBatch:
        nonlocal forward
        append(path, step=STEP, forward=forward, rank=int(os.environ["RANK"]), packs=rows.tolist())
        forward += 1
        return from_shards(shards, rows, device, seeds)

    order.step_rows, batch.from_shards = noted_step, noted_packs


# What is done to a run


def forget_adam_step(_: Any) -> None:
    """A resume that does not know how many updates were made."""
    original = zero_state.set_optimizer_step
    zero_state.set_optimizer_step = lambda optimizer, step: original(optimizer, 0)


def lose_moments(_: Any) -> None:
    """A resume that begins with moments of zero."""
    original = checkpoint.Pieces.read

    def read(self: checkpoint.Pieces, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        values = original(self, name, state, start, numel)
        return values * 0 if state.startswith("exp_avg") else values

    checkpoint.Pieces.read = read


def lose_average(_: Any) -> None:
    """A resume whose average begins anew, with the present weights."""
    original = checkpoint.Pieces.read

    def read(self: checkpoint.Pieces, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        return original(self, name, "fp32" if state == "ema" else state, start, numel)

    checkpoint.Pieces.read = read


def shift_moments(_: Any) -> None:
    """A resume that puts every moment one element too far."""
    original = checkpoint.Pieces.read

    def read(self: checkpoint.Pieces, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        values = original(self, name, state, start, numel)
        return values.roll(1) if state.startswith("exp_avg") else values

    checkpoint.Pieces.read = read


def raise_lr(steps: list[int]) -> None:
    """A learning rate in these steps that wrecks the weights: the loss of the step after shows it."""
    original = schedule.lr_at
    schedule.lr_at = lambda step, *settings: 1.0 if step in steps else original(step, *settings)


def poison(argument: list[Any]) -> None:
    """[what, packs]: every forward that reads one of these packs has a loss or gradient that is not finite."""
    what, packs = argument
    from_shards, forward = batch.from_shards, PackedCausalLM.forward
    poisoned = False

    def watched(shards: Any, rows: order.Rows, device: torch.device, seeds: Sequence[int] = ()) -> batch.MicroBatch:
        nonlocal poisoned
        poisoned = bool(set(packs) & set(rows.tolist()))
        return from_shards(shards, rows, device, seeds)

    def patched(self: PackedCausalLM, micro_batch: batch.MicroBatch, ask: str = "loss") -> Any:
        result = forward(self, micro_batch, ask)
        if ask != "loss" or not poisoned:
            return result
        loss, by_source_S = result
        return (loss * math.nan if what == "loss" else loss + (loss - loss.detach()).sqrt()), by_source_S

    batch.from_shards, PackedCausalLM.forward = watched, patched


def stop_in_samples(call: int) -> None:
    """SIGTERM to the last rank in the given forward of those that ask for next tokens."""
    forward, calls = PackedCausalLM.forward, iter(range(1, 1000))

    def patched(self: PackedCausalLM, micro_batch: batch.MicroBatch, ask: str = "loss") -> Any:
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if ask == "next" and is_last and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, micro_batch, ask)

    PackedCausalLM.forward = patched


def leak_samples(_: Any) -> None:
    """Prompts that lie in one forward are read as one document."""
    build_scored = batch.build_scored

    def joined(documents: Sequence[Any], device: torch.device) -> batch.MicroBatch:
        built = build_scored(documents, device)
        whole = batch.Layout((built.layout.num_tokens,), built.layout.cu_seqlens[[0, -1]])
        return replace(built, layout=whole, pos_1T=torch.arange(built.layout.num_tokens, device=device)[None])

    batch.build_scored = joined


def average_over_packs(size: int) -> None:
    """A loss that is multiplied by the number of groups of `size` ranks that share packs, not by that of ranks."""
    original = sft.step.data_parallel_size
    sft.step.data_parallel_size = lambda engine: original(engine) // size


def kill_before(argument: list[Any]) -> None:
    """[function, call]: SIGKILL before the given call of a function."""
    owner, name = KILL_PLACES[argument[0]]
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def patched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == argument[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def sweep_before(_: Any) -> None:
    """Training that begins, in the same process, with a sweep of the learning-rate finder, and what it puts back."""
    original = sft.training.train

    def train_after(run: Any, newest: Path | None) -> Any:
        taken = lr_finder.snapshot(run.engine.optimizer)
        lr_finder.sweep(run)
        lr_finder.restore(run.engine.optimizer, taken)
        return original(run, newest)

    sft.training.train = train_after


def skip_restore(_: Any) -> None:
    """A learning-rate finder that leaves the weights as its sweep has made them."""
    lr_finder.restore = lambda optimizer, taken: None


def sweep_steps(steps: int) -> None:
    """Steps of a sweep."""
    lr_finder.STEPS = steps


def signal_at_sweep(step: int) -> None:
    """SIGTERM to this rank at a step of a sweep."""
    original, calls = lr_finder.train_step, iter(range(1000))

    def patched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    lr_finder.train_step = patched


def stop_in_heldout(call: int) -> None:
    """SIGTERM to the last rank at the beginning of the given measurement of the held-out loss."""
    original, calls = sft.training.heldout_loss, iter(range(1, 1000))

    def patched(run: Any, step: int) -> Any:
        if next(calls) == call and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step)

    sft.training.heldout_loss = patched


KILL_PLACES = {
    "load": (resume, "load"),
    "delete": (checkpoint, "delete"),
    "write_json": (checkpoint, "write_json"),
    "train_step": (sft.training, "train_step"),
}
PATCHES: dict[str, Callable[[Any], None]] = {
    "forget_adam_step": forget_adam_step,
    "lose_moments": lose_moments,
    "shift_moments": shift_moments,
    "lose_average": lose_average,
    "raise_lr": raise_lr,
    "poison": poison,
    "kill_before": kill_before,
    "average_over_packs": average_over_packs,
    "stop_in_samples": stop_in_samples,
    "leak_samples": leak_samples,
    "stop_in_heldout": stop_in_heldout,
    "sweep_before": sweep_before,
    "skip_restore": skip_restore,
    "sweep_steps": sweep_steps,
    "signal_at_sweep": signal_at_sweep,
    **invented_memory.PATCHES,
}

if __name__ == "__main__":
    main(sys.argv[1:])
