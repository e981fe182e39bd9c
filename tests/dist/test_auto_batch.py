"""micro_batch auto and the end of memory, on real ranks with invented memory. Run: pytest tests/dist/test_auto_batch.py
(all runs of a stage at once; see run_worker)"""

import json

import pytest
import torch

from sft.errors import EXIT_BAD_INPUT, EXIT_RANK_LOST
from tests import tiny
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

PLENTY = [[10, 1, 80]] * 2
"""GiB taken, per pack, and of the device, for each rank: more than a step can fill."""
TIGHT = [[10, 1, 80], [1, 2, 6 / 0.92]]
"""Rank 1 has room for two packs."""
RECIPE = {  # what trials could leave a trace in, and what makes forwards larger
    "train.ema_decay": 0.9,
    "optim.l2_sp": 0.1,
    "train.neftune_alpha": 5,
    "train.label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    folder = tmp_path_factory.mktemp("auto")
    zero2 = tiny.make_strategy(folder / "zero2.json", stage=2)
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "checkpoint.every": 2, "train.stop_after": 2, "batch.micro_batch": "auto", **RECIPE,
    }  # fmt: skip

    def run(name, changes=None, memory=TIGHT, **more):
        patches = {"invent_memory": memory, "keep_states": str(folder / f"{name}-states")} | more.pop("patches", {})
        return {"name": name, "ranks": 2, "options": options | (changes or {}), "patches": patches, **more}

    first = [
        run("auto"),
        run("given", {"batch.micro_batch": 2}, patches={}),
        run("plenty", {"deepspeed": zero2}, PLENTY),
        run("full", {"batch.micro_batch": 2}, patches={"run_out": [1, 2]}),
    ]
    second = [
        run("again", {"train.stop_after": 3}, PLENTY, copy_of="auto"),
        run("elsewhere", {"train.stop_after": 3, "model.activation_checkpointing": "none"}, PLENTY, copy_of="auto"),
        run("none", {"model.mlp_tiles": 2}, [[1, 9, 80], [1, 9, 8]], copy_of="auto"),
        run("keeps_moments", patches={"keep_moments": None}),
        run("trains", patches={"train_in_trials": 0.01}),
    ]
    return Runs(folder, [first, second])


def states(runs, name):
    """[before, after] the trials, for each rank."""
    return [torch.load(runs.folder / f"{name}-states.{rank}.pt", weights_only=True) for rank in range(2)]


def same(one, other):
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_all_ranks_take_what_fits_the_smallest(runs):
    runs.ended_with("auto", 0)
    (event,) = runs.events("auto", "micro_batch")
    assert event["micro_batch"] == 2
    assert [trial["micro_batch"] for trial in event["trials"]] == [0, 1, 2]
    assert event["trials"][-1] | {"rank": 1, "peak_gib": 5.0, "limit_gib": 6.0} == event["trials"][-1]
    assert "micro-batch 2: 5.0 of 6.0 GiB; 4 would need about 9.0" in runs.said("auto")
    assert "2 ranks x 2 micro-batch x 2 accumulation = 8" in runs.said("auto")
    runs.ended_with("plenty", 0)
    (event,) = runs.events("plenty", "micro_batch")
    assert [trial["micro_batch"] for trial in event["trials"]] == [0, 1, 4], "control: with memory, all that a step has"


def test_the_packs_of_a_forward_are_that_many(runs):
    sizes = {len(line["packs"]) for line in tiny.read_jsonl(runs.folder / "auto.packs") if line["step"]}
    assert sizes == {2}


@pytest.mark.parametrize("name", ["auto", "plenty"])
def test_trials_leave_no_trace(runs, name):
    runs.ended_with(name, 0)
    for before, after in states(runs, name):
        assert same(before, after)
        assert int(after["step"]) == 0
        assert {key.split()[0] for key in after} > {"fp32", "exp_avg", "exp_avg_sq", "ema"}


def test_a_trace_would_show(runs):
    for before, after in states(runs, "keeps_moments"):
        assert not same(before, after)
        assert int(after["step"]) == 3
    runs.ended_with("keeps_moments", 0)
    assert runs.column("keeps_moments", "loss") != pytest.approx(runs.column("given", "loss"), rel=1e-6)


def test_trials_that_change_weights_end_the_run(runs):
    runs.ended_with("trains", EXIT_BAD_INPUT)
    assert "error: batch.micro_batch auto: updates with learning rate 0 have changed weights" in runs.said("trains")


def test_the_run_is_the_one_with_that_micro_batch(runs):
    runs.ended_with("given", 0)
    for column in ("loss", "grad_norm"):
        assert runs.column("auto", column) == pytest.approx(runs.column("given", column), rel=1e-6)
    assert same(runs.saved("auto", 2), runs.saved("given", 2))


def test_a_resume_on_the_same_hardware_does_not_try_again(runs):
    runs.ended_with("again", 0)
    before, now = runs.events("again", "micro_batch")
    assert before["trials"]
    assert (now["micro_batch"], now["trials"]) == (2, [])
    assert "micro-batch 2: found when this run was started here before" in runs.said("again")
    record = json.loads((runs.folder / "again" / "micro_batch.json").read_text())
    assert record["micro_batch"] == 2
    assert list(record["holds_for"]["devices"].values()) == [2]


def test_with_other_options_it_does(runs):
    runs.ended_with("elsewhere", 0)
    found = [event["micro_batch"] for event in runs.events("elsewhere", "micro_batch")]
    assert found == [2, 4]


def test_one_pack_that_does_not_fit(runs):
    runs.ended_with("none", EXIT_BAD_INPUT)
    said = runs.said("none")
    assert "out of memory at step 0, trying micro_batch 1 (one pack takes 10.0 GiB, rank 1 has 8.0 GiB)" in said
    assert "which found" not in said, "what was found under other circumstances is no ground for advice"
    assert "Traceback" not in said
    assert not (runs.folder / "none" / "micro_batch.json").exists()


def test_a_rank_without_memory_says_what_to_change(runs):
    """The other rank waits for it in a collective; the watchdog ends it."""
    ends = {line["rank"]: line["code"] for line in tiny.read_jsonl(runs.folder / "ends.jsonl") if line["run"] == "full"}
    assert ends == {0: EXIT_RANK_LOST, 1: EXIT_BAD_INPUT}
    other, said = ((runs.folder / f"full.{rank}.err").read_text() for rank in range(2))
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "out of memory" in line]
    place = "step 1, forward and backward"
    assert f"out of memory at {place} (asked for 2.00 GiB more of 79.11 GiB); in order of cost: PYTORCH_CUDA" in line
    assert "batch.micro_batch 1 instead of 2 (the same update)" in line
    assert f"ended in {place}: error: rank 1 on" in other
