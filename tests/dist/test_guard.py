"""Losses and gradients that are not finite: no update, the documents named, tried again, bounded, and the same after a
kill. Run: pytest tests/dist/test_guard.py (all runs of a stage at once; see run_worker)"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep.shards import open_shards
from sft.checkpoint import newest_complete, read_meta, step_folder
from sft.errors import EXIT_GUARD
from sft.order import FILLER, step_rows
from tests import tiny
from tests.dist.runs import Runs, furthest, rollback_note
from tests.dist.training import SETTINGS, largest_relative, train

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, ROWS = 6, 4
"""Within the first epoch, so that each pack is read once."""
BAD = 3
STRATEGIES = ["zero1", "zero2", "zero3", "zero3_offload_all"]


@pytest.fixture(scope="module")
def shards(prepared):
    return open_shards(prepared / "train")


@pytest.fixture(scope="module")
def packs(shards):
    """Those of each step, from 1."""
    return {step: step_rows(0, step - 1, len(shards), ROWS).tolist() for step in range(1, STEPS + 3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, packs):
    folder = tmp_path_factory.mktemp("guard")
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "train.max_steps": STEPS,
        "batch.rows_per_step": ROWS, "checkpoint.every": 1, "checkpoint.keep_last": 10,
    }  # fmt: skip
    files = {f"zero{stage}": tiny.make_strategy(folder / f"zero{stage}.json", stage) for stage in (1, 2, 3)}

    def run(name, strategy="zero3", patches=None, **more):
        own = more.pop("options", {}) | {"deepspeed": files.get(strategy, strategy)}
        return {"name": name, "ranks": 2, "options": options | own, "patches": patches or {}, **more}

    one_loss = {"poison": ["loss", packs[BAD][3:4]]}
    every_second = {"checkpoint.every": 2}
    noted = [rollback_note(prepared / "train", ROWS, BAD, [BAD])]
    first = [
        *(run(f"loss_{strategy}", strategy, one_loss) for strategy in STRATEGIES),
        run("gradient", patches={"poison": ["gradient", packs[BAD][2:3]]}),
        run("passed_over", files={"config.yaml": "", "rollbacks.json": json.dumps(noted)}),
        run("diverged", patches={}, options={"optim.lr": 1e30, "train.max_steps": STEPS + 2}),
        run("killed", patches=one_loss | {"kill_before": ["train_step", 6]}, options=every_second),
    ]
    again = [run("killed_again", patches=one_loss, options=every_second, out="killed")]
    return Runs(folder, [first, again])


def documents(shards, packs):
    return [int(doc) for pack in packs if pack != FILLER for doc in shards.pack(pack).doc_ids]


def bits_equal(one, other):
    return {name for name in one if torch.equal(one[name].view(torch.int32), other[name].view(torch.int32))}


def optimizer_steps(runs, out):
    folder = runs.folder / out / "checkpoints"
    return [read_meta(step_folder(folder, step))["optimizer_step"] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", [f"loss_{strategy}" for strategy in STRATEGIES] + ["gradient"])
def test_the_step_leaves_every_bit_of_the_state_and_the_next_batch_is_taken(runs, name):
    runs.ended_with(name, 0)
    before, after, next_one = (runs.saved(name, step) for step in (BAD - 1, BAD, BAD + 1))
    assert bits_equal(before, after) == set(before)
    assert not bits_equal(after, next_one), "control: a step that is taken moves every weight and moment"
    assert optimizer_steps(runs, name) == [1, 2, 2, 3, 4, 5]
    assert runs.column(name, "applied") == [True, True, False, True, True, True]
    assert runs.column(name, "grad_norm")[BAD - 1] is None
    assert runs.column(name, "step") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", [f"loss_{strategy}" for strategy in STRATEGIES])
def test_only_the_documents_of_the_offending_micro_batch_are_named(runs, name, shards, packs):
    (skip,) = runs.events(name, "skip")
    assert (skip["step"], skip["reason"]) == (BAD, "loss is not finite")
    assert skip["doc_ids"] == documents(shards, packs[BAD][3:4])
    assert 0 < len(skip["doc_ids"]) < len(documents(shards, packs[BAD])), "not those of the whole step"
    assert runs.column(name, "loss")[BAD - 1] is None


def test_all_documents_of_the_step_are_named_where_only_the_gradient_is_not_finite(runs, shards, packs):
    (skip,) = runs.events("gradient", "skip")
    assert (skip["step"], skip["reason"]) == (BAD, "gradient is not finite, though every loss is")
    assert skip["doc_ids"] == documents(shards, packs[BAD])
    assert runs.column("gradient", "loss")[BAD - 1] > 0


@pytest.mark.parametrize("name", [f"loss_{strategy}" for strategy in STRATEGIES] + ["gradient", "killed"])
def test_what_follows_is_as_if_the_step_had_been_passed_over(runs, name):
    """Nothing that is not finite lingers; also after a kill at step 6, when the checkpoint of step 4 is loaded."""
    runs.ended_with("passed_over", 0)
    others = [step for step in range(STEPS) if step + 1 != BAD]
    for key in ("loss", "grad_norm", "lr"):
        measured, expected = (runs.column(out, key) for out in (name, "passed_over"))
        assert largest_relative([measured[step] for step in others], [expected[step] for step in others]) < 1e-5, key
    assert furthest(runs.saved(name, STEPS), runs.saved("passed_over", STEPS)) < 1e-5


def test_a_kill_after_the_step_changes_nothing(runs):
    assert set(runs.ends["killed"]) == {-9}
    runs.ended_with("killed_again", 0)
    assert [event["step"] for event in runs.events("killed", "resume")] == [4]
    assert runs.column("killed", "step") == list(range(1, STEPS + 1))
    assert runs.column("killed", "applied") == [True, True, False, True, True, True]
    (skip,) = runs.events("killed", "skip")
    assert skip["step"] == BAD


def test_three_bad_steps_end_the_run_with_the_rows_named(runs, shards, packs):
    """A learning rate of 1e30 destroys the weights in step 1; steps 2 to 4 cannot be taken."""
    runs.ended_with("diverged", EXIT_GUARD)
    said = runs.said("diverged")
    assert "stopped: step 4: loss or gradient was not finite 3 steps in a row" in said
    assert "Traceback" not in said
    (stop,) = runs.events("diverged", "guard_stop")
    assert stop["step"] == 4
    assert "usual causes: a learning rate that is too high" in stop["reason"]
    skips = runs.events("diverged", "skip")
    assert [skip["step"] for skip in skips] == [2, 3, 4]
    assert [sorted(skip["doc_ids"]) for skip in skips] == [sorted(documents(shards, packs[s])) for s in (2, 3, 4)]
    out = runs.folder / "diverged"
    assert not (out / "export").exists()
    assert read_meta(newest_complete(out / "checkpoints"))["step"] == 3
    losses = runs.column("diverged", "loss")
    assert losses[0] > 0
    assert losses[1:] == [None, None, None], "not repaired, not NaN: null"


def test_a_step_without_labels_changes_nothing(tmp_path, base_model, strategy):
    """One pack of prompts only: decay and momentum must not move the weights."""
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
