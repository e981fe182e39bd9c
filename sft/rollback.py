"""After a loss spike: back to the last checkpoint, and past the batches that led there.

The steps that are passed over stand in <run out>/rollbacks.json, so that a resumed run passes over them, too: a step
still is one number from which packs and learning rate follow.
"""

import json
import os
from pathlib import Path
from typing import Any

from sft import checkpoint
from sft.errors import GuardStop, UserError
from sft.guard import Spike
from sft.resume import on_first_rank


def passed_over(out: Path, identity: dict[str, Any]) -> dict[int, str]:
    """Steps (from 1) that are not to be taken, and why. Collective: what rank 0 reads counts."""
    rollbacks = on_first_rank(lambda: _read(out, identity))
    return {step: f"loss spike in step {entry['spike']}" for entry in rollbacks for step in entry["passed_over"]}


def prepare(out: Path, checkpoints: Path, spike: Spike, max_rollbacks: int, identity: dict[str, Any]) -> bool:
    """Note the steps to pass over and drop checkpoints of the abandoned steps. Collective.

    The batch before the spike's is passed over as well: its update may be what the loss shows one step later.

    Returns:
        Whether there is a checkpoint from before either batch; it is the newest one then.

    Raises:
        GuardStop: the run was rolled back often enough.
    """
    taken, possible = on_first_rank(lambda: _prepare(out, checkpoints, spike, max_rollbacks, identity))
    if taken >= max_rollbacks:
        raise GuardStop(
            f"{spike}; rolled back {max_rollbacks} times already. Usual causes: a learning rate that is too high, or "
            "damaged data (sft blame shows the documents of a step); the same command would stop here again: lower "
            "optim.lr in a new --out, raise guard.max_rollbacks, or set guard.on_spike to record"
        )
    return possible


def _prepare(
    out: Path, checkpoints: Path, spike: Spike, max_rollbacks: int, identity: dict[str, Any]
) -> tuple[int, bool]:
    """(rollbacks before this one, whether there is a checkpoint to go back to)."""
    rollbacks = _read(out, identity)
    taken = len(rollbacks)
    complete = [saved for saved in checkpoint.list_checkpoints(checkpoints) if checkpoint.is_complete(saved)]
    before = [saved for saved in complete if checkpoint.step_of(saved) < spike.step - 1]
    if taken >= max_rollbacks or not before:
        return taken, False
    # newest first, and before the note: after a kill in between, the run starts before the spike and meets it again
    for abandoned in reversed(complete[len(before) :]):
        checkpoint.delete(abandoned)
    steps = [spike.step - 1, spike.step]
    rollbacks.append({"spike": spike.step, "to": before[-1].name, "passed_over": steps, "of": _order(identity)})
    partial = out / "rollbacks.json.partial"
    checkpoint.write_json(partial, rollbacks)
    os.replace(partial, out / "rollbacks.json")
    checkpoint.sync_folder(out)
    return taken, True


def _read(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of this run: with another order of packs the same steps are other packs."""
    path = out / "rollbacks.json"
    if not path.exists():
        return []
    try:
        rollbacks = json.loads(path.read_text(encoding="utf-8"))
        for entry in rollbacks:
            steps, numbers = entry["passed_over"], [entry["spike"], *entry["passed_over"]]
            if not isinstance(steps, list) or not all(isinstance(number, int) for number in numbers):
                raise ValueError
        return [entry for entry in rollbacks if entry["of"] == _order(identity)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not what a run wrote; restore it, or choose another --out") from None


def _order(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: identity[key] for key in ("data_key", "data_seed", "rows_per_step")}
