"""From a checkpoint back into a live engine, on any number of ranks."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft import checkpoint, zero_state
from sft.checkpoint import CONSTANT, Pieces
from sft.errors import UserError
from sft.quantised import Quantised


def load(engine: Any, saved: Path) -> None:
    """Put weights, every state that the run keeps, constants and optimizer step of `saved` into `engine`; collective.

    Raises:
        UserError: it is of another model, incomplete, or lacks a state.
    """
    meta = on_first_rank(lambda: checkpoint.read_meta(saved))
    checkpoint.check_shapes(saved, meta["shapes"], zero_state.shapes(engine))
    optimizer = engine.optimizer
    zero_state.before_loading(optimizer)
    pieces = Pieces(saved, list(meta["files"]), dist.get_rank() / dist.get_world_size())
    states = zero_state.state_tensors(optimizer)
    _check_states(saved, meta, states)
    slices = list(zero_state.owned_slices(optimizer))
    for state, flats in states.items():
        for index, flat in enumerate(flats):
            values = torch.zeros(flat.numel()) if isinstance(flat, Quantised) else flat
            for part in slices:
                if part.flat == index:
                    target = values[part.flat_offset : part.flat_offset + part.numel]
                    target.copy_(pieces.read(part.name, state, part.start, part.numel))
            if isinstance(flat, Quantised):
                flat.copy_(values)
    zero_state.put_constants(engine, lambda name, start, numel: pieces.read(name, CONSTANT, start, numel))
    zero_state.set_optimizer_step(optimizer, meta["optimizer_step"])
    zero_state.refresh_compute_weights(optimizer)
    dist.barrier()


def _check_states(saved: Path, meta: dict[str, Any], kept: Collection[str]) -> None:
    there = meta.get("states", zero_state.STATES)
    if lacking := [state for state in kept if state not in there]:
        raise UserError(
            f"checkpoint {saved}: holds {', '.join(there)}, and this run also keeps {', '.join(lacking)}; choose "
            "another --out, or restore optim.name and train.ema_decay"
        )


def choose(find: Callable[[], Path | None], tell: Callable[[str, Path], None]) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; collective, the ranks share the reading.

    A damaged one is set aside under another name, told of loudly, and never loaded. The last one keeps its name, so
    that the same command, started again by a scheduler, does not begin anew either.

    Args:
        find: gives the newest complete checkpoint; called on rank 0.
        tell: called with what is wrong and the checkpoint's new place, on every rank.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    while (newest := on_first_rank(find)) is not None:
        digests = on_first_rank(lambda: checkpoint.digests(newest))
        own = dict(list(digests.items())[dist.get_rank() :: dist.get_world_size()])
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, checkpoint.damage(newest, own))
        lines = [line for rank_lines in found for line in rank_lines]
        if not lines:
            return newest
        if on_first_rank(lambda: _is_last(newest)):
            raise UserError(
                f"checkpoint {newest}: is damaged, and no other is left ({'; '.join(lines)}); put an intact copy in "
                "its place, or, to begin anew, choose another --out"
            )
        aside = on_first_rank(lambda: checkpoint.set_aside(newest))
        tell(f"checkpoint {newest} is damaged and will not be used: {'; '.join(lines)}", aside)
    return None


def _is_last(saved: Path) -> bool:
    complete = [other for other in checkpoint.list_checkpoints(saved.parent) if checkpoint.is_complete(other)]
    return complete == [saved]


def on_first_rank(act: Callable[[], Any]) -> Any:
    """What `act` gives on rank 0, on every rank; collective.

    One look for all: on a network file system the others may see an older folder, and a thousand ranks that look at a
    thousand files each would be slow.

    Raises:
        UserError, OSError: what `act` raised on rank 0; on every rank.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
