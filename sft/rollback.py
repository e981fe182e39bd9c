"""After a loss spike: back to the last checkpoint, and past the batches that led there.

The steps that are passed over stand in <run out>/rollbacks.json, so that a resumed run passes over them, too: a step
still is one number from which packs and learning rate follow.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft import checkpoint
from sft.errors import GuardStop
from sft.guard import Spike
from sft.resume import from_first_rank


def passed_over(out: Path) -> dict[int, str]:
    """Steps (from 1) that are not to be taken, and why. Collective: what rank 0 reads counts."""
    rollbacks = from_first_rank(_read(out))
    return {step: f"loss spike in step {entry['spike']}" for entry in rollbacks for step in entry["passed_over"]}


def prepare(out: Path, checkpoints: Path, spike: Spike, max_rollbacks: int) -> Path | None:
    """Note the steps to pass over and drop checkpoints of the abandoned steps. Collective.

    The batch before the spike's is passed over as well: its update may be what the loss shows one step later.

    Returns:
        The checkpoint to load, which was written before either batch; None where there is none.

    Raises:
        GuardStop: the run was rolled back often enough.
    """
    taken, saved = from_first_rank(_prepare(out, checkpoints, spike, max_rollbacks) if dist.get_rank() == 0 else None)
    if taken >= max_rollbacks:
        raise GuardStop(
            f"{spike}; rolled back {max_rollbacks} times already (guard.max_rollbacks). Usual causes: a learning rate "
            "that is too high, or damaged data; sft blame shows the documents of a step"
        )
    return saved


def _prepare(out: Path, checkpoints: Path, spike: Spike, max_rollbacks: int) -> tuple[int, Path | None]:
    """(rollbacks before this one, checkpoint to load)."""
    rollbacks = _read(out)
    taken = len(rollbacks)
    complete = [saved for saved in checkpoint.list_checkpoints(checkpoints) if checkpoint.is_complete(saved)]
    before = [saved for saved in complete if checkpoint.read_meta(saved)["step"] < spike.step - 1]
    if taken >= max_rollbacks or not before:
        return taken, None
    # newest first, and before the note: after a kill in between, the run starts before the spike and meets it again
    for abandoned in reversed(complete[len(before) :]):
        checkpoint.delete(abandoned)
    rollbacks.append({"spike": spike.step, "to": before[-1].name, "passed_over": [spike.step - 1, spike.step]})
    partial = out / "rollbacks.json.partial"
    checkpoint.write_json(partial, rollbacks)
    os.replace(partial, out / "rollbacks.json")
    checkpoint.sync_folder(out)
    return taken, before[-1]


def _read(out: Path) -> list[dict[str, Any]]:
    path = out / "rollbacks.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
