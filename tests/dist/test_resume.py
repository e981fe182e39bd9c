"""Stop and resume equals the uninterrupted run, across an epoch boundary; what may not be resumed is refused.
Run: pytest tests/dist/test_resume.py (all runs of a stage at once; see run_worker)"""

import shutil

import pytest

from tests import tiny
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS, largest_difference, metrics, train, weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 6
LAST = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "train.max_steps": STEPS, "checkpoint.every": 2, "eval.every": 2,
    }  # fmt: skip

    def run(name, ranks=2, changes=None, **more):
        return {"name": name, "ranks": ranks, "options": options | (changes or {}), **more}

    def copy(name, remove, **more):
        return run(name, copy_of="parts", remove=["export", *remove], out=name, **more)

    first = [
        run("whole"),
        run("first_part", changes={"train.stop_after": 3}, out="parts"),
        run("other_order", ranks=1, changes={"data.seed": 1, "train.stop_after": 2}),
    ]
    third = [
        run("whole_again", out="whole"),
        copy("torn", [f"{LAST}/COMPLETE"]),
        copy("refused", [LAST], ranks=1, changes={"batch.rows_per_step": 4, "optim.lr": 0.5}),
        copy("moments_lost", [LAST], patches={"lose_moments": True}),
    ]
    return Runs(tmp_path_factory.mktemp("resume"), [first, [run("second_part", out="parts")], third])


@pytest.fixture(scope="module")
def whole(runs):
    return runs.folder / "whole"


@pytest.fixture(scope="module")
def parts(runs):
    runs.ended_with("first_part", 0)
    runs.ended_with("second_part", 0)
    return runs.folder / "parts"


def test_the_run_crosses_an_epoch(whole):
    epochs = [line["epoch"] for line in metrics(whole)]
    assert epochs[2] < 1 < epochs[-1], "the stop after step 3 lies in epoch 0, the end in epoch 1"


def test_losses_norms_and_rates_equal(whole, parts):
    one, other = metrics(whole), metrics(parts)
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "tokens", "label_tokens", "epoch"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-6), key


def test_final_weights_equal(whole, parts):
    assert largest_difference(weights(parts), weights(whole)) < 1e-6


def test_heldout_loss_is_measured_and_equal(whole, parts):
    measured = [line["heldout_loss"] for line in metrics(whole) if "heldout_loss" in line]
    again = [line["heldout_loss"] for line in metrics(parts) if "heldout_loss" in line]
    assert len(measured) == 3
    assert again[-1] == pytest.approx(measured[-1], rel=1e-6)


def test_control_another_order_gives_other_losses(runs, whole):
    runs.ended_with("other_order", 0)
    one, other = metrics(whole), metrics(runs.folder / "other_order")
    assert abs(one[0]["loss"] - other[0]["loss"]) / one[0]["loss"] > 1e-3


def test_events_tell_what_happened(parts):
    events = [(event["event"], event["step"]) for event in tiny.read_jsonl(parts / "events.jsonl")]
    assert ("start", 0) in events
    assert ("stop", 3) in events
    assert ("resume", 3) in events
    assert ("finish", 6) in events


def test_retention_keeps_the_newest_two_and_the_best(whole):
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    losses = {
        event["step"]: event["heldout_loss"]
        for event in tiny.read_jsonl(whole / "events.jsonl")
        if event["event"] == "evaluate"
    }
    best = min(losses, key=losses.get)
    assert kept == {f"step-{step:08d}" for step in {4, 6, best}}


def test_a_finished_run_says_so(runs, whole):
    runs.ended_with("whole_again", 0)
    assert "finished" in runs.said("whole_again")
    assert len(metrics(whole)) == STEPS


def test_a_checkpoint_without_marker_is_left_alone(runs, parts):
    """The newest folder lost its marker: the run goes on from the one before."""
    runs.ended_with("torn", 0)
    (event,) = runs.events("torn", "torn")
    assert "step-00000006 is not complete and will not be used" in event["reason"]
    assert f"WARNING: {event['reason']}" in runs.said("torn")
    assert runs.events("torn", "resume")[-1]["step"] == 4
    assert largest_difference(weights(runs.folder / "torn"), weights(parts)) < 1e-6


def test_another_runs_checkpoint_is_refused(runs, parts):
    runs.ended_with("refused", 2)
    said = runs.said("refused")
    assert "belongs to another run" in said
    assert "rows_per_step: was 8, now 4" in said
    assert "optim.lr: was 0.01, now 0.5" in said
    assert "Traceback" not in said
    written, copied = ((folder / "config.yaml").read_text() for folder in (parts, runs.folder / "refused"))
    assert written == copied, "a refused resume changes nothing"


def test_control_lost_moments_are_noticed(runs, whole):
    """The steps after a resume with moments of zero come out different."""
    runs.ended_with("moments_lost", 0)
    assert runs.events("moments_lost", "resume")[-1]["step"] == 4
    lost, kept = metrics(runs.folder / "moments_lost")[-1]["loss"], metrics(whole)[-1]["loss"]
    assert abs(lost - kept) / kept > 1e-4
    assert largest_difference(weights(runs.folder / "moments_lost"), weights(whole)) > 1e-4


def test_an_export_on_the_way_is_not_taken_for_the_end(tmp_path, base_model, prepared, strategy):
    from sft.export import main as export

    out = tmp_path / "run"
    options = {"train__max_steps": 2}
    train(out, base_model, prepared, strategy, 1, train__stop_after=1, **options)
    export([str(out)])
    assert (out / "export-step-00000001").is_dir()
    assert not (out / "export").exists()
    shutil.copytree(out / "export-step-00000001", out / "export")
    done = train(out, base_model, prepared, strategy, 1, expect=2, **options)
    assert "loads back different" in done.stderr
    shutil.rmtree(out / "export")
    assert "finished" in train(out, base_model, prepared, strategy, 1, **options).stdout
    assert (out / "export").is_dir()
    refused = train(out, base_model, prepared, strategy, 1, expect=2, train__stop_after=1, **options)
    assert "the run is at step 2 already" in refused.stderr
