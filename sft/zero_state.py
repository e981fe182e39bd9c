"""What this rank owns of a model under ZeRO: the only place that knows how DeepSpeed partitions it.

Read from DeepSpeed 0.19.8's optimizers through attributes that are not a public interface: the version is pinned,
and tests compare a resumed run with an uninterrupted one on every stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sft import moments
from sft.moments import Held

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""Master weights and Adam's two moments: what a checkpoint holds whose meta.json has no list of states."""
EMA = "ema"
"""The moving average of the master weights, fp32; see sft.ema."""
PREFIX = "hf."
"""PackedCausalLM's attribute; stripped, so that a checkpoint names parameters as transformers does."""


@dataclass(frozen=True)
class Slice:
    """A run of one flattened parameter that this rank owns, inside one of the optimizer's flat fp32 tensors."""

    name: str
    start: int
    numel: int
    flat: int
    """Index of the flat tensor."""
    flat_offset: int


@dataclass(frozen=True)
class Constant:
    """What no optimizer steps but a model needs: a frozen parameter, or a persistent buffer; this rank's part of it."""

    name: str
    start: int
    tensor: torch.Tensor
    """1-D view of the live values, in their own dtype."""


def flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors that this rank's optimizer steps."""
    if _is_stage3(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "bf16_groups"):  # what DeepSpeed makes of ZeRO-1 in bf16 with fp32 accumulation
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def state_tensors(optimizer: Any) -> dict[str, list[Held]]:
    """The live flat tensors of the master weights ("fp32"), of each moment, and of EMA where an average is kept."""
    inner, flats = optimizer.optimizer, flat_tensors(optimizer)
    states: dict[str, list[Held]] = {STATES[0]: [flat.detach() for flat in flats]}
    for flat in flats:
        for name, held in moments.held(inner, flat).items():
            states.setdefault(name, []).append(held)
    if EMA in inner.state[flats[0]]:
        states[EMA] = [inner.state[flat][EMA] for flat in flats]
    return states


def make_states(optimizer: Any, dtype: torch.dtype = torch.float32) -> None:
    """Make the optimizer's state as zeros, which it would otherwise do at its first step.

    Args:
        dtype: of moments that are not 8-bit.
    """
    for flat in flat_tensors(optimizer):
        moments.make(optimizer.optimizer, flat, dtype)
    set_optimizer_step(optimizer, 0)


def owned_slices(optimizer: Any) -> Iterator[Slice]:
    """What this rank owns of each trained parameter, for ZeRO-1, 2 and 3."""
    yield from _stage3_slices(optimizer) if _is_stage3(optimizer) else _stage12_slices(optimizer)


def constants(engine: Any) -> Iterator[Constant]:
    """This rank's part of each frozen parameter; persistent buffers, and what is not partitioned, on rank 0 alone."""
    first = dist.get_rank() == 0
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            start = dist.get_rank(parameter.ds_process_group) * parameter.partition_numel()
            numel = min(parameter.partition_numel(), parameter.ds_numel - start)
            if numel > 0:
                yield Constant(_name(name), start, parameter.ds_tensor.detach().view(-1)[:numel])
        elif first:
            yield Constant(_name(name), 0, parameter.detach().view(-1))
    if first:
        yield from (Constant(name, 0, buffer.detach().view(-1)) for name, buffer in _buffers(engine).items())


def shapes(engine: Any) -> dict[str, list[int]]:
    """Whole shape of every parameter and persistent buffer, by transformers' names; tied weights once."""
    parameters = engine.module.named_parameters()
    whole = {_name(name): list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}
    return whole | {name: list(buffer.shape) for name, buffer in _buffers(engine).items()}


def put_constants(engine: Any, read: Callable[[str, int, int], torch.Tensor]) -> None:
    """Set frozen parameters and buffers to `read(name, start, numel)`, on the ranks that hold them."""
    for constant in constants(engine):
        constant.tensor.copy_(read(constant.name, constant.start, constant.tensor.numel()))
    for parameter in engine.module.parameters():
        if not parameter.requires_grad and not hasattr(parameter, "ds_tensor"):
            dist.broadcast(parameter.data, 0)
    for buffer in _buffers(engine).values():
        dist.broadcast(buffer, 0)


def optimizer_step(optimizer: Any) -> int:
    """Updates that the optimizer has counted; 0 of torch's SGD, which does not."""
    return moments.step(optimizer.optimizer, flat_tensors(optimizer)[0])


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """Make Adam's bias correction go on from `step`."""
    for flat in flat_tensors(optimizer):
        moments.set_step(optimizer.optimizer, flat, step)


def before_loading(optimizer: Any) -> None:
    """Let go of gathered parameters, which loading would leave stale."""
    if _is_stage3(optimizer):
        optimizer.checkpoint_event_prologue()


def refresh_compute_weights(optimizer: Any) -> None:
    """Round the fp32 master weights into the weights that forwards use."""
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        parts = optimizer.unflatten(
            optimizer.fp16_partitioned_groups_flat[index], optimizer.fp16_partitioned_groups[index]
        )
        for partition, part in zip(optimizer.fp16_partitioned_groups[index], parts, strict=True):
            partition.data = part.data
    optimizer.checkpoint_event_epilogue()


def _stage3_slices(optimizer: Any) -> Iterator[Slice]:
    rank = dist.get_rank(optimizer.dp_process_group)
    for flat, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            per_rank = parameter.partition_numel()
            start = rank * per_rank
            numel = min(per_rank, parameter.ds_numel - start)  # the last ranks' partitions are padded, or empty
            if numel > 0:
                yield Slice(_name(optimizer.param_names[parameter]), start, numel, flat, offset)
            offset += per_rank


def _stage12_slices(optimizer: Any) -> Iterator[Slice]:
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for flat, parameters in enumerate(groups):
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Slice(_name(optimizer.param_names[parameter]), low.start, low.numel, flat, high.start)


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _buffers(engine: Any) -> dict[str, torch.Tensor]:
    """Buffers that a state dict would hold."""
    found = {}
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[_name(name)] = buffer
    return found


def _name(engine_name: str) -> str:
    return engine_name.removeprefix(PREFIX)
