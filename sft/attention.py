"""Causal attention within documents of a flattened micro-batch, by one of three kernels.

No mask is built and nothing is inferred from position ids: the boundaries are passed explicitly, as
`layout` (sft.batch.Layout), through the keyword arguments that transformers hands down to its attention
function. A forward without `layout` is an error, never plain causal attention across documents.

Shape legend: T tokens, H query heads, G key-value heads, D head size; transformers passes [1, H, T, D].
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sft.batch import Layout
from sft.errors import UserError
from sft.sequence import to_heads, to_tokens

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layout, float, float], torch.Tensor]
"""(query, key, value, layout, scaling, dropout probability)."""


def choose_kernel(wanted: str, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> str:
    """The attention kernel of a run: what the user names if it can run here, else the first of auto's list that can.

    Raises:
        UserError: the named kernel cannot run on this device or with this dtype, or has no dropout.
    """
    flash_device = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    can_flash = flash_device and dtype in (torch.bfloat16, torch.float16)
    available = {
        "flash_attention_2": can_flash and importlib.util.find_spec("flash_attn") is not None,
        "varlen": can_flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None and not dropout,
        "sdpa": True,
    }
    if wanted == "auto":
        return next(name for name, usable in available.items() if usable)
    if not available[wanted]:
        raise UserError(
            f"model.attention {wanted}: cannot run on {device.type} with {dtype} (it needs an Ampere or newer GPU, "
            "bf16, its package; varlen also no model.attention_dropout); usable: "
            f"{', '.join(name for name, usable in available.items() if usable)}"
        )
    return wanted


def register(kernel: str) -> str:
    """Make `kernel` known to transformers and return the name to load the model with."""
    name = f"packed_{kernel}"
    AttentionInterface.register(name, functools.partial(_packed_attention, _KERNELS[kernel]))
    return name


def _packed_attention(
    kernel: Kernel,
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **_transformers: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls; returns ([1, T, H, D], no weights).

    Where ranks share the tokens, T is this rank's: the kernel gets all tokens of a part of the heads instead.
    """
    if layout is None or attention_mask is not None:
        raise ValueError("packed attention needs the documents' layout and no mask; call the engine with a MicroBatch")
    if layout.group is None:
        return kernel(query_1HTD, key_1GTD, value_1GTD, layout, scaling, dropout), None
    query, key, value = (to_heads(x_1HtD, layout.group) for x_1HtD in (query_1HTD, key_1GTD, value_1GTD))
    return to_tokens(kernel(query, key, value, layout, scaling, dropout), layout.group), None


def _flash_attention_2(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    layout: Layout,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    out_THD = flash_attn_varlen_func(
        query_THD, key_TGD, value_TGD, cu_seqlens, cu_seqlens, longest, longest, dropout, scaling, causal=True
    )
    return out_THD[None]


def _varlen(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    layout: Layout,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query_1HTD.shape[1] // key_1GTD.shape[1]
    # torch 2.10 has no grouped-query mode here; repeating is exact and costs K and V once more
    key_1HTD, value_1HTD = (x.repeat_interleave(groups, dim=1) for x in (key_1GTD, value_1GTD))
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1).contiguous() for x in (query_1HTD, key_1HTD, value_1HTD))
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    options = _varlen_options(scaling, query_THD.shape[-1])
    out_THD: Any = varlen_attn(query_THD, key_THD, value_THD, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out_THD[None]


def _varlen_options(scaling: float, head_size: int) -> dict[str, Any]:
    """Causal, with `scaling`: torch 2.10 says is_causal and always scales by head_size^-0.5; later ones take both."""
    parameters = _varlen_parameters()
    causal = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "scale" in parameters:
        return {**causal, "scale": scaling}
    if abs(scaling - head_size**-0.5) > 1e-6:
        raise ValueError(f"varlen attention of torch {torch.__version__} cannot scale by {scaling}; use another kernel")
    return causal


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _sdpa(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    layout: Layout,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """One call per document: the same result as a block-diagonal mask, without the T x T work or memory."""
    lengths = list(layout.seq_lens)
    parts = [x.split(lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD)]
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    outs = [
        scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        for query, key, value in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)


_KERNELS: dict[str, Kernel] = {"flash_attention_2": _flash_attention_2, "varlen": _varlen, "sdpa": _sdpa}
