"""Sequence parallelism: several ranks share each pack.

Each takes an equal part of the pack's tokens; in attention each takes all tokens of a part of the heads instead
(DeepSpeed Ulysses, Jacobs et al. 2023). For ZeRO they are ranks like any others: each computes a part of the step's
summed loss, and the sum over all ranks is the step's.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sft.batch import MicroBatch
from sft.errors import UserError


@dataclass(frozen=True)
class Shares:
    """Which packs, and which part of each, this rank takes. Neighbouring ranks share a pack."""

    data_rank: int
    """Of the group that shares a pack, among those groups."""
    data_ranks: int
    rank: int
    """Within the group."""
    size: int
    """Ranks of the group; 1: no pack is shared."""
    group: Any
    """The process group; None where size is 1."""


def data_ranks(world_size: int, size: int) -> int:
    """Groups of `size` ranks.

    Raises:
        UserError: they do not come out even.
    """
    if world_size % size:
        raise UserError(
            f"batch.sequence_parallel {size} does not divide the {world_size} ranks; use a divisor of {world_size}"
        )
    return world_size // size


def check_heads(size: int, model_config: dict[str, Any]) -> None:
    """Each rank must get equally many heads.

    Raises:
        UserError: it does not.
    """
    heads = model_config["num_attention_heads"]
    groups = model_config.get("num_key_value_heads") or heads
    if heads % size or (groups % size and size % groups):
        raise UserError(
            f"batch.sequence_parallel {size} does not divide the model's heads ({heads} of queries, {groups} of keys "
            "and values); use a divisor of both"
        )


def share_packs(size: int) -> Shares:
    """How the ranks of the process group share packs, `size` of them each. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = None
    if size > 1:
        ranks = [list(range(first, first + size)) for first in range(0, world_size, size)]
        group, _ = dist.new_subgroups_by_enumeration(ranks)
    return Shares(rank // size, world_size // size, rank % size, size, group)


def own_part(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """This rank's part of a micro-batch; all of it where packs are not shared."""
    if shares.size == 1:
        return batch
    raise NotImplementedError
