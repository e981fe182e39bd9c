"""Stop and resume equals the uninterrupted run, across an epoch boundary. Run: pytest tests/dist/test_resume.py"""

import json
import shutil

import pytest
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.dist.training import largest_difference, metrics, train, weights

pytestmark = pytest.mark.dist

OPTIONS = {"train__max_steps": 6, "checkpoint__every": 2, "eval__every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base_model, prepared, strategy):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, base_model, prepared, strategy, 2, data__heldout=prepared / "heldout", **OPTIONS)
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory, base_model, prepared, strategy):
    out = tmp_path_factory.mktemp("parts") / "run"
    options = {"data__heldout": prepared / "heldout", **OPTIONS}
    train(out, base_model, prepared, strategy, 2, train__stop_after=3, **options)
    train(out, base_model, prepared, strategy, 2, **options)
    return out


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


def test_control_another_order_gives_other_losses(whole, tmp_path, base_model, prepared, strategy):
    train(tmp_path / "run", base_model, prepared, strategy, 1, data__seed=1, train__stop_after=2, **OPTIONS)
    one, other = metrics(whole), metrics(tmp_path / "run")
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


def test_a_finished_run_says_so(whole, base_model, prepared, strategy):
    done = train(whole, base_model, prepared, strategy, 2, data__heldout=prepared / "heldout", **OPTIONS)
    assert "finished" in done.stdout
    assert len(metrics(whole)) == 6


def test_a_checkpoint_without_marker_is_left_alone(parts, tmp_path, base_model, prepared, strategy):
    """The newest folder lost its marker: the run goes on from the one before."""
    out = tmp_path / "run"
    shutil.copytree(parts, out)
    shutil.rmtree(out / "export")
    (out / "checkpoints" / "step-00000006" / "COMPLETE").unlink()
    done = train(out, base_model, prepared, strategy, 2, data__heldout=prepared / "heldout", **OPTIONS)
    (torn,) = [event for event in tiny.read_jsonl(out / "events.jsonl") if event["event"] == "torn"]
    assert f"WARNING: {torn['reason']}" in done.stdout
    assert "step-00000006 is not complete and will not be used" in torn["reason"]
    events = [event for event in tiny.read_jsonl(out / "events.jsonl") if event["event"] == "resume"]
    assert events[-1]["step"] == 4
    assert largest_difference(weights(out), weights(parts)) < 1e-6


def test_another_runs_checkpoint_is_refused(parts, tmp_path, base_model, prepared, strategy):
    out = tmp_path / "run"
    shutil.copytree(parts, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    config = (out / "config.yaml").read_text()
    options = {**OPTIONS, "batch__rows_per_step": 4, "optim__lr": 0.5}
    done = train(out, base_model, prepared, strategy, 1, expect=2, **options)
    assert "belongs to another run" in done.stderr
    assert "rows_per_step: was 8, now 4" in done.stderr
    assert "optim.lr: was 0.01, now 0.5" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "config.yaml").read_text() == config, "a refused resume changes nothing"


def sign_again(saved):
    """Make an edited checkpoint undamaged: sizes and digests of what it holds now."""

    def entry(path):
        content = path.read_bytes()
        return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}

    meta = json.loads((saved / "meta.json").read_text())
    meta["files"] = {name: entry(saved / name) for name in meta["files"]}
    (saved / "meta.json").write_text(json.dumps(meta))
    (saved / "COMPLETE").write_text(json.dumps({"meta.json": entry(saved / "meta.json")}))


def test_control_lost_moments_are_noticed(whole, parts, tmp_path, base_model, prepared, strategy):
    """With the moments zeroed in an otherwise whole checkpoint, the steps after it come out different."""
    out = tmp_path / "run"
    shutil.copytree(parts, out)
    shutil.rmtree(out / "export")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    saved = out / "checkpoints" / "step-00000004"
    for file in saved.glob("rank-*"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {key: value * ("fp32" in key) for key, value in load_file(file).items()}
        save_file(tensors, file, metadata=metadata)
    sign_again(saved)
    train(out, base_model, prepared, strategy, 2, data__heldout=prepared / "heldout", **OPTIONS)
    lost, kept = metrics(out)[-1]["loss"], metrics(whole)[-1]["loss"]
    assert abs(lost - kept) / kept > 1e-4
    assert largest_difference(weights(out), weights(whole)) > 1e-4


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
