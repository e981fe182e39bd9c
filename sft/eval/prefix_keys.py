"""Keys and values of a prefix that many continuations share."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class _KeptLayer(DynamicLayer):
    """A layer's keys and values of a prefix, [1, heads, P, head dim]; those behind it are handed on and forgotten."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.keys: torch.Tensor = layer.keys
        self.values: torch.Tensor = layer.values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = key_states.shape[0]
        keys, values = (kept.expand(rows, -1, -1, -1) for kept in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def compute_prefix(model: Any, ids_1P: torch.Tensor) -> Cache:
    """Read a prefix once; the result may stand before any number of batches, of any number of rows each."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_1P, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Cache(layers=[_KeptLayer(layer) for layer in cache.layers])
