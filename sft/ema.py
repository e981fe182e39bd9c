"""An exponential moving average of the weights, kept by the ranks that own them (Polyak & Juditsky 1992).

    average <- d average + (1 - d) weights     after each update; d = min(ema_decay, (1 + step) / (10 + step))

Early in a run d is smaller, so that the base model does not outlive its weight in the average (as TensorFlow's
ExponentialMovingAverage with num_updates). It lies in the optimizer's state, beside the moments, and is saved with
them.
"""

from typing import Any

import torch

from sft.zero_state import EMA, flat_tensors

DECAY = "ema_decay"
"""Entry of a parameter group: d of the present step, set by sft.optim.set_rates."""


def decay_at(step: int, decay: float) -> float:
    """d of optimizer step `step`, from 1."""
    return min(decay, (1 + step) / (10 + step))


def attach(optimizer: Any) -> None:
    """Keep the average from now on, beginning with the present weights.

    Args:
        optimizer: DeepSpeed's, whose inner optimizer has its state.
    """
    inner = optimizer.optimizer
    for flat in flat_tensors(optimizer):
        inner.state[flat][EMA] = flat.detach().clone()
    inner.register_step_post_hook(_average)


@torch.no_grad()
def _average(inner: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """DeepSpeed steps one flat tensor at a time: only the groups' present parameters have been updated."""
    for group in inner.param_groups:
        for flat in group["params"]:
            inner.state[flat][EMA].lerp_(flat, 1 - group[DECAY])
