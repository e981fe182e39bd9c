"""Which checkpoints are kept, and the disk that a run will need."""

import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sft.checkpoint import is_complete, list_checkpoints, read_meta
from sft.config import CheckpointSection, OptimSection
from sft.errors import UserError
from sft.moments import MOMENTS
from sft.weight_files import num_parameters

GIB = 2**30
EXPORTS = ("export", "export.partial", "export-ema", "export-ema.partial")
"""Folders that the end of a run writes."""


def kept(losses: Mapping[int, float | None], keep: CheckpointSection) -> set[int]:
    """Steps to keep of those that have a complete checkpoint, given the held-out loss of each (None: not measured).

    The newest `keep_last`; the one with the lowest loss (the newer one of two equals); every multiple of `keep_every`.
    """
    steps = set(sorted(losses)[-keep.keep_last :])
    if keep.keep_best and (best := _best(losses)) is not None:
        steps.add(best)
    if keep.keep_every:
        steps |= {step for step in losses if step % keep.keep_every == 0}
    return steps


def superfluous(folder: Path, keep: CheckpointSection) -> list[Path]:
    """Complete checkpoints that `keep` does not ask for. To be called when the newest one is complete."""
    complete = _complete(folder)
    wanted = kept({step: meta["heldout_loss"] for step, (_, meta) in complete.items()}, keep)
    return [checkpoint for step, (checkpoint, _) in complete.items() if step not in wanted]


def most_checkpoints(keep: CheckpointSection, total_steps: int, *, heldout: bool, present: Collection[int] = ()) -> int:
    """Complete or half-written checkpoints that are on the disk together at most, until this process ends.

    One more than are kept, or than there are: nothing is deleted before its successor is complete. A process that is
    asked to stop saves once more, at any step, instead of what it would have saved later.

    Args:
        present: steps of the checkpoints that earlier processes of the run have left.
    """
    newest = max(present, default=0)
    to_save = math.ceil(total_steps / keep.every) - newest // keep.every if newest < total_steps else 0
    for_ever = 0
    if keep.keep_every:
        multiple = math.lcm(keep.every, keep.keep_every)
        for_ever = total_steps // multiple
        for_ever += sum(step % keep.keep_every == 0 and (step % multiple > 0 or step > total_steps) for step in present)
    kept_at_most = keep.keep_last + int(keep.keep_best and heldout) + for_ever
    return min(len(present) + to_save, max(len(present), kept_at_most) + 1)


def bytes_per_parameter(optim: OptimSection, ema_decay: float | None) -> int:
    """What a checkpoint holds of each parameter: 12 with fp32 weights and AdamW's two fp32 moments.

    8-bit moments are saved as the fp32 values that they stand for, bf16 ones as they are; an average is fp32.
    """
    moments = len(MOMENTS[optim.name]) * (2 if optim.states == "bf16" else 4)
    return 4 + moments + (4 if ema_decay is not None else 0)


def exported_bytes_per_parameter(precision: str, ema_decay: float | None) -> int:
    """What the end of a run exports of each parameter: the weights, and the average where one is kept."""
    return (4 if precision == "fp32" else 2) * (1 if ema_decay is None else 2)


def best_checkpoint(folder: Path) -> Path:
    """The complete checkpoint with the lowest held-out loss, the newer one of two equals; without any measured, the
    newest.

    Raises:
        UserError: there is no complete checkpoint.
    """
    complete = _complete(folder)
    if not complete:
        raise UserError(f"{folder}: holds no complete checkpoint to export")
    best = _best({step: meta["heldout_loss"] for step, (_, meta) in complete.items()})
    return complete[max(complete) if best is None else best][0]


def _best(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest loss, the newer one of two equals; None where no loss is a number."""
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(measured, key=lambda step: (measured[step], -step)) if measured else None


def _complete(folder: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Folder and meta.json of every complete checkpoint, by step."""
    found = [(path, read_meta(path)) for path in list_checkpoints(folder) if is_complete(path)]
    return {meta["step"]: (path, meta) for path, meta in found}


def check_disk(
    out: Path,
    model: Path,
    keep: CheckpointSection,
    total_steps: int,
    *,
    heldout: bool,
    saved_itemsize: int,
    exported_itemsize: int,
) -> dict[str, Any]:
    """Refuse a run whose checkpoints and exports cannot fit; what it has written of them already counts as room.

    Args:
        saved_itemsize: bytes that a checkpoint holds of each parameter.
        exported_itemsize: bytes that all exports together hold of each.

    Returns:
        need_gib, free_gib, checkpoint_gib, checkpoints: for the start event.

    Raises:
        UserError: names what is needed, what is free, and what to change.
    """
    elements = num_parameters(model)
    one = elements * saved_itemsize
    count = most_checkpoints(keep, total_steps, heldout=heldout, present=_complete(out / "checkpoints"))
    exports = elements * exported_itemsize
    written = [
        *(out / "checkpoints").glob("step-*/*"),
        *(file for name in EXPORTS for file in (out / name).glob("*")),
    ]
    there = sum(file.stat().st_size for file in written if file.parent.suffix != ".damaged")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    need = one * count + exports
    if need > free + there:
        rarer = f", raise checkpoint.keep_every ({keep.keep_every})" if keep.keep_every else ""
        raise UserError(
            f"--out {out}: {count} checkpoints of {one / GIB:,.1f} GiB and exports of {exports / GIB:,.1f} GiB need "
            f"{need / GIB:,.1f} GiB, but {(free + there) / GIB:,.1f} GiB are free or hold what the run has written; "
            f"lower checkpoint.keep_last ({keep.keep_last}){rarer}, delete older checkpoints, or choose another --out"
        )
    return {
        "checkpoint_gib": round(one / GIB, 3),
        "checkpoints": count,
        "need_gib": round(need / GIB, 3),
        "free_gib": round((free + there) / GIB, 3),
    }
