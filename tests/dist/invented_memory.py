"""What is done to runs of run_worker so that memory is what a test says: invented, too small, or gone."""

import os
from collections.abc import Callable
from typing import Any

import torch

from sft import auto_batch, batch, order, peak_memory, zero_state

GIB = 2**30
GPU_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.09 GiB is free."
    " Including non-PyTorch memory, this process has 78.02 GiB memory in use. Of the allocated memory 60.00 GiB is "
    "allocated by PyTorch, and 16.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
"""As torch words it."""


def invent(by_rank: list[list[float]]) -> None:
    """For each rank [GiB that are always taken, GiB per pack, GiB of the device]."""
    taken, per_pack, total = (number * GIB for number in by_rank[int(os.environ["RANK"])])
    from_shards, packs = batch.from_shards, 0

    def counted(shards: Any, rows: order.Rows, *rest: Any) -> batch.MicroBatch:
        nonlocal packs
        packs = max(packs, int((rows != order.FILLER).sum()))
        return from_shards(shards, rows, *rest)

    def begin(_device: torch.device) -> None:
        nonlocal packs
        packs = 0

    batch.from_shards, peak_memory.begin = counted, begin
    peak_memory.in_use = lambda _device: int(taken)
    peak_memory.peak = lambda _device: int(taken + per_pack * packs)
    peak_memory.capacity = lambda _device, _local_ranks: int(total)


def run_out(argument: list[int]) -> None:
    """[rank, call]: that rank's GPU is full at the given call of batch.from_shards."""
    rank, call = argument
    from_shards, calls = batch.from_shards, iter(range(1, 10_000))

    def full(*arguments: Any) -> batch.MicroBatch:
        if next(calls) == call and int(os.environ["RANK"]) == rank:
            raise torch.OutOfMemoryError(GPU_MESSAGE)
        return from_shards(*arguments)

    batch.from_shards = full


def keep_states(path: str) -> None:
    """Write down everything that training could see of the optimizer and the weights before and after the trials."""
    resolve = auto_batch.resolve

    def kept(run: Any, leave_if_asked: Callable[[], None]) -> Any:
        before = _everything(run.engine)
        resolved = resolve(run, leave_if_asked)
        torch.save([before, _everything(run.engine)], f"{path}.{os.environ['RANK']}.pt")
        return resolved

    auto_batch.resolve = kept


def keep_moments(_: Any) -> None:
    """Trials that leave their moments behind."""
    auto_batch.forget_updates = lambda *_: None


def raise_lr(lr: float) -> None:
    """Trials that train."""
    set_rates = auto_batch.set_rates
    auto_batch.set_rates = lambda groups, step, total, _, decay: set_rates(groups, step, total, lr, decay)


def _everything(engine: Any) -> dict[str, torch.Tensor]:
    optimizer = engine.optimizer
    found = {
        f"{name} {index}": flat.detach().clone()
        for name, flats in zero_state.state_tensors(optimizer).items()
        for index, flat in enumerate(flats)
    }
    weights = {name: getattr(weight, "ds_tensor", weight) for name, weight in engine.module.named_parameters()}
    found |= {name: weight.detach().clone() for name, weight in weights.items()}
    found["step"] = torch.tensor(zero_state.optimizer_step(optimizer))
    return found


PATCHES: dict[str, Callable[[Any], None]] = {
    "invent_memory": invent,
    "run_out": run_out,
    "keep_states": keep_states,
    "keep_moments": keep_moments,
    "train_in_trials": raise_lr,
}
