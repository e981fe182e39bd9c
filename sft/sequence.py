"""Sequence parallelism: several ranks share each pack.

Each takes an equal part of the pack's tokens; in attention each takes all tokens of a part of the heads instead
(DeepSpeed Ulysses, Jacobs et al. 2023). For ZeRO they are ranks like any others: each computes a part of the step's
summed loss, and the sum over all ranks is the step's.

Shape legend: T tokens of the micro-batch, t of them on this rank, N targets, M of them this rank's, H heads, h of them
this rank's, D head size, S ranks that share a pack, E hidden size.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from sft.batch import Layout, MicroBatch, to_device
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


NOT_SHARED = Shares(0, 1, 0, 1, None)
"""Of a rank alone."""


def data_ranks(world_size: int, size: int) -> int:
    """Groups of `size` ranks.

    Raises:
        UserError: they do not come out even.
    """
    if world_size % size:
        raise UserError(
            f"batch.sequence_parallel {size} does not divide the {world_size} ranks; use a divisor of {world_size}, or "
            f"a multiple of {size} ranks (--ranks)"
        )
    return world_size // size


def divides_heads(size: int, model_config: dict[str, Any]) -> bool:
    """Whether each of `size` ranks gets equally many heads."""
    heads, groups = _heads(model_config)
    return not heads % size and not (groups % size and size % groups)


def _heads(model_config: dict[str, Any]) -> tuple[int, int]:
    """(of queries, of keys and values)."""
    heads = model_config["num_attention_heads"]
    return heads, model_config.get("num_key_value_heads") or heads


def check_heads(size: int, model_config: dict[str, Any]) -> None:
    """Each rank must get equally many heads.

    Raises:
        UserError: it does not.
    """
    heads, groups = _heads(model_config)
    if not divides_heads(size, model_config):
        raise UserError(
            f"batch.sequence_parallel {size} does not divide the model's heads ({heads} of queries, {groups} of keys "
            "and values); use a divisor of both"
        )


def share_packs(size: int, timeout: timedelta | None = None) -> Shares:
    """How the ranks of the process group share packs, `size` of them each. Collective.

    `timeout`: of the group's collectives, which do not inherit that of all ranks; None: torch's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = None
    if size > 1:
        ranks = [list(range(first, first + size)) for first in range(0, world_size, size)]
        group, _ = dist.new_subgroups_by_enumeration(ranks, timeout)
    return Shares(rank // size, world_size // size, rank % size, size, group)


def own_part(batch: MicroBatch, shares: Shares) -> MicroBatch:
    """This rank's part of a micro-batch; all of it where packs are not shared.

    Every rank gets equally many tokens: a document of up to size - 1 tokens that weighs nothing fills the last part up.
    `layout` stays that of all tokens, since attention sees them all, and `targets_N` are those that this rank's tokens
    predict, also where the target itself is the next rank's. There may be none.
    """
    if shares.size == 1:
        return batch
    missing = -batch.ids_1T.shape[1] % shares.size
    seq_lens, cu_seqlens = batch.layout.seq_lens, batch.layout.cu_seqlens
    if missing:
        seq_lens, cu_seqlens = (*seq_lens, missing), torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])
    length = (batch.ids_1T.shape[1] + missing) // shares.size
    start = shares.rank * length
    predict = batch.predict_on_host
    own = np.flatnonzero((predict >= start) & (predict < start + length))
    own_M = to_device(own, batch.predict_N.device)
    positions_1T = torch.cat([batch.pos_1T, torch.arange(missing, device=own_M.device)[None]], dim=1)
    return replace(
        batch,
        ids_1T=pad(batch.ids_1T, (0, missing))[:, start : start + length],
        pos_1T=positions_1T[:, start : start + length],
        layout=Layout(seq_lens, cu_seqlens, shares.group),
        predict_N=batch.predict_N[own_M] - start,
        predict_on_host=predict[own] - start,
        targets_N=batch.targets_N[own_M],
        source_N=batch.source_N[own_M],
        start=start,
    )


def all_tokens(own_tE: torch.Tensor, shares: Shares) -> torch.Tensor:
    """[T, E] of every rank's [T / size, E], with what `own_part` has filled up at its end. Without gradient; collective
    within the group."""
    if shares.size == 1:
        return own_tE
    parts = [torch.empty_like(own_tE) for _ in range(shares.size)]
    dist.all_gather(parts, own_tE.contiguous(), group=shares.group)
    return torch.cat(parts)


def to_heads(x_1HtD: torch.Tensor, group: Any) -> torch.Tensor:
    """Own tokens of all heads [1, H, T / size, D] to all tokens of own heads [1, max(H, size) / size, T, D].

    Heads fewer than ranks are repeated: neighbouring ranks get the same one. Collective within the group.
    """
    size = dist.get_world_size(group)
    _, heads, length, width = x_1HtD.shape
    if heads < size:
        x_1HtD = x_1HtD.repeat_interleave(size // heads, dim=1)
    parts_ShtD = _Exchange.apply(x_1HtD.reshape(size, -1, length, width), group)
    return parts_ShtD.transpose(0, 1).reshape(1, -1, size * length, width)


def to_tokens(x_1ThD: torch.Tensor, group: Any) -> torch.Tensor:
    """All tokens of own heads [1, T, H / size, D] to own tokens of all heads [1, T / size, H, D]. Collective within the
    group."""
    size = dist.get_world_size(group)
    _, length, heads, width = x_1ThD.shape
    parts_SthD = _Exchange.apply(x_1ThD.reshape(size, length // size, heads, width), group)
    return parts_SthD.transpose(0, 1).reshape(1, length // size, size * heads, width)


class _Exchange(torch.autograd.Function):
    """x[i] goes to rank i of the group, whose part for this rank takes its place: its own inverse, and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x_S: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        received_S = torch.empty(x_S.shape, dtype=x_S.dtype, device=x_S.device)
        dist.all_to_all_single(received_S, x_S.contiguous(), group=group)
        return received_S

    @staticmethod
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grad_S, ctx.group), None
