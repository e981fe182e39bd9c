"""Ranks that share the scoring: a launcher starts them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sft.errors import UserError

TIMEOUT = timedelta(hours=2)
"""One rank may read its weights, or finish its last bins, long before another."""

PLACE = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on all of them. Collective."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, given to all; its UserError is raised on all. Collective."""
        outcome: tuple[Any, str | None] = (None, "the first rank has failed")
        try:
            if self.rank == 0:
                outcome = work(), None
        except UserError as error:
            outcome = None, str(error)
        finally:  # whatever ended the work: the others wait for this
            value, problem = self.from_first(outcome)
        if problem is not None:
            raise UserError(problem)
        return value


def read_place() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher's environment says; (0, 1) without a launcher.

    Raises:
        UserError: the variables hold no such numbers, or do not say where the first rank is.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"environment: RANK is {rank!r}, WORLD_SIZE is {world!r}; launchers set them: unset both")
    if int(world) > 1 and (missing := [name for name in PLACE if name not in os.environ]):
        raise UserError(f"environment: WORLD_SIZE is {world}, but {missing[0]} is not set; unset it, or use a launcher")
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
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()
