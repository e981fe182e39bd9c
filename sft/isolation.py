"""Proof at start-up, on the loaded model, that the documents of a pack do not see each other."""

from typing import Any

import numpy as np
import torch

from sft.batch import build
from sft.errors import UserError
from sft.sequence import NOT_SHARED, Shares, all_tokens, own_part

LEAST_CONTROL = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative difference (L2) that the control must show: well above what summing in another order leaves, which is
1e-6 in fp32 and about 1e-2 in bf16 with its 8 bits of mantissa."""
LEAK_TO_CONTROL = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of packed against alone, as a part of the control's."""

PROBE_LENGTHS = (37, 23)


def prove_isolation(engine: Any, vocab_size: int, device: torch.device, shares: Shares = NOT_SHARED) -> str:
    """Show on the loaded model that a document's states do not depend on its neighbour in the pack; collective.

    Document B is run alone, then packed behind document A. Control: the same tokens as one document must
    give B other states, or the probe could not have seen a leak. Where ranks share packs, they share the packed ones
    here, too, and each runs the whole of B alone: the same states, so their parts fit together. Leaves the engine in
    eval mode: in training, noise and dropout would tell the two apart.

    Returns:
        One line with the measured differences.

    Raises:
        UserError: the packed states differ, or the control does not: training would mix documents unseen.
    """
    generator = np.random.RandomState(0)
    first, second = (generator.randint(0, vocab_size, length) for length in PROBE_LENGTHS)
    engine.eval()
    alone = _hidden(engine, [second], device, NOT_SHARED)
    packed = _hidden(engine, [first, second], device, shares)[len(first) :]
    joined = _hidden(engine, [np.concatenate([first, second])], device, shares)[len(first) :]
    leak, control = _relative(packed, alone), _relative(joined, alone)
    limit = LEAK_TO_CONTROL[alone.dtype] * control
    line = f"isolation probe: packed against alone {leak:.1e} (limit {limit:.0e}), without boundary {control:.1e}"
    if not control > LEAST_CONTROL[alone.dtype]:
        raise UserError(f"{line}: cannot tell packed from joined on this model; are its weights trained and finite?")
    if not leak <= limit:
        remedy = f", or batch.sequence_parallel 1 instead of {shares.size}" if shares.size > 1 else ""
        raise UserError(
            f"{line}: documents of a pack see each other with this kernel; choose model.attention sdpa{remedy}"
        )
    return line


def _hidden(engine: Any, documents: list[np.ndarray], device: torch.device, shares: Shares) -> torch.Tensor:
    """[T, E] of all tokens, on every rank that shares them."""
    whole = build([(ids, np.full(len(ids), -100)) for ids in documents], device)
    with torch.no_grad():
        return all_tokens(engine(own_part(whole, shares), ask="hidden"), shares)[: whole.layout.num_tokens]


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())
