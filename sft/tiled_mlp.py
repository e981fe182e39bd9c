"""Decoder MLPs computed over pieces of the sequence, one after the other (ALST, Bekman et al. 2025,
https://arxiv.org/abs/2506.13996).

An MLP treats every token alone. Of its activations [T, F], which are several times as large as the hidden states, those
of one piece exist at a time, in forward and in backward, which computes them again. The weights' gradients are summed
over the pieces in fp32.

Shape legend: T tokens, E hidden size, F intermediate size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

Activation = Callable[[torch.Tensor], torch.Tensor]


class TiledMLP(nn.Module):
    """A gated MLP of transformers that is computed in pieces.

    Its own forward needs the weights, not its linear layers': ZeRO-3 must gather them for the module as a whole, which
    makes one gather for all pieces (see sft.engine).
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    activation: Activation
    tiles: int

    def forward(self, hidden_1TE: torch.Tensor) -> torch.Tensor:
        """down(activation(gate(x)) up(x)) of every token, [1, T, E]."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        return _Tiled.apply(hidden_1TE, self.tiles, self.activation, *weights)


def tile_mlps(hf: Any, tiles: int) -> list[TiledMLP]:
    """Let every decoder MLP of a transformers causal LM (sft.model.FAMILIES: all gated) compute in `tiles` pieces.

    In place, with unchanged parameter names. liger-kernel's SwiGLU, where it was, gives way to torch's.
    """
    mlps = [layer.mlp for layer in hf.model.layers]
    for mlp in mlps:
        mlp.__class__ = TiledMLP
        mlp.activation, mlp.tiles = ACT2FN[hf.config.hidden_act], tiles
    return mlps


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_1TE: torch.Tensor, tiles: int, activation: Activation, *weights: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.tiles, ctx.activation = tiles, activation
        ctx.save_for_backward(hidden_1TE, *weights)
        out_1TE = torch.empty_like(hidden_1TE)
        for part in _parts(hidden_1TE.shape[1], tiles):
            out_1TE[:, part] = _gated_mlp(hidden_1TE[:, part], activation, weights)
        return out_1TE

    @staticmethod
    def backward(ctx: Any, grad_1TE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_1TE, *weights = ctx.saved_tensors
        trained = [place for place, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        # detached: gradients are handed back once, not accumulated (and reduced over ranks) with each piece
        weights = [None if weight is None else weight.detach() for weight in weights]
        sums = {place: torch.zeros_like(weights[place], dtype=torch.float32) for place in trained}
        for place in trained:
            weights[place].requires_grad_()
        grad_hidden_1TE = torch.empty_like(hidden_1TE)
        for part in _parts(hidden_1TE.shape[1], ctx.tiles):
            hidden_1PE = hidden_1TE[:, part].detach().requires_grad_()
            with torch.enable_grad():
                out_1PE = _gated_mlp(hidden_1PE, ctx.activation, weights)
            inputs = [hidden_1PE, *(weights[place] for place in trained)]
            grad_hidden_1TE[:, part], *grads = torch.autograd.grad(out_1PE, inputs, grad_1TE[:, part])
            for place, grad in zip(trained, grads, strict=True):
                sums[place] += grad
        of_weights = [sums[place].to(weights[place].dtype) if place in sums else None for place in range(len(weights))]
        return grad_hidden_1TE, None, None, *of_weights


def _parts(length: int, tiles: int) -> list[slice]:
    """At most `tiles` slices of nearly equal size, none of them empty."""
    size = -(-length // tiles)
    return [slice(start, start + size) for start in range(0, length, size)]


def _gated_mlp(
    hidden_1PE: torch.Tensor, activation: Activation, weights: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """`weights`: weight and bias of gate, up and down."""
    gate, gate_bias, up, up_bias, down, down_bias = weights
    assert gate is not None
    assert up is not None
    assert down is not None
    gated_1PF = activation(linear(hidden_1PE, gate, gate_bias)) * linear(hidden_1PE, up, up_bias)
    return linear(gated_1PF, down, down_bias)
