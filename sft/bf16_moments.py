"""Moments that are held in bf16 and computed in fp32, for any optimizer whose update is elementwise.

They are widened before a step and rounded after it. DeepSpeed steps one flat tensor at a time, so that no more than one
is wide at once: under ZeRO-3 at most sub_group_size elements, under ZeRO-1 and 2 a parameter group's part of this rank.
"""

from typing import Any

import torch

from sft import moments


def attach(inner: torch.optim.Optimizer) -> None:
    """Hold the optimizer's moments in bf16 from its next step on."""
    inner.register_step_pre_hook(_widen)
    inner.register_step_post_hook(_round)


def _widen(inner: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    _turn(inner, torch.float32)


def _round(inner: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    _turn(inner, torch.bfloat16)


def _turn(inner: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    keys = moments.keys(inner).values()
    for group in inner.param_groups:
        for flat in group["params"]:
            state = inner.state.get(flat, {})
            state.update({key: state[key].to(dtype) for key in keys if key in state})
