"""Parameter groups and the optimizer of a run."""

from collections.abc import Iterable

import torch
from torch import nn

from sft.config import OptimSection


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimSection
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Two groups: matrices with weight decay; vectors and whatever `optim.no_decay` names without.

    Under ZeRO-3 a parameter is stored flat, so its true shape is `ds_shape`, not `shape`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        exempt = any(part in name for part in optim.no_decay)
        (decayed if is_matrix and not exempt else plain).append(parameter)
    groups = [(decayed, optim.weight_decay), (plain, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(model: nn.Module, optim: OptimSection, *, on_cpu_beside_gpu: bool) -> torch.optim.Optimizer:
    """AdamW over the model's groups; where states are offloaded beside a GPU, DeepSpeed's vectorised CPU AdamW."""
    groups = parameter_groups(model.named_parameters(), optim)
    if on_cpu_beside_gpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
