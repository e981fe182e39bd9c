"""L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483): a pull towards the base model's weights.

    w <- w - lr l2_sp (w - base)     after each update

Decoupled from the gradient like AdamW's weight decay (Loshchilov & Hutter 2019): Adam would otherwise divide the pull
by the root of the second moment, and pull those parameters least that the data moves most.
"""

from typing import Any

import torch

from sft.zero_state import flat_tensors


def attach(optimizer: Any, strength: float) -> None:
    """Pull towards the present weights, which must be the base model's, from now on.

    Args:
        optimizer: DeepSpeed's. Each rank keeps the base weights that it owns, in fp32, where the master weights are.
    """
    base = {flat: flat.detach().clone() for flat in flat_tensors(optimizer)}

    @torch.no_grad()
    def pull(inner: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        # DeepSpeed steps one flat tensor at a time: only the groups' present parameters have been updated
        for group in inner.param_groups:
            for flat in group["params"]:
                flat.lerp_(base[flat], min(1.0, group["lr"] * strength))  # 1: all the way, in the finder's sweep

    optimizer.optimizer.register_step_post_hook(pull)
