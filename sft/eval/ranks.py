"""Replicas that share the scoring: a launcher starts them, each holds the whole model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sft.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its replicas."""

    rank: int
    world: int
    device: torch.device


def read_place() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher's environment says; (0, 1) without a launcher.

    Raises:
        UserError: the variables hold no numbers.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal()):
        raise UserError(f"environment: RANK is {rank!r}, WORLD_SIZE is {world!r}; launchers set numbers: unset them")
    return int(rank), int(world)


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Take part in the launcher's group (WORLD_SIZE > 1 in the environment), or be alone."""
    rank, world = read_place()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if has_gpu else "gloo")
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


def merge(sums: torch.Tensor, written: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add up what the ranks scored: float64 [requests], zero where another rank writes.

    Args:
        sums: this rank's scores.
        written: how often this rank wrote each of them, same shape.

    Raises:
        RuntimeError: a score was not written exactly once; the sharding is wrong.
    """
    both = torch.stack([sums, written]).to(ranks.device)
    if ranks.world > 1:
        dist.all_reduce(both)
    both = both.cpu()
    if not bool((both[1] == 1).all()):
        raise RuntimeError(f"{int((both[1] != 1).sum())} of {len(sums)} requests were not scored exactly once")
    return both[0]
