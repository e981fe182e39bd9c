"""A gradient that is not finite: no step taken, recorded, bounded. Run: pytest tests/dist/test_guard.py"""

import pytest
import torch
from safetensors.torch import load_file

from data_prep.shards import open_shards
from sft.checkpoint import Pieces, newest_complete, read_meta
from sft.order import FILLER, step_rows
from tests import tiny
from tests.dist.training import SETTINGS, train

pytestmark = pytest.mark.dist


def test_three_bad_steps_end_the_run_with_the_rows_named(tmp_path, base_model, prepared, strategy):
    """A learning rate of 1e30 destroys the weights in step 1; steps 2 to 4 cannot be taken."""
    out = tmp_path / "run"
    done = train(
        out, base_model, prepared, strategy, 2, expect=1, optim__lr=1e30, train__max_steps=8, checkpoint__every=1
    )
    assert "not finite 3 steps in a row" in done.stderr
    skips = [event for event in tiny.read_jsonl(out / "events.jsonl") if event["event"] == "skip"]
    assert [skip["step"] for skip in skips] == [2, 3, 4]
    shards = open_shards(prepared / "train")
    for skip in skips:
        rows = [row for row in step_rows(0, skip["step"] - 1, len(shards), 8) if row != FILLER]
        assert skip["doc_ids"] == [int(doc) for row in rows for doc in shards.pack(int(row)).doc_ids]
    assert not (out / "export").exists()
    newest = newest_complete(out / "checkpoints")
    assert read_meta(newest)["step"] == 3
    losses = [line["loss"] for line in tiny.read_jsonl(out / "metrics.jsonl")]
    assert losses[0] > 0
    assert losses[1:] == [None, None], "not repaired, not NaN: null"
    first, third = (Pieces(out / "checkpoints" / f"step-0000000{step}") for step in (2, 3))
    name = "model.norm.weight"
    assert torch.equal(first.read(name, "fp32", 0, 32), third.read(name, "fp32", 0, 32)), "weights bit-identical"
    base = load_file(base_model / "model.safetensors")[name]
    assert not torch.equal(third.read(name, "fp32", 0, 32), base), "control: step 1 did change them"


def test_a_step_without_labels_changes_nothing(tmp_path, base_model, strategy):
    """One pack of prompts only: decay and momentum must not move the weights."""
    import numpy as np

    from data_prep.pack import pack
    from data_prep.probe import probe_ids
    from data_prep.shard_writer import Documents, write_shards
    from sft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_model)
    lengths = np.array([20, 30], np.int32)
    documents = Documents(
        ids=np.arange(50, dtype=np.int32) + 3, starts=np.array([0, 20]), lengths=lengths,
        runs=np.empty((0, 2), np.int32), first_run=np.zeros(2, np.int64), num_runs=np.zeros(2, np.int32),
        doc_ids=np.arange(2), source_ids=np.zeros(2, np.int16),
    )  # fmt: skip
    facts = {
        "path": "x", "digest": tokenizer.digest, "vocab_size": 259, "bos_id": 1, "eos_id": 2, "stop_id": 2,
        "probe": probe_ids(tokenizer),
    }  # fmt: skip
    manifest = {"content_key": "k", "seq_len": 64, "template": [], "sources": [{"name": "a"}], "tokenizer": facts}
    write_shards(tmp_path / "train", documents, pack(lengths, 64), manifest)
    out = tmp_path / "run"
    train(out, base_model, tmp_path, strategy, 1, batch__rows_per_step=1, train__max_steps=1)
    assert SETTINGS["optim.lr"] > 0
    exported, base = load_file(out / "export" / "model.safetensors"), load_file(base_model / "model.safetensors")
    assert all(torch.equal(exported[name], base[name]) for name in base)
    assert tiny.read_jsonl(out / "events.jsonl")[1]["reason"] == "no labels in this step"
