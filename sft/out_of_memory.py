"""A rank that runs out of memory says what was under way and what to change, the cheapest first."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sft.auto_batch import divisors, read_record
from sft.config import RunConfig
from sft.errors import UserError
from sft.inputs import RunInputs
from sft.sequence import divides_heads
from sft.watchdog import Watchdog

HOST_SIGN = "can't allocate memory"
"""In messages of torch's allocator on the host."""
SIGNS = ("out of memory", HOST_SIGN)
"""In messages of CUDA and NCCL; on the host."""
WASTE = 0.1
"""Memory that is reserved but in no use, as a part of what is in use, from which on gaps are worth mending."""
LOADING = "loading the model"
UNITS = {"MiB": 2**20, "GiB": 2**30}


@contextmanager
def explained(config: RunConfig, inputs: RunInputs, out: Path, watch: Watchdog) -> Iterator[None]:
    """Around everything that a rank does with the model.

    Raises:
        UserError: this rank ran out of memory. The others learn it from the watchdog.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = f"rank {os.environ.get('RANK', '0')} on {os.uname().nodename}"
        micro_batch = read_record(out) if config.batch.micro_batch == "auto" else config.batch.micro_batch
        progress = watch.progress
        changes = remedies(config, inputs, micro_batch, str(error), progress.phase == LOADING)
        raise UserError(
            f"{where}: out of memory at {progress.place}{figures(str(error))}; in order of cost: {'; '.join(changes)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, or of the host."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in SIGNS)


def remedies(
    config: RunConfig, inputs: RunInputs, micro_batch: int | None, message: str = "", loading: bool = False
) -> list[str]:
    """What to change, the cheapest first, without what is in force already.

    Args:
        micro_batch: the one in force; None: auto has found none.
        message: of the error.
        loading: the model did not fit, before any pack was read.
    """
    changes = ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment (closes gaps)"] * has_gaps(message)
    if not loading:
        changes += _smaller_forwards(config, inputs, micro_batch)
    zero = inputs.strategy["zero_optimization"]
    if zero["stage"] < 3:
        changes.append(f"deepspeed zero3 instead of {config.deepspeed} (spreads all of the model over the ranks)")
    elif (zero.get("offload_optimizer") or {}).get("device") != "cpu" and HOST_SIGN not in message:
        changes.append(f"deepspeed zero3_offload_optimizer instead of {config.deepspeed} (slower updates)")
    return [*changes, f"more GPUs (now {inputs.world_size})"]


def _smaller_forwards(config: RunConfig, inputs: RunInputs, micro_batch: int | None) -> list[str]:
    changes = []
    if micro_batch is not None and micro_batch > 1:
        sizes = divisors(config.batch.rows_per_step // inputs.data_ranks)
        lower = max(size for size in sizes if size <= micro_batch // 2)
        found = "auto, which found " if config.batch.micro_batch == "auto" else ""
        changes.append(f"batch.micro_batch {lower} instead of {found}{micro_batch} (the same update)")
    if config.model.activation_checkpointing != "full":
        changes.append("model.activation_checkpointing full instead of none (a third more compute)")
        return changes
    longer = []
    if config.model.mlp_tiles == 1:
        longer.append("model.mlp_tiles 4 instead of 1")
    if config.batch.sequence_parallel == 1 and inputs.world_size % 2 == 0 and divides_heads(2, inputs.model_config):
        longer.append("batch.sequence_parallel 2 instead of 1")
    return [*changes, f"{' or '.join(longer)} (for long documents)"] if longer else changes


def has_gaps(message: str) -> bool:
    """Whether much memory is reserved but in no use, by the figures of torch's own message."""
    used, idle = (_bytes(message, f"{what} by PyTorch") for what in ("allocated", "reserved"))
    return used > 0 and idle > WASTE * used


def figures(message: str) -> str:
    """How much was asked for, and of how much, where torch's message says so; else what an exception of ours says."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
    total = re.search(r"total capacity of ([\d.]+ \w+)", message)
    if asked is None:
        return f" ({message.splitlines()[0][:120]})" if message else ""
    return f" (asked for {asked[1]} more{f' of {total[1]}' if total else ''})"


def _bytes(message: str, what: str) -> float:
    found = re.search(rf"([\d.]+) (MiB|GiB) is {what}", message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0
