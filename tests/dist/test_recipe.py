"""What a recipe adds to the plain run, on real ranks: against a plain loop, over other cuts of a step, over a resume.
Run: pytest tests/dist/test_recipe.py (all runs of a stage at once; see run_worker)"""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data_prep.shards import open_shards
from sft.batch import split_documents
from sft.checkpoint import read_meta, step_folder
from sft.config import ScheduleSection
from sft.order import FILLER, step_rows
from sft.schedule import lr_at
from tests import tiny
from tests.dist.runs import Runs, furthest
from tests.dist.training import SETTINGS, largest_difference, metrics, weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, LR = 4, 0.01
RATES = {
    "optim.layer_decay": 0.5,
    "optim.multipliers": json.dumps(
        [{"match": "q_proj|k_proj", "factor": 0.1}, {"match": "lm_head", "start": 2}, {"match": "norm", "factor": 0}]
    ),
}
NOISE = {"train.neftune_alpha": 20}
DROPOUT = {"model.attention_dropout": 0.3}
STOPPING = {
    "optim.lr": 0.3, "schedule.name": "constant", "train.max_steps": 30, "eval.every": 1, "checkpoint.every": 1,
    "checkpoint.keep_last": 1, "train.early_stop.patience": 3, "optim.grad_clip": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "train.max_steps": STEPS, "optim.lr": LR, "checkpoint.every": 2, "eval.every": 2,
    }  # fmt: skip

    def run(name, changes, ranks=2, **more):
        return {"name": name, "ranks": ranks, "options": options | changes, **more}

    first = [
        run("plain", {}),
        run("rates", RATES),
        run("smoothed", {"train.label_smoothing": 0.2}),
        run("noise", NOISE),
        run("noise_part", {**NOISE, "train.stop_after": 2}, out="noise_parts"),
        run("noise_one_rank", {**NOISE, "batch.micro_batch": 8}, ranks=1),
    ]
    second = [
        run("noise_rest", {**NOISE, "batch.micro_batch": 4}, out="noise_parts"),
        run("noise_refused", {"train.neftune_alpha": 5}, copy_of="noise_parts", out="noise_refused"),
        run("dropout", DROPOUT),
        run("dropout_part", {**DROPOUT, "train.stop_after": 2}, out="dropout_parts"),
        run("dropout_one_rank", DROPOUT, ranks=1),
        run("stopping", STOPPING),
        run("stopping_part", {**STOPPING, "train.stop_after": 2}, out="stopping_parts"),
        run("stopping_cut", STOPPING, out="stopping_cuts", patches={"stop_in_heldout": 2}),
    ]
    third = [
        run("dropout_rest", DROPOUT, out="dropout_parts"),
        run("stopping_again", STOPPING, out="stopping"),
        run("stopping_rest", STOPPING, out="stopping_parts"),
        run("stopping_measured", {**STOPPING, "train.stop_after": 2}, out="stopping_cuts"),
        run("stopping_on", {**STOPPING, "train.early_stop.patience": 30}, copy_of="stopping"),
    ]
    return Runs(tmp_path_factory.mktemp("recipe"), [first, second, third])


@pytest.fixture
def ended(runs):
    """A run by name, which has ended well."""

    def folder(name, out=None):
        runs.ended_with(name, 0)
        return runs.folder / (out or name)

    return folder


def plain_loop(base_model, prepared, rate_of, smoothing=0.0):
    """One process, one document at a time, a parameter group each: (losses, parameters)."""
    shards = open_shards(prepared / "train")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    groups = [
        {"params": [weight], "weight_decay": 0.01 if weight.ndim > 1 and "embed" not in name else 0.0, "name": name}
        for name, weight in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        rows = [int(row) for row in step_rows(0, step, len(shards), 8) if row != FILLER]
        total, labels_seen = torch.zeros(()), 0
        for ids, labels in [document for row in rows for document in split_documents(shards.pack(row))]:
            logits = model(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0]
            targets = torch.tensor(labels, dtype=torch.long)[1:]
            total = total + cross_entropy(logits[:-1], targets, reduction="sum", label_smoothing=smoothing)
            labels_seen += int((targets != -100).sum())
        (total / labels_seen).backward()
        losses.append(total.item() / labels_seen)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, STEPS, LR, ScheduleSection(warmup=0)) * rate_of(group["name"], step + 1)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


def rate_by_hand(num_layers):
    def rate(name, step):
        below = num_layers + 1 if "embed" in name else 0
        if ".layers." in name:
            below = num_layers - int(name.split(".layers.")[1].split(".")[0])
        factor = 0.5**below
        factor *= 0.1 if "q_proj" in name or "k_proj" in name else 1
        factor *= 0 if "norm" in name or ("lm_head" in name and step <= 2) else 1
        return factor

    return rate


def test_rates_by_layer_and_name_equal_a_plain_loop(ended, base_model, prepared):
    num_layers = json.loads((base_model / "config.json").read_text())["num_hidden_layers"]
    losses, expected = plain_loop(base_model, prepared, rate_by_hand(num_layers))
    trained = ended("rates")
    assert [line["loss"] for line in metrics(trained)] == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights(trained), expected) < 1e-5
    assert largest_difference(weights(ended("plain")), expected) > 1e-3, "control: without them it is another run"


def test_what_has_factor_0_stays_as_it_is(ended, base_model):
    base = dict(AutoModelForCausalLM.from_pretrained(base_model).named_parameters())
    trained = weights(ended("rates"))
    assert all(torch.equal(trained[name], base[name]) for name in base if "norm" in name)
    assert not any(torch.equal(trained[name], base[name]) for name in base if "norm" not in name), "control"


def test_label_smoothing_equals_a_plain_loop(ended, base_model, prepared):
    losses, expected = plain_loop(base_model, prepared, lambda _name, _step: 1.0, smoothing=0.2)
    trained = ended("smoothed")
    assert [line["loss"] for line in metrics(trained)] == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights(trained), expected) < 1e-5


def test_label_smoothing_and_noise_are_not_in_the_heldout_loss(runs, ended):
    """The first measurement, after two steps, is close to the plain run's; the training loss of smoothing is not."""
    held = {name: runs.events(ended(name).name, "evaluate")[0]["heldout_loss"] for name in ("plain", "smoothed")}
    first = {name: metrics(ended(name))[0]["loss"] for name in ("plain", "smoothed", "noise")}
    assert held["smoothed"] == pytest.approx(held["plain"], rel=0.02)
    assert first["noise"] != first["plain"]


def test_noise_does_not_depend_on_how_a_step_is_cut(ended):
    whole, parts, one = ended("noise"), ended("noise_rest", "noise_parts"), ended("noise_one_rank")
    for other in (parts, one):
        assert [line["loss"] for line in metrics(other)] == pytest.approx(
            [line["loss"] for line in metrics(whole)], rel=1e-5
        )
        assert largest_difference(weights(other), weights(whole)) < 1e-4
    plain = [line["loss"] for line in metrics(ended("plain"))]
    assert [line["loss"] for line in metrics(whole)] != pytest.approx(plain, rel=1e-4), "control: noise is there"


def test_other_noise_is_another_run(runs):
    runs.ended_with("noise_refused", 2)
    assert "train.neftune_alpha: was 20.0, now 5.0" in runs.said("noise_refused")


def test_dropout_is_the_same_over_a_resume_and_over_ranks(runs, ended):
    """One pack per forward: its seed is its place in the step."""
    whole = ended("dropout")
    for other in (ended("dropout_rest", "dropout_parts"), ended("dropout_one_rank")):
        assert furthest(runs.saved(other.name, STEPS), runs.saved("dropout", STEPS)) < 1e-4
        assert [line["loss"] for line in metrics(other)] == pytest.approx(
            [line["loss"] for line in metrics(whole)], rel=1e-5
        )
    plain = [line["loss"] for line in metrics(ended("plain"))]
    assert [line["loss"] for line in metrics(whole)] != pytest.approx(plain, rel=1e-4), "control: weights are dropped"


def test_a_run_stops_early_and_exports_its_best_checkpoint(runs, ended):
    stopped = ended("stopping")
    held = [(line["step"], line["heldout_loss"]) for line in metrics(stopped)]
    best_step, best_loss = min(held, key=lambda measured: measured[1])
    assert len(held) == best_step + 3 < 30
    (event,) = runs.events("stopping", "early_stop")
    assert (event["step"], event["best_step"], event["best_loss"]) == (best_step + 3, best_step, best_loss)
    best = stopped / "checkpoints" / f"step-{best_step:08d}"
    saved = runs.saved("stopping", best_step)
    exported = weights(stopped)
    assert all(torch.equal(exported[name].flatten(), saved[f"{name}|fp32"]) for name in exported)
    last = runs.saved("stopping", best_step + 3)
    assert not torch.equal(exported["lm_head.weight"].flatten(), last["lm_head.weight|fp32"]), "control: not the last"
    assert best.is_dir()


def test_started_again_it_knows_that_it_has_stopped(runs):
    runs.ended_with("stopping_again", 0)
    said = runs.said("stopping_again")
    assert "is finished" in said
    assert "stopped early" in said
    assert len(tiny.read_jsonl(runs.folder / "stopping" / "metrics.jsonl")) < 30


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(runs, ended):
    whole, parts = ended("stopping"), ended("stopping_rest", "stopping_parts")
    assert len(metrics(parts)) == len(metrics(whole))
    assert (
        runs.events("stopping_parts", "early_stop")[0]["best_step"]
        == (runs.events("stopping", "early_stop")[0]["best_step"])
    )


def test_a_measurement_that_was_cut_short_is_made_up_for(runs, ended):
    """Else early stopping, and the choice of the best checkpoint, would show that the run was interrupted."""
    runs.ended_with("stopping_cut", 75)
    whole = metrics(ended("stopping"))[:2]
    parts = ended("stopping_measured", "stopping_cuts")
    assert [line["heldout_loss"] for line in metrics(parts)] == [line["heldout_loss"] for line in whole]
    assert len(runs.events("stopping_cuts", "evaluate")) == 2, "control: the first process had measured once"
    assert read_meta(step_folder(parts / "checkpoints", 2))["heldout_loss"] == whole[1]["heldout_loss"]


def test_with_more_patience_a_stopped_run_goes_on_and_exports_what_is_best_then(runs, ended):
    stopped, went_on = ended("stopping"), ended("stopping_on")
    held = {line["step"]: line["heldout_loss"] for line in metrics(went_on)}
    assert len(held) == 30
    best = min(held, key=held.__getitem__)
    assert best < 30, "control: the last is not the best"
    assert runs.events("stopping_on", "export")[-1]["step"] == best
    exported, saved = weights(went_on), runs.saved("stopping_on", best)
    assert all(torch.equal(exported[name].flatten(), saved[f"{name}|fp32"]) for name in exported)
    earlier = runs.events("stopping", "export")[0]["step"]
    assert best != earlier, "control: another step is the best now"
    aside = AutoModelForCausalLM.from_pretrained(went_on / f"export-step-{earlier:08d}").state_dict()
    assert all(torch.equal(aside[name], weight) for name, weight in weights(stopped).items())
