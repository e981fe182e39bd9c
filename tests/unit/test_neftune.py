"""Noise on the embeddings, by hand, and that how a step is cut does not show. Run: pytest tests/unit/test_neftune.py"""

from dataclasses import replace

import numpy as np
import torch

from sft.batch import build
from sft.neftune import noise
from sft.order import seed_at

CPU = torch.device("cpu")
SIZE = 64


def batch_of(*packs):
    """Packs of document lengths, with the seeds of their places."""

    documents = [(np.zeros(length, np.int64), np.full(length, -100)) for pack in packs for length in pack[1]]
    rows = tuple((sum(lengths), seed_at(0, 3, place)) for place, lengths in packs)
    return replace(build(documents, CPU), rows=rows)


def noise_of(*packs, alpha=5.0, dtype=torch.float32):
    batch = batch_of(*packs)
    return noise(batch, alpha, torch.zeros(1, batch.layout.num_tokens, SIZE, dtype=dtype))[0]


def test_its_size_is_that_of_the_paper_for_each_document():
    """Uniform in ±5 / sqrt(L E): of a long and a short document in one pack, each by its own length."""
    found = noise_of((0, [400, 25]))
    for part, length in ((found[:400], 400), (found[400:], 25)):
        limit = 5 / (length * SIZE) ** 0.5
        assert limit * 0.99 < part.abs().max() <= limit
        assert abs(part.mean()) < limit / 20
        assert abs(part.std() / (limit / 3**0.5) - 1) < 0.05


def test_it_scales_with_alpha():
    torch.testing.assert_close(noise_of((0, [8]), alpha=10.0), 2 * noise_of((0, [8])))


def test_micro_batches_and_ranks_do_not_show():
    together = noise_of((4, [7, 5]), (5, [9]), (6, [3]))
    alone = [noise_of((4, [7, 5])), noise_of((5, [9])), noise_of((6, [3]))]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(noise_of((4, [9])), noise_of((5, [9]))), "control: places differ"


def test_a_part_of_the_tokens_gets_the_noise_of_its_place():

    batch = batch_of((0, [7, 5]))
    part = noise(replace(batch, start=6), 5.0, torch.zeros(1, 6, SIZE))[0]
    assert torch.equal(part, noise_of((0, [7, 5]))[6:])


def test_the_dtype_is_that_of_the_embeddings():
    assert noise_of((0, [4]), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_seeds_follow_from_seed_step_and_place():
    assert len({seed_at(0, 0, 0), seed_at(1, 0, 0), seed_at(0, 1, 0), seed_at(0, 0, 1)}) == 4
    assert seed_at(0, 1, 2) == seed_at(0, 1, 2) < 2**63
