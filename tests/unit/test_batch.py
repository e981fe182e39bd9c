"""Packs to tensors, on literals that can be checked by eye. Run: pytest tests/unit/test_batch.py"""

import numpy as np
import torch

from data_prep.shards import open_shards
from sft import batch
from sft.order import FILLER

CPU = torch.device("cpu")


def test_the_drawing_in_the_docstring():
    built = batch.build(
        [
            (np.array([10, 11, 12, 13]), np.array([-100, -100, 12, 13])),
            (np.array([20, 21, 22]), np.array([20, 21, 22])),
        ],
        CPU,
    )
    assert built.ids_1T.tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert built.pos_1T.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert built.layout.seq_lens == (4, 3)
    assert built.layout.cu_seqlens.tolist() == [0, 4, 7]
    assert built.layout.cu_seqlens.dtype == torch.int32
    assert built.layout.max_seqlen == 4
    assert built.predict_N.tolist() == [1, 2, 4, 5]
    assert built.targets_N.tolist() == [12, 13, 21, 22]  # 20 starts its document: never a target


def test_labels_of_the_caller_are_not_changed():
    labels = np.array([5, 6])
    batch.build([(np.array([5, 6]), labels)], CPU)
    assert labels.tolist() == [5, 6]


def test_label_counts_of_the_index_are_those_of_the_loss(prepared):
    shards = open_shards(prepared / "train")
    counts = [len(batch.from_shards(shards, np.array([row]), CPU).targets_N) for row in range(len(shards))]
    assert counts == shards.num_labels.tolist()
    assert sum(counts) == shards.manifest["totals"]["labels"]
    assert max(counts) > 2 * min(counts), "the proof needs unequal packs"


def test_filler_weighs_nothing(prepared):
    shards = open_shards(prepared / "train")
    rows = np.array([0, FILLER])
    built = batch.from_shards(shards, rows, CPU)
    assert len(built.targets_N) == batch.num_labels(shards, rows) == shards.num_labels[0]
    assert batch.num_tokens(shards, rows) == shards.num_tokens[0]
    assert built.layout.seq_lens[-1] == 1
    only_filler = batch.from_shards(shards, np.array([FILLER]), CPU)
    assert only_filler.targets_N.tolist() == []
