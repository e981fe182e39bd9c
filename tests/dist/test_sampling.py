"""Samples on real ranks: answers equal transformers' generate on each prompt alone, and training is left alone.
Run: pytest tests/dist/test_sampling.py (all runs of a stage at once; see run_worker)"""

import json

import pytest
import torch

from sft.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED
from tests import tiny
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS
from tests.sampled import LONGEST, ROWS, answers, make_readable_model, plain_answers

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_readable_model(tmp_path_factory.mktemp("sampled") / "base")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model, prepared, strategy):
    folder = tmp_path_factory.mktemp("samples")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(ROWS))
    plain = {
        **SETTINGS, "model.path": model, "data.train": prepared / "train", "deepspeed": strategy,
        "train.max_steps": STEPS, "batch.rows_per_step": 4, "checkpoint.every": 2,
    }  # fmt: skip
    sampled = {
        **plain, "eval.samples.prompts": prompts, "eval.samples.every": 2, "eval.samples.max_new_tokens": LONGEST,
    }  # fmt: skip
    first_only = {**sampled, "train.stop_after": 1}
    rollback = {
        **sampled, "train.max_steps": 20, "train.stop_after": 12, "checkpoint.every": 4, "eval.samples.every": 5,
        "eval.samples.max_new_tokens": 2, "guard.spike_window": 8, "guard.on_spike": "rollback",
    }  # fmt: skip
    stage2 = tiny.make_strategy(folder / "zero2.json", stage=2)

    def run(name, options, ranks=2, patches=None, **more):
        return {"name": name, "ranks": ranks, "options": options, "patches": patches or {}, **more}

    first = [
        run("whole", sampled),
        run("plain", {**plain, "train.stop_after": 2}),
        run("stopped", sampled, patches={"stop_in_samples": 20}),
        run("leaking", first_only, patches={"leak_samples": None}),
        run("stage2", {**first_only, "deepspeed": stage2}),
        run("shared", {**first_only, "batch.sequence_parallel": 2}),
        run("undone", rollback, ranks=1, patches={"raise_lr": [10]}),
        run("no_file", {**sampled, "eval.samples.prompts": folder / "none.txt"}, ranks=1),
    ]
    second = [
        run("stopped_again", {**sampled, "train.stop_after": 2}, ranks=1, out="stopped"),
        run("earlier", {**sampled, "train.stop_after": 2}, ranks=1, copy_of="whole",
            remove=["checkpoints/step-00000003"]),
    ]  # fmt: skip
    return Runs(folder, [first, second])


def lines(runs, out, step):
    return answers(runs.folder / out, step)


def steps_asked(runs, out):
    return [event["step"] for event in runs.events(out, "samples")]


def test_answers_equal_transformers_for_the_base_model_and_the_exported_one(runs, model):
    runs.ended_with("whole", 0)
    base, tuned = plain_answers(model), plain_answers(runs.folder / "whole" / "export")
    assert {finished for _, finished, _ in base} == {True, False}, "some end early, some do not"
    assert base != tuned, "training moved the answers"
    assert lines(runs, "whole", 0) == base
    assert lines(runs, "whole", STEPS) == tuned
    assert lines(runs, "whole", 0) != plain_answers(model, before=()), "control: without BOS"


def test_prompts_come_as_in_the_file_when_they_are_due_and_at_the_last_step(runs):
    found = tiny.read_jsonl(runs.folder / "whole" / "samples.jsonl")
    shown = [f"{row['instruction']}\n\n{row['input']}" if "input" in row else row["instruction"] for row in ROWS]
    assert [(line["step"], line["prompt"]) for line in found] == [(step, text) for step in (0, 2, 3) for text in shown]
    assert {tuple(line) for line in found} == {("step", "prompt", "answer", "finished", "tokens")}
    assert steps_asked(runs, "whole") == [0, 2, 3]
    event = runs.events("whole", "samples")[0]
    assert event["prompts"] == len(ROWS)
    assert event["finished"] == sum(line["finished"] for line in found[: len(ROWS)])
    assert "\n  after step 2: " in runs.said("whole")


def test_a_leaking_layout_changes_answers(runs, model):
    runs.ended_with("leaking", 0)
    assert lines(runs, "leaking", 0) != plain_answers(model)


@pytest.mark.parametrize("name", ["stage2", "shared"])
def test_another_stage_and_ranks_that_share_packs_answer_alike(runs, name):
    runs.ended_with(name, 0)
    assert lines(runs, name, 0) == lines(runs, "whole", 0)


def test_samples_change_nothing_in_training(runs):
    runs.ended_with("plain", 0)
    assert not (runs.folder / "plain" / "samples.jsonl").exists()
    for key in ("loss", "grad_norm", "lr"):
        assert runs.column("whole", key)[:2] == runs.column("plain", key), key
    sampled, plain = (runs.saved(out, 2) for out in ("whole", "plain"))
    assert all(torch.equal(sampled[key], plain[key]) for key in plain)


def test_a_stop_request_ends_it_and_the_next_start_asks_what_is_missing(runs):
    """The signal comes at step 2; the second start has one rank."""
    runs.ended_with("stopped", EXIT_PREEMPTED)
    assert "rank 1 received SIGTERM; step 2 of 3 is saved" in runs.said("stopped")
    runs.ended_with("stopped_again", 0)
    found = tiny.read_jsonl(runs.folder / "stopped" / "events.jsonl")
    course = [event["event"] for event in found if event["event"] in ("samples", "preempt", "resume")]
    assert course == ["samples", "preempt", "resume", "samples"], "none at step 2 before the signal"
    assert lines(runs, "stopped", 0) == lines(runs, "whole", 0)
    assert lines(runs, "stopped", 2) == lines(runs, "whole", 2)


def test_a_resume_drops_later_answers_and_asks_no_earlier_ones_again(runs):
    runs.ended_with("earlier", 0)
    assert steps_asked(runs, "earlier") == [0, 2, 3], "what had been asked before the copy"
    assert [len(lines(runs, "earlier", step)) for step in (0, 2, 3)] == [5, 5, 0]


def test_answers_of_steps_that_are_undone_are_given_anew(runs):
    runs.ended_with("undone", 0)
    assert [event["step"] for event in runs.events("undone", "rollback")] == [11]
    assert steps_asked(runs, "undone") == [0, 5, 10, 10]
    assert [len(lines(runs, "undone", step)) for step in (0, 5, 10)] == [5, 5, 5]


def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(runs):
    runs.ended_with("no_file", EXIT_BAD_INPUT)
    said = runs.said("no_file").strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: eval.samples.prompts ")
    assert "no such file" in said[0]
