"""Parameter groups and the optimizer of a run."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sft import ema
from sft.config import OptimSection
from sft.lr_groups import Factors, count_layers, factor_at, factors_of
from sft.zero_state import PREFIX


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
    """AdamW over the model's groups; where states are offloaded beside a GPU, DeepSpeed's vectorised CPU AdamW."""
    groups = parameter_groups(model.named_parameters(), optim)
    if on_cpu_beside_gpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
