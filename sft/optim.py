"""Parameter groups and the optimizer of a run."""

import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sft import bf16_moments, ema
from sft.config import OptimSection
from sft.errors import UserError
from sft.lr_groups import Factors, count_layers, factor_at, factors_of
from sft.zero_state import PREFIX

MOMENTS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.float32}
"""What sft.zero_state.make_states makes, by optim.states; 8-bit optimizers make their own."""
LARGEST_BETA_BF16 = 0.99
"""bf16 numbers lie up to 1/128 of them apart: what changes a moment by less than half of that is rounded away."""
LARGEST_FLAT = 2**31 - 1
"""Elements of one tensor in bitsandbytes, which hands their number to its kernels as int32."""


def check_optimizer(optim: OptimSection, strategy: dict[str, Any], elements_per_rank: int) -> None:
    """Refuse an optimizer that cannot be built.

    Args:
        strategy: the DeepSpeed file.
        elements_per_rank: a rank's share of the model's elements.

    Raises:
        UserError: a library is missing, or the strategy does not go with it.
    """
    zero = strategy["zero_optimization"]
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    asked = f"optim.name {optim.name} with optim.states {optim.states}"
    if offloads and (optim.name, optim.states) != ("adamw", "fp32"):
        raise UserError(
            f"{asked}: offload_optimizer in the DeepSpeed file goes with adamw and fp32 alone; use these, or a file "
            "that does not offload the optimizer"
        )
    if optim.name == "lion" and optim.states == "8bit":
        raise UserError(
            f"{asked}: Lion steps by the sign of its moment, and 8 bits do not keep that of small ones; use bf16"
        )
    used = optim.betas[:1] if optim.name == "sgd" else optim.betas
    if optim.states == "bf16" and max(used) > LARGEST_BETA_BF16:
        raise UserError(
            f"{asked}: optim.betas {list(optim.betas)} change a moment by less than bf16 can hold, and it would stand "
            f"still; use at most {LARGEST_BETA_BF16}, or states fp32"
        )
    if not _needs_bitsandbytes(optim):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{asked}: needs bitsandbytes; pip install 'bitsandbytes>=0.50', or use another")
    largest = min(elements_per_rank, zero.get("sub_group_size", 10**9)) if zero["stage"] == 3 else elements_per_rank
    if largest > LARGEST_FLAT:
        raise UserError(
            f"{asked}: the DeepSpeed file lays {largest:,} elements of a rank into one tensor, and bitsandbytes takes "
            f"{LARGEST_FLAT:,}; use zero3 with sub_group_size 100000000"
        )
    if optim.name == "sgd" and optim.betas[0] == 0:
        raise UserError(f"{asked}: without momentum (optim.betas[0] 0) there is no state; use fp32")


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> list[dict[str, Any]]:
    """A group for each weight decay and learning rate: matrices decay; vectors and what `optim.no_decay` names do not.

    Each group has `lr_factors`, which set_rates reads. Under ZeRO-3 a parameter is stored flat, so its true
    shape is `ds_shape`, not `shape`.
    """
    trained = [
        (name.removeprefix(PREFIX), parameter) for name, parameter in named_parameters if parameter.requires_grad
    ]
    num_layers = count_layers([name for name, _ in trained])
    groups: dict[tuple[bool, Factors], list[nn.Parameter]] = {}
    for name, parameter in trained:
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        exempt = any(part in name for part in optim.no_decay)
        decays = is_matrix and not exempt
        groups.setdefault((decays, factors_of(name, optim, num_layers)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0, "lr_factors": factors}
        for (decays, factors), parameters in sorted(groups.items(), key=lambda group: not group[0][0])
    ]


def set_rates(
    groups: Iterable[dict[str, Any]], step: int, total_steps: int, lr: float, ema_decay: float | None
) -> None:
    """Put the rates of optimizer step `step`, from 1, into an optimizer's parameter groups."""
    for group in groups:
        group["lr"] = lr * factor_at(step, total_steps, group["lr_factors"])
        if ema_decay is not None:
            group[ema.DECAY] = ema.decay_at(step, ema_decay)


def build_optimizer(model: nn.Module, optim: OptimSection, *, on_cpu_beside_gpu: bool) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, which check_optimizer has let pass, over the model's groups.

    Every one is elementwise, so that the update of a flat part of a parameter is that part of the parameter's update.
    AdamW's states that are offloaded beside a GPU are stepped by DeepSpeed's vectorised CPU AdamW.
    """
    groups = parameter_groups(model.named_parameters(), optim)
    if on_cpu_beside_gpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    built = _build(groups, optim)
    if optim.states == "bf16":
        bf16_moments.attach(built)
    return built


def _build(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.Optimizer:
    if _needs_bitsandbytes(optim):
        return _build_bitsandbytes(groups, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _needs_bitsandbytes(optim: OptimSection) -> bool:
    return optim.name == "lion" or optim.states == "8bit"


def _build_bitsandbytes(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.Optimizer:
    # on some CPUs it warns, on every rank, that it has no 4-bit kernel, which nobody asks it for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import SGD, AdamW, Lion

    # every size in 8 bits: a flat tensor holds parts of many parameters, so its size says nothing about theirs
    bits: dict[str, Any] = {"lr": optim.lr, "optim_bits": 8 if optim.states == "8bit" else 32, "min_8bit_size": 0}
    if optim.name == "lion":
        return Lion(groups, betas=optim.betas, **bits)
    if optim.name == "sgd":
        return SGD(groups, momentum=optim.betas[0], **bits)
    return AdamW(groups, betas=optim.betas, eps=optim.eps, **bits)
