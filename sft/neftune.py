"""NEFTune (Jain et al. 2024, https://arxiv.org/abs/2310.05914): uniform noise on the embeddings in training."""

import torch

from sft.batch import MicroBatch


def noise(batch: MicroBatch, alpha: float, like_1TE: torch.Tensor) -> torch.Tensor:
    """Noise for the embeddings of `batch`, [1, T, E], in their dtype and on their device.

    Uniform in ±alpha / sqrt(L E), where L is the length of the token's document, as if it stood alone: packs are ours,
    the paper knows documents. Each pack draws from its own seed, so that the noise does not depend on how a step is cut
    into micro-batches and ranks (as long as they are devices of one kind).
    """
    size, device = like_1TE.shape[-1], like_1TE.device
    packs = []
    for length, seed in batch.rows:
        generator = torch.Generator(device).manual_seed(seed)
        packs.append(torch.rand(length, size, generator=generator, device=device))
    lengths = batch.layout.cu_seqlens.diff()
    total = sum(length for length, _ in batch.rows)
    lengths_T = lengths.repeat_interleave(lengths, output_size=batch.layout.num_tokens)[:total]
    noise_TE = (torch.cat(packs) * 2 - 1) * (alpha / (lengths_T * size).sqrt())[:, None]
    own = noise_TE[batch.start : batch.start + like_1TE.shape[1]]
    missing = like_1TE.shape[1] - len(own)  # where ranks share packs, tokens that fill up the last part
    return torch.nn.functional.pad(own, (0, 0, 0, missing))[None].to(like_1TE.dtype)
