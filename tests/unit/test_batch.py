"""Packs to tensors, on literals that can be checked by eye. Run: pytest tests/unit/test_batch.py"""

import numpy as np
import pytest
import torch

from data_prep.pack import Packs
from data_prep.shard_writer import Documents, write_shards
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
        sources=[0, 1],
        num_sources=2,
    )
    assert built.ids_1T.tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert built.pos_1T.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert built.layout.seq_lens == (4, 3)
    assert built.layout.cu_seqlens.tolist() == [0, 4, 7]
    assert built.layout.cu_seqlens.dtype == torch.int32
    assert built.layout.max_seqlen == 4
    assert built.predict_N.tolist() == [1, 2, 4, 5]
    assert built.targets_N.tolist() == [12, 13, 21, 22]  # 20 starts its document: never a target
    assert built.source_N.tolist() == [0, 0, 1, 1]
    assert built.source_N.dtype == torch.int64
    assert built.num_sources == 2


def test_without_sources_all_targets_are_of_the_first():
    built = batch.build([(np.array([5, 6, 7]), np.array([5, 6, 7]))] * 2, CPU)
    assert built.source_N.tolist() == [0, 0, 0, 0]
    assert built.num_sources == 1


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
    assert only_filler.source_N.tolist() == []


@pytest.fixture
def mixed(tmp_path):
    """Two packs, of lengths 4 + 3 and 1 + 2 + 2; of three sources the second has no document."""
    documents = Documents(
        ids=np.arange(3, 15, dtype=np.int32),
        starts=np.array([0, 4, 7, 8, 10]),
        lengths=np.array([4, 3, 1, 2, 2], np.int32),
        runs=np.array([[2, 4], [0, 3], [0, 1], [1, 2]], np.int32),  # the second and third begin on a first token
        first_run=np.array([0, 1, 2, 3, 4]),
        num_runs=np.array([1, 1, 1, 1, 0], np.int32),
        doc_ids=np.arange(5),
        source_ids=np.array([2, 0, 2, 2, 2], np.int16),
    )
    packs = Packs(np.arange(5, dtype=np.int32), np.array([0, 2, 5]))
    tokenizer = {"path": "", "digest": "", "vocab_size": 20, "bos_id": None, "eos_id": 2, "stop_id": 2, "probe": []}
    manifest = {"content_key": "", "seq_len": 8, "template": "", "tokenizer": tokenizer}
    sources = [{"name": name} for name in ("a", "b", "c")]
    write_shards(tmp_path / "train", documents, packs, {**manifest, "sources": sources})
    return open_shards(tmp_path / "train")


def test_each_target_has_the_source_of_its_document(mixed):
    built = batch.from_shards(mixed, np.array([0, FILLER, 1]), CPU)
    assert built.targets_N.tolist() == [5, 6, 8, 9, 12]
    assert built.source_N.tolist() == [2, 2, 0, 0, 2]
    assert built.num_sources == 3


@pytest.mark.parametrize(
    ("rows", "tokens", "labels"),
    [
        ([0], [3, 0, 4], [2, 0, 2]),
        ([1], [0, 0, 5], [0, 0, 1]),
        ([1, FILLER, 0], [3, 0, 9], [2, 0, 3]),
        ([0, 0], [6, 0, 8], [4, 0, 4]),
        ([FILLER], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_source_counts_by_hand(mixed, rows, tokens, labels):
    counts = batch.source_counts(mixed, np.array(rows))
    assert counts.dtype == np.int64
    assert counts.tolist() == [tokens, labels]


def test_source_counts_add_up_to_those_of_the_index_and_agree_with_the_loss(mixed, prepared):
    for shards in (mixed, open_shards(prepared / "train")):
        rows = np.array([*range(len(shards)), FILLER])
        counts = batch.source_counts(shards, rows)
        assert counts.sum(axis=1).tolist() == [batch.num_tokens(shards, rows), batch.num_labels(shards, rows)]
        built = batch.from_shards(shards, rows, CPU)
        assert np.bincount(built.source_N, minlength=built.num_sources).tolist() == counts[1].tolist()


def test_a_source_that_the_manifest_does_not_name_is_an_error(mixed):
    del mixed.manifest["sources"][2]
    with pytest.raises(IndexError):
        batch.source_counts(mixed, np.array([0]))
