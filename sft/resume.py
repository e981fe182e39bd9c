"""From a checkpoint back into a live engine, on any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft import checkpoint, zero_state
from sft.checkpoint import CONSTANT, Pieces
from sft.errors import UserError


def load(engine: Any, saved: Path) -> None:
    """Put weights, moments, constants and optimizer step of `saved` into `engine`; collective.

    Raises:
        UserError: it is of another model, or incomplete.
    """
    meta = checkpoint.read_meta(saved)
    checkpoint.check_shapes(saved, meta["shapes"], zero_state.shapes(engine))
    optimizer = engine.optimizer
    zero_state.before_loading(optimizer)
    pieces = Pieces(saved)
    for state, flats in zero_state.state_tensors(optimizer).items():
        for part in zero_state.owned_slices(optimizer):
            target = flats[part.flat][part.flat_offset : part.flat_offset + part.numel]
            target.copy_(pieces.read(part.name, state, part.start, part.numel))
    zero_state.put_constants(engine, lambda name, start, numel: pieces.read(name, CONSTANT, start, numel))
    zero_state.set_optimizer_step(optimizer, meta["optimizer_step"])
    zero_state.refresh_compute_weights(optimizer)
    dist.barrier()


def choose(find: Callable[[], Path | None], tell: Callable[[str, Path], None]) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; collective, the ranks share the reading.

    A damaged one is set aside under another name, told of loudly, and never loaded. The last one keeps its name, so
    that the same command, started again by a scheduler, does not begin anew either.

    Args:
        find: gives the newest complete checkpoint.
        tell: called with what is wrong and the checkpoint's new place, on every rank.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    while (newest := agree(find())) is not None:
        names = from_first_rank(checkpoint.file_names(newest) if dist.get_rank() == 0 else None)
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, checkpoint.damage(newest, names[dist.get_rank() :: dist.get_world_size()]))
        lines = [line for rank_lines in found for line in rank_lines]
        if not lines:
            return newest
        if from_first_rank(_is_last(newest)):
            raise UserError(
                f"checkpoint {newest}: is damaged, and no other is left ({'; '.join(lines)}); put an intact copy in "
                "its place, or, to begin anew, choose another --out"
            )
        aside = from_first_rank(checkpoint.set_aside(newest) if dist.get_rank() == 0 else None)
        tell(f"checkpoint {newest} is damaged and will not be used: {'; '.join(lines)}", aside)
    return None


def _is_last(saved: Path) -> bool:
    complete = [other for other in checkpoint.list_checkpoints(saved.parent) if checkpoint.is_complete(other)]
    return complete == [saved]


def agree(newest: Path | None) -> Path | None:
    """Rank 0's answer on every rank: on a network file system the others may see an older folder."""
    return from_first_rank(newest)


def from_first_rank(value: Any) -> Any:
    """Rank 0's value on every rank; collective."""
    answer = [value]
    dist.broadcast_object_list(answer)
    return answer[0]
