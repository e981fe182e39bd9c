"""Summed cross-entropy over the supervised positions, in chunks that never hold all logits.

The head turns N hidden states into the sum of N token losses. Logits exist for one chunk at a time; their
gradient is formed in the same pass (d loss / d logits = softmax - onehot), so nothing is recomputed in
backward, and the weight's gradient is summed over chunks in fp32. The caller divides by the step's number of
labels: `loss = sum / N_step`, so how a step is cut into micro-batches and ranks cannot matter.

The work runs inside the forward of the module that owns the weight: ZeRO-3 gathers it there, once.

Beside the total that is optimised, the same token losses are summed for each data source, for the metrics alone.

Shape legend: N supervised positions, C positions of a chunk, E hidden size, V vocabulary rows, S data sources.
"""

from typing import Any

import torch
from torch import nn

CHUNK_LOGITS = 2**26
"""Logits of one chunk at most: 256 MiB in fp32. 512 positions for a vocabulary of 128k, 2048 for 32k."""


class LossHead(nn.Linear):
    """An LM head that also computes summed losses where its weight is gathered."""

    label_smoothing = 0.0
    """Share e of the target that training gives to all V tokens alike (Szegedy et al. 2016): the loss of a token is
    (1 - e) nll + e mean_V(-log p). In eval mode the loss is the plain nll."""

    def forward(
        self,
        hidden_NE: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        source_N: torch.Tensor | None = None,
        num_sources: int = 1,
    ) -> Any:
        """Logits [..., V] of hidden states; given targets and their sources (int64, below num_sources), summed losses.

        Returns:
            With targets (total, by_source_S): the sum over N, fp32 scalar (0, still connected to the graph, for
            N = 0), and its part from each source, fp32, without gradient; the parts sum to the total up to rounding.
        """
        if targets_N is None:
            return super().forward(hidden_NE)
        smoothing = self.label_smoothing if self.training else 0.0
        return _SummedCrossEntropy.apply(
            hidden_NE, self.weight, targets_N, source_N, num_sources, smoothing, torch.is_grad_enabled()
        )


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: torch.Tensor,
        weight_VE: torch.Tensor,
        targets_N: torch.Tensor,
        source_N: torch.Tensor,
        num_sources: int,
        smoothing: float,
        need_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        # fp64: on a GPU index_add_ adds in no fixed order, which must not show in the metrics
        by_source_S = torch.zeros(num_sources, dtype=torch.float64, device=hidden_NE.device)
        grad_hidden_NE = torch.empty_like(hidden_NE if need_grad else hidden_NE[:0])
        grad_weight_VE = torch.zeros_like(weight_VE if need_grad else weight_VE[:0], dtype=torch.float32)
        chunk = max(1, CHUNK_LOGITS // weight_VE.shape[0])
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            targets_C1 = targets_N[part, None]
            logits_CV = (hidden_NE[part] @ weight_VE.T).float()
            lse_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            losses_C1 = lse_C1 - (1 - smoothing) * logits_CV.gather(1, targets_C1)
            if smoothing:
                losses_C1 -= smoothing * logits_CV.mean(dim=-1, keepdim=True)
            total += losses_C1.sum()
            by_source_S.index_add_(0, source_N[part], losses_C1[:, 0].double())
            if need_grad:
                grad_CV = logits_CV.sub_(lse_C1).exp_()
                grad_CV.scatter_add_(1, targets_C1, torch.full_like(lse_C1, smoothing - 1.0))
                if smoothing:
                    grad_CV -= smoothing / weight_VE.shape[0]
                grad_CV = grad_CV.to(weight_VE.dtype)
                grad_hidden_NE[part] = grad_CV @ weight_VE
                _add_product(grad_weight_VE, grad_CV, hidden_NE[part])
        if need_grad:
            ctx.save_for_backward(grad_hidden_NE, grad_weight_VE)
        by_source_S = by_source_S.float()
        ctx.mark_non_differentiable(by_source_S)
        return total, by_source_S

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _by_source: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_NE, grad_weight_VE = ctx.saved_tensors
        # scaled in fp32: the factor itself, rounded to bf16, would be off by up to 0.4 %
        dtype = grad_hidden_NE.dtype
        grad_hidden_NE = (grad_hidden_NE.float() * grad_total).to(dtype)
        return grad_hidden_NE, grad_weight_VE.mul_(grad_total).to(dtype), None, None, None, None, None


def _add_product(sum_VE: torch.Tensor, grad_CV: torch.Tensor, hidden_CE: torch.Tensor) -> None:
    if grad_CV.dtype == sum_VE.dtype:
        sum_VE.addmm_(grad_CV.T, hidden_CE)
    else:
        sum_VE += grad_CV.T @ hidden_CE
