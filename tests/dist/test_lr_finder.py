"""The learning-rate finder on two ranks: what it writes, and that the weights are as before, bit for bit.
Run: pytest tests/dist/test_lr_finder.py (all runs of a stage at once; see run_worker)"""

import json

import pytest
import torch

from sft.lr_suggestion import suggest
from tests import tiny
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 2
SWEEP = 36


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategy,
        "batch.rows_per_step": 2, "train.max_steps": STEPS, "track.wandb": "off",
        "optim.layer_decay": 0.9, "optim.l2_sp": 0.1, "train.ema_decay": 0.9,
    }  # fmt: skip

    def run(name, changes=None, **patches):
        return {"name": name, "ranks": 2, "options": options | (changes or {}), "out": name, "patches": patches}

    find = {"lr_finder": "true"}
    first = [
        run("plain"),
        run("found", find, sweep_steps=SWEEP),
        run("not_restored", find, sweep_steps=8, skip_restore=True),
    ]
    second = [
        run("trained_after_a_sweep", sweep_before=True, sweep_steps=5),
        run("trained_on_its_weights", sweep_before=True, sweep_steps=5, skip_restore=True),
        run("not_finite", find, sweep_steps=SWEEP, poison=["gradient", [0]]),
        run(
            "asked",
            find | {"batch.micro_batch": "auto", "batch.rows_per_step": 4},
            sweep_steps=SWEEP,
            signal_at_sweep=2,
            invent_memory=[[1, 1, 80]] * 2,
        ),
    ]
    third = [run("after") | {"out": "found"}, run("begun", find) | {"out": "plain"}]
    return Runs(tmp_path_factory.mktemp("finder"), [first, second, third])


def result(runs, name):
    return json.loads((runs.folder / name / "lr-finder.json").read_text())


def kinds(runs, out):
    return [event["event"] for event in tiny.read_jsonl(runs.folder / out / "events.jsonl")]


def test_what_is_written(runs):
    runs.ended_with("found", 0)
    found = result(runs, "found")
    assert len(found["lrs"]) == len(found["losses"]) == len(found["smoothed"]) == SWEEP
    assert found["lrs"][0] == pytest.approx(1e-8)
    assert found["lrs"][-1] == pytest.approx(1e-1)
    assert found["suggestion"]["lr"] == suggest(found["lrs"], found["losses"]).lr
    assert 1e-5 < found["suggestion"]["lr"] < 1e-1
    assert found["ended"] == "it reached 1e-01"
    assert found["settings"]["optim_lr"] == SETTINGS["optim.lr"]
    assert found["identity"]["optim.layer_decay"] == 0.9
    assert "1/10" in found["rule"]
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (runs.folder / "found" / "lr-finder.png").read_bytes().startswith(b"\x89PNG")
    assert f"suggested: --optim.lr {found['suggestion']['lr']:.1e}" in runs.said("found")


def test_the_sweep_trains_on_the_runs_first_batches(runs):
    assert runs.packs_read("found")[2] == runs.packs_read("plain")[2]
    found, plain = result(runs, "found"), runs.column("plain", "loss")
    assert found["losses"][0] == plain[0]
    assert found["losses"][1] != plain[1], "control: the second step comes after another update"


def test_the_first_batch_has_the_same_loss_before_and_after(runs):
    found = result(runs, "found")
    assert found["first_batch_loss"]["after"] == found["first_batch_loss"]["before"]
    assert found["first_batch_loss"]["before"] == pytest.approx(found["losses"][0], rel=1e-6)


def test_control_without_restoring_it_has_another_and_nothing_is_written(runs):
    runs.ended_with("not_restored", 1)
    assert "weights not restored" in runs.said("not_restored")
    assert not (runs.folder / "not_restored" / "lr-finder.json").exists()


def test_nothing_of_a_run_is_left_behind(runs):
    names = {path.name for path in (runs.folder / "not_restored").iterdir()}
    assert {"metrics.jsonl", "wandb", "export"} & names == set()
    assert not list((runs.folder / "not_restored" / "checkpoints").glob("step-*"))


def test_training_after_a_sweep_in_the_same_process_is_the_same_to_the_bit(runs):
    """Weights, moments, the moving average, and what Adam has counted."""
    runs.ended_with("trained_after_a_sweep", 0)
    plain, after = runs.saved("plain", STEPS), runs.saved("trained_after_a_sweep", STEPS)
    assert plain.keys() == after.keys()
    assert all(torch.equal(plain[key], after[key]) for key in plain)
    assert runs.column("trained_after_a_sweep", "loss") == runs.column("plain", "loss")


def test_control_training_on_what_the_sweep_has_left_is_another(runs):
    runs.ended_with("trained_on_its_weights", 0)
    plain, other = runs.saved("plain", STEPS), runs.saved("trained_on_its_weights", STEPS)
    assert not any(torch.equal(plain[key], other[key]) for key in plain)


def test_a_run_in_the_finders_folder_is_as_without(runs):
    runs.ended_with("after", 0)
    plain, after = runs.saved("plain", STEPS), runs.saved("found", STEPS)
    assert all(torch.equal(plain[key], after[key]) for key in plain)
    assert kinds(runs, "found") == kinds(runs, "plain")
    assert "lr_finder: false" in (runs.folder / "found" / "config.yaml").read_text()


def test_a_step_that_is_not_finite_ends_the_sweep_and_is_not_the_runs(runs):
    runs.ended_with("not_finite", 0)
    found = result(runs, "not_finite")
    assert "the gradient is not finite at" in found["ended"]
    assert found["suggestion"]["lr"] is None
    assert "are needed to see a slope" in found["suggestion"]["reason"]
    assert not (runs.folder / "not_finite" / "events.jsonl").exists(), "the step it skipped is none of the run's"


def test_a_sweep_that_is_asked_to_stop_leaves_without_a_result(runs):
    runs.ended_with("asked", 75)
    assert "the sweep is not over and nothing is written" in runs.said("asked")
    assert not (runs.folder / "asked" / "lr-finder.json").exists()
    assert (runs.folder / "asked" / "micro_batch.json").exists()
    assert kinds(runs, "asked") == ["preempt"], "a micro-batch that was tried would look like a run without an end"


def test_a_folder_with_a_run_is_refused_in_one_line(runs):
    runs.ended_with("begun", 2)
    said = runs.said("begun")
    assert "lr_finder: " in said
    assert "checkpoints/step-00000002 is of a run that has begun" in said
    assert "Traceback" not in said
    assert not (runs.folder / "plain" / "lr-finder.json").exists()
