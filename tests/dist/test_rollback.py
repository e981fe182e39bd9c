"""A loss spike is undone: back to a checkpoint from before it, past its batches, exactly, and even if interrupted.
Run: pytest tests/dist/test_rollback.py (all runs of a stage at once; see run_worker)"""

import json

import pytest

from sft.checkpoint import list_checkpoints, read_meta
from sft.errors import EXIT_GUARD
from tests.dist.runs import Runs, furthest, rollback_note
from tests.dist.training import SETTINGS, largest_relative

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 18
EVERY = 3
WRECKED, SPIKE = 12, 13
"""The weights are wrecked in a step that is saved; the loss of the next one shows it."""
BACK_TO = 9
INTERRUPTED = {
    "killed_before_the_note": ["write_json", 2 * (WRECKED // EVERY) + 1],  # two files of JSON per checkpoint
    "killed_before_the_deletion": ["delete", 1],
    "killed_before_the_load": ["load", 1],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategy,
        "train.max_steps": STEPS, "batch.rows_per_step": 4, "checkpoint.every": EVERY, "checkpoint.keep_last": 10,
        "guard.spike_window": 8, "guard.on_spike": "rollback",
    }  # fmt: skip

    def run(name, lr_raised_in=(WRECKED,), patches=None, **more):
        own = more.pop("options", {})
        return {"name": name, "ranks": 2, "options": options | own, **more,
                "patches": {"raise_lr": lr_raised_in, **(patches or {})}}  # fmt: skip

    noted = [
        rollback_note(prepared / "train", 4, SPIKE, [WRECKED, SPIKE]),
        rollback_note(prepared / "train", 4, 3, [2, 3], seed=1),  # of another order: not to be followed
    ]
    first = [
        run("undone"),
        run("passed_over", files={"config.yaml": "", "rollbacks.json": json.dumps(noted)}),
        run("recorded", options={"guard.on_spike": "record"}),
        run("exhausted", lr_raised_in=(WRECKED, 16), options={"guard.max_rollbacks": 1}),
        *(run(name, patches={"kill_before": place}) for name, place in INTERRUPTED.items()),
    ]
    again = [run(f"{name}_again", out=name) for name in INTERRUPTED]
    return Runs(tmp_path_factory.mktemp("rollback"), [first, again])


def assert_equal_to_passing_over(runs, out):
    assert runs.column(out, "step") == list(range(1, STEPS + 1)), "each step once"
    for key in ("lr", "tokens", "applied"):
        assert runs.column(out, key) == runs.column("passed_over", key), key
    for key in ("loss", "grad_norm"):
        assert largest_relative(runs.column(out, key), runs.column("passed_over", key)) < 1e-6, key
    assert furthest(runs.saved(out, STEPS), runs.saved("passed_over", STEPS)) < 1e-6, "weights and moments"


def notes(runs, out):
    return json.loads((runs.folder / out / "rollbacks.json").read_text())


def test_a_spike_is_undone_and_its_batches_passed_over(runs):
    runs.ended_with("undone", 0)
    (spike,) = runs.events("undone", "spike")
    assert spike["step"] == SPIKE
    assert spike["loss"] > 2 * spike["usual"]
    (event,) = runs.events("undone", "rollback")
    assert event["reason"] in runs.said("undone")
    assert f"step-{BACK_TO:08d}" in event["reason"], "not to the one that was saved after the wrecking step"
    (note,) = notes(runs, "undone")
    assert (note["spike"], note["to"], note["passed_over"]) == (SPIKE, f"step-{BACK_TO:08d}", [WRECKED, SPIKE])
    skips = [(skip["step"], skip["reason"]) for skip in runs.events("undone", "skip")]
    assert skips == [(WRECKED, f"loss spike in step {SPIKE}"), (SPIKE, f"loss spike in step {SPIKE}")]
    assert (runs.folder / "undone" / "export").is_dir()


def test_the_run_equals_one_that_passed_over_the_batches_from_the_start(runs):
    runs.ended_with("passed_over", 0)
    assert not runs.events("passed_over", "spike")
    losses = runs.column("passed_over", "loss")
    assert [step for step, loss in enumerate(losses, start=1) if loss is None] == [WRECKED, SPIKE]
    assert_equal_to_passing_over(runs, "undone")


def test_control_a_recorded_spike_undoes_nothing(runs):
    runs.ended_with("recorded", 0)
    (spike,) = runs.events("recorded", "spike")
    assert spike["step"] == SPIKE
    assert not runs.events("recorded", "rollback")
    assert not (runs.folder / "recorded" / "rollbacks.json").exists()
    with pytest.raises(AssertionError):
        assert_equal_to_passing_over(runs, "recorded")
    assert runs.column("recorded", "loss")[SPIKE - 1] == spike["loss"]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_rollback_that_is_killed_on_the_way_is_completed_by_the_same_command(runs, name):
    assert -9 in runs.ends[name]
    assert set(runs.ends[name]) <= {-9, 1, 5}, runs.said(name)
    runs.ended_with(f"{name}_again", 0)
    assert_equal_to_passing_over(runs, name)
    assert notes(runs, name) == notes(runs, "undone")


def test_a_run_is_rolled_back_so_often_and_no_more(runs):
    runs.ended_with("exhausted", EXIT_GUARD)
    assert "rolled back 1 times already" in runs.said("exhausted")
    assert "Traceback" not in runs.said("exhausted")
    (stop,) = runs.events("exhausted", "guard_stop")
    assert stop["step"] == 17
    assert [spike["step"] for spike in runs.events("exhausted", "spike")] == [SPIKE, 17]
    assert len(runs.events("exhausted", "rollback")) == len(notes(runs, "exhausted")) == 1


def test_no_checkpoint_of_the_abandoned_steps_is_left(runs):
    folder = runs.folder / "undone" / "checkpoints"
    counted = {read_meta(saved)["step"]: read_meta(saved)["optimizer_step"] for saved in list_checkpoints(folder)}
    assert counted == {3: 3, 6: 6, 9: 9, 12: 11, 15: 13, 18: 16}
