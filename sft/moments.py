"""The moments that an optimizer keeps of each flat tensor: their names in checkpoints, and where it has them."""

from typing import Any

import torch

from sft.quantised import Quantised

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}
"""Their names, by optim.name."""
BITSANDBYTES = {
    "adam": {"exp_avg": "state1", "exp_avg_sq": "state2"},
    "lion": {"exp_avg": "state1"},
    "momentum": {"momentum_buffer": "state1"},
}
"""By what its optimizers call themselves."""

Held = torch.Tensor | Quantised
"""A moment as it is held; see Quantised for what both can do."""


def keys(inner: Any) -> dict[str, str]:
    """The key in the optimizer's state of each moment, by the name that checkpoints give it."""
    if _is_bitsandbytes(inner):
        return BITSANDBYTES[inner.optimizer_name]
    return {name: name for name in MOMENTS["sgd" if isinstance(inner, torch.optim.SGD) else "adamw"]}


def make(inner: Any, flat: torch.Tensor, dtype: torch.dtype) -> None:
    """Make the state of `flat` anew, all zeros, as the library would at its first step; moments that are not 8-bit in
    `dtype`.
    """
    if not _is_bitsandbytes(inner):
        inner.state[flat] = {
            key: torch.zeros_like(flat, dtype=dtype, requires_grad=False) for key in keys(inner).values()
        }
        return
    inner.state[flat] = {}
    groups = inner.param_groups
    inner.param_groups = [{**groups[0], "params": [flat]}]  # where the library looks for the tensor; ZeRO empties them
    inner.init_state(inner.param_groups[0], flat, 0, 0)
    inner.param_groups = groups
    state = inner.state[flat]
    for key in keys(inner).values():
        if state[key].is_floating_point():
            state[key] = state[key].to(dtype)


def held(inner: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Held]:
    """The live moments of `flat`, by name."""
    state = inner.state[flat]
    return {name: _held(state, key) for name, key in keys(inner).items()}


def step(inner: torch.optim.Optimizer, flat: torch.Tensor) -> int:
    """Updates that the optimizer has counted; 0 of one that does not count."""
    return int(inner.state.get(flat, {}).get("step", 0))


def set_step(inner: torch.optim.Optimizer, flat: torch.Tensor, count: int) -> None:
    """Make the optimizer count on from `count`: Adam's bias correction depends on it."""
    if isinstance(inner, torch.optim.SGD):
        return
    counts_on_host = _is_bitsandbytes(inner) or type(inner).__name__ == "DeepSpeedCPUAdam"
    # one tensor each: torch's AdamW counts in place, and a shared one would count once per flat tensor
    inner.state[flat]["step"] = (
        count if counts_on_host else torch.tensor(float(count), dtype=torch.float32, device=flat.device)
    )


def _held(state: dict[str, Any], key: str) -> Held:
    if state[key].dtype != torch.uint8:
        return state[key]
    number = key.removeprefix("state")
    return Quantised(state[key], state[f"absmax{number}"], state[f"qmap{number}"])


def _is_bitsandbytes(inner: torch.optim.Optimizer) -> bool:
    return hasattr(inner, "optimizer_name")
