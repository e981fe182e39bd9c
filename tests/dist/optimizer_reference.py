"""The update rules written out: plain fp32 on whole parameters, in one process, for tests.dist.test_optimizers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_prep.shards import open_shards
from sft.config import OptimSection, ScheduleSection
from sft.order import FILLER, step_rows
from sft.schedule import lr_at
from tests.dist.training import _step_loss

Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """A parameter's own: moments by name, average, base weights."""

    moments: Tensors
    ema: torch.Tensor
    base: torch.Tensor


def train(
    model_path: Path, data: Path, steps: int, total_steps: int, rows_per_step: int, optim: OptimSection,
    factors: dict[str, float], ema_decay: float | None = None, scale_error: float = 1.0,
) -> Tensors:  # fmt: skip
    """What a run comes to: parameters, moments and averages, flattened, by "<name>|<state>".

    `factors`: of the learning rate, by part of the name; the first that is found holds. `scale_error`: what a wrong
    scale would do to the second moment at every step.
    """
    shards = open_shards(data / "train")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    named = dict(model.named_parameters())
    states = {name: State({}, p.detach().clone(), p.detach().clone()) for name, p in named.items()}
    for step in range(1, steps + 1):
        rows = [int(row) for row in step_rows(0, step - 1, len(shards), rows_per_step) if row != FILLER]
        model.zero_grad()
        _step_loss(model, shards, rows, None).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), optim.grad_clip)
        rate = lr_at(step, total_steps, optim.lr, ScheduleSection(warmup=0))
        with torch.no_grad():
            for name, p in named.items():
                lr = rate * next((factor for part, factor in factors.items() if part in name), 1.0)
                decay = 0.0 if "embed" in name or "norm" in name else optim.weight_decay
                state = states[name]
                UPDATES[optim.name](p, p.grad, state.moments, lr, decay, optim, step)
                if optim.states == "bf16":
                    state.moments = {key: moment.bfloat16().float() for key, moment in state.moments.items()}
                if "exp_avg_sq" in state.moments:
                    state.moments["exp_avg_sq"] *= scale_error
                p.sub_(lr * optim.l2_sp * (p - state.base))
                if ema_decay is not None:
                    d = min(ema_decay, (1 + step) / (10 + step))
                    state.ema = state.ema + (1 - d) * (p - state.ema)
    found: Tensors = {}
    for name, p in named.items():
        kept = {"fp32": p.detach(), **states[name].moments, **({"ema": states[name].ema} if ema_decay else {})}
        found |= {f"{name}|{key}": value.flatten() for key, value in kept.items()}
    return found


def adamw(p: Any, g: Any, moments: Tensors, lr: float, decay: float, optim: OptimSection, step: int) -> None:
    """Loshchilov & Hutter 2019, algorithm 2."""
    beta1, beta2 = optim.betas
    m = beta1 * moments.get("exp_avg", 0) + (1 - beta1) * g
    v = beta2 * moments.get("exp_avg_sq", 0) + (1 - beta2) * g * g
    p *= 1 - lr * decay
    p -= lr * (m / (1 - beta1**step)) / (v.sqrt() / math.sqrt(1 - beta2**step) + optim.eps)
    moments |= {"exp_avg": m, "exp_avg_sq": v}


def lion(p: Any, g: Any, moments: Tensors, lr: float, decay: float, optim: OptimSection, step: int) -> None:
    """Chen et al. 2023, algorithm 2."""
    beta1, beta2 = optim.betas
    m = moments.get("exp_avg", torch.zeros_like(g))
    p *= 1 - lr * decay
    p -= lr * (beta1 * m + (1 - beta1) * g).sign()
    moments["exp_avg"] = beta2 * m + (1 - beta2) * g


def sgd(p: Any, g: Any, moments: Tensors, lr: float, decay: float, optim: OptimSection, step: int) -> None:
    """Heavy ball without dampening; the decay is a part of the gradient."""
    m = optim.betas[0] * moments.get("momentum_buffer", 0) + g + decay * p
    p -= lr * m
    moments["momentum_buffer"] = m


UPDATES = {"adamw": adamw, "lion": lion, "sgd": sgd}
