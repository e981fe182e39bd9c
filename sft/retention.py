"""Which checkpoints are kept, and the disk that a run will need."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.checkpoint import is_complete, list_checkpoints, read_meta
from sft.config import CheckpointSection
from sft.errors import UserError
from sft.zero_state import STATES

GIB = 2**30


def kept(losses: Mapping[int, float | None], keep: CheckpointSection) -> set[int]:
    """Steps to keep of those that have a complete checkpoint, given the held-out loss of each (None: not measured).

    The newest `keep_last`; the one with the lowest loss (the newer one of two equals); every multiple of `keep_every`.
    """
    steps = set(sorted(losses)[-keep.keep_last :])
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if keep.keep_best and measured:
        steps.add(min(measured, key=lambda step: (measured[step], -step)))
    if keep.keep_every:
        steps |= {step for step in losses if step % keep.keep_every == 0}
    return steps


def superfluous(folder: Path, keep: CheckpointSection) -> list[Path]:
    """Complete checkpoints that `keep` does not ask for. To be called when the newest one is complete."""
    complete = {checkpoint: read_meta(checkpoint) for checkpoint in list_checkpoints(folder) if is_complete(checkpoint)}
    wanted = kept({meta["step"]: meta["heldout_loss"] for meta in complete.values()}, keep)
    return [checkpoint for checkpoint, meta in complete.items() if meta["step"] not in wanted]


def most_checkpoints(keep: CheckpointSection, total_steps: int, *, heldout: bool) -> int:
    """Complete or half-written checkpoints that are on the disk together at most.

    One more than are kept: nothing is deleted before its successor is complete.
    """
    saved = math.ceil(total_steps / keep.every)
    for_ever = total_steps // math.lcm(keep.every, keep.keep_every) if keep.keep_every else 0
    return min(saved, keep.keep_last + int(keep.keep_best and heldout) + for_ever + 1)


def checkpoint_bytes(num_parameters: int) -> int:
    """Size of one checkpoint: fp32 weights and two fp32 moments of each parameter, 12 bytes."""
    return 4 * len(STATES) * num_parameters


def num_parameters(model: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, read from their headers."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def check_disk(
    out: Path, model: Path, keep: CheckpointSection, total_steps: int, *, heldout: bool, export_itemsize: int
) -> dict[str, Any]:
    """Refuse a run whose checkpoints and export cannot fit; what it has written already counts as room.

    Returns:
        need_gib, free_gib, checkpoint_gib, checkpoints: for the start event.

    Raises:
        UserError: names what is needed, what is free, and what to change.
    """
    one = checkpoint_bytes(num_parameters(model))
    count = most_checkpoints(keep, total_steps, heldout=heldout)
    export = num_parameters(model) * export_itemsize
    there = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    need = one * count + export
    if need > free + there:
        raise UserError(
            f"--out {out}: {count} checkpoints of {one / GIB:,.1f} GiB and the export need {need / GIB:,.1f} GiB, but "
            f"{(free + there) / GIB:,.1f} GiB are free there; lower checkpoint.keep_last ({keep.keep_last}), raise "
            f"checkpoint.keep_every, or choose another --out"
        )
    return {
        "checkpoint_gib": round(one / GIB, 3),
        "checkpoints": count,
        "need_gib": round(need / GIB, 3),
        "free_gib": round((free + there) / GIB, 3),
    }
