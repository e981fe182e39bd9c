"""The drift probe on real ranks: scores equal plain transformers, training is left alone, the budget stops the run.
Run: pytest tests/dist/test_probe.py (all runs of a stage at once; see run_worker)"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.checkpoint import list_checkpoints, step_of
from sft.config import ProbeSection
from sft.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED
from sft.probe_items import open_probe
from sft.tokenizer import load_tokenizer
from tests import tiny
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

STEPS = 5
"""Of the whole schedule; all runs but one stop before, because an export takes longer than they do."""
MAX_LENGTH = 512
TASKS = {"mmlu": "acc", "hellaswag": "acc_norm"}


def plain_scores(model_path: Path, data: Path, too_early: int = 0) -> np.ndarray:
    """float64 [items, 4]: one forward of transformers for each choice of each item; the last 512 tokens of it.

    `too_early`: how many positions before the right ones the scored tokens are looked up, a mistake.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    probe = asked(model_path, data)
    scores = np.zeros((len(probe.items), 4))
    tokenizer = load_tokenizer(model_path)
    for number, item in enumerate(probe.items):
        for choice, text in enumerate(item.choices):
            context = [*tokenizer.bos, *tokenizer.encode(item.context)]
            whole = [*tokenizer.bos, *tokenizer.encode(f"{item.context} {text}")]
            inputs = torch.tensor(whole[-(MAX_LENGTH + 1) :][:-1])
            targets = torch.tensor(whole[len(context) :])
            with torch.no_grad():
                log_probs = model(input_ids=inputs[None]).logits[0].log_softmax(-1).roll(too_early, 0)[-len(targets) :]
            scores[number, choice] = log_probs.gather(1, targets[:, None]).double().sum()
    return scores


def asked(model_path: Path, data: Path):
    probe = open_probe(ProbeSection(data=str(data)), load_tokenizer(model_path), MAX_LENGTH)
    assert probe is not None
    return probe


def per_char(items: list, scores: np.ndarray) -> np.ndarray:
    return scores / [[len(text) for text in item.choices] for item in items]


@pytest.fixture(scope="module")
def evals(tmp_path_factory, base_model):
    """Invented items whose right answers are those that the base model gives: it can only lose."""
    subjects = ("college_computer_science", "virology")  # long and short prompts
    data = tiny.make_evals(tmp_path_factory.mktemp("evals"), subjects, items=8)
    items, scores = asked(base_model, data).items, plain_scores(base_model, data)
    norm = per_char(items, scores)
    for number, item in enumerate(items):
        if item.task == "mmlu":
            path, field, gold = data / "cais" / "mmlu" / item.subject / "test.jsonl", "answer", scores[number].argmax()
        else:
            path, field, gold = data / "Rowan" / "hellaswag" / "validation.jsonl", "label", norm[number].argmax()
        rows = tiny.read_jsonl(path)
        rows[item.doc_id][field] = int(gold)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy, evals):
    folder = tmp_path_factory.mktemp("probe")
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategy,
        "train.max_steps": STEPS, "batch.rows_per_step": 4, "checkpoint.every": 2, "eval.probe.every": 2,
    }  # fmt: skip
    probe = {"eval.probe.data": evals}
    budget = {"eval.probe.max_drop": 0.1, "optim.lr": 0.1, **probe}

    def run(name, ranks=2, patches=None, **more):
        own = more.pop("options", {})
        return {"name": name, "ranks": ranks, "options": options | own, "patches": patches or {}, **more}

    first = [
        run("probed", options={**probe, "train.stop_after": 3}),
        run("unprobed", options={"train.stop_after": 3}),
        run("whole", options={**probe, "eval.probe.every": 4}),
        run("over", options=budget),
        run("no_data", ranks=1, options={"eval.probe.data": folder}),
    ]
    second = [
        run("lost", ranks=1, copy_of="probed", remove=["probe.json"], options={**probe, "train.stop_after": 4}),
        run("resumed", ranks=1, out="probed", options={**probe, "train.stop_after": 4}),
        run("over_again", ranks=1, out="over", options=budget),
    ]
    third = [run("raised", ranks=1, out="over", options={**budget, "eval.probe.max_drop": 1.0, "train.stop_after": 4})]
    return Runs(folder, [first, second, third])


def base_scores(runs, out):
    return np.array(json.loads((runs.folder / out / "probe.json").read_text())["scores"])


def probe_lines(runs, out):
    """What metrics.jsonl holds of the probe, by step."""
    lines = tiny.read_jsonl(runs.folder / out / "metrics.jsonl")
    found = {line["step"]: {key: line[key] for key in line if key.startswith("probe_")} for line in lines}
    return {step: values for step, values in found.items() if values}


def test_the_base_models_scores_equal_plain_transformers(runs, base_model, evals):
    expected = plain_scores(base_model, evals)
    assert expected.std() > 1, "the items tell choices apart"
    runs.ended_with("probed", 0)
    assert np.abs(base_scores(runs, "probed") - expected).max() < 1e-3
    assert np.abs(base_scores(runs, "probed") - plain_scores(base_model, evals, too_early=1)).max() > 1, "control"


def test_scores_on_one_rank_equal_those_on_two(runs):
    """The run that lost its baseline measures the base model again, on one rank."""
    runs.ended_with("lost", 0)
    assert "the base model in model.path is asked again" in runs.said("lost")
    assert np.array_equal(base_scores(runs, "lost"), base_scores(runs, "probed"))
    assert [event["step"] for event in runs.events("lost", "probe")] == [0, 2, 0, 4]


def test_some_items_are_cut_and_letters_share_their_context(base_model, evals):
    probe = asked(base_model, evals)
    lengths = {len(document.ids) for document in probe.documents}
    assert max(lengths) == MAX_LENGTH
    assert min(lengths) < MAX_LENGTH
    assert len(probe.documents) == 16 + 4 * 8


def test_figures_after_a_step_are_those_of_the_exported_model(runs, base_model, evals):
    items, base = asked(base_model, evals).items, plain_scores(base_model, evals)
    runs.ended_with("whole", 0)
    tuned = plain_scores(runs.folder / "whole" / "export", evals)
    values = probe_lines(runs, "whole")[STEPS]
    gold = np.array([item.gold for item in items])
    for task, rows in {"mmlu": slice(0, 16), "hellaswag": slice(16, 24)}.items():
        scores = per_char(items, tuned) if task == "hellaswag" else tuned
        accuracy = (scores[rows].argmax(1) == gold[rows]).mean()
        assert values[f"probe_{task}_{TASKS[task]}"] == accuracy
        assert values[f"probe_{task}_delta"] == pytest.approx(accuracy - 1)
        shift = np.mean([softmax(tuned[i])[gold[i]] - softmax(base[i])[gold[i]] for i in range(24)[rows]])
        assert values[f"probe_{task}_p_gold_delta"] == pytest.approx(shift, abs=1e-4)
    assert abs(values["probe_mmlu_p_gold_delta"]) > 1e-3, "training moved the model"


def softmax(scores):
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def test_probes_come_when_they_are_due_and_at_the_last_step_with_an_event_each(runs):
    assert list(probe_lines(runs, "whole")) == [4, 5]
    events = runs.events("whole", "probe")
    assert [event["step"] for event in events] == [0, 4, 5]
    assert [task["base"] for task in events[0]["tasks"].values()] == [1, 1]
    for event in events:
        for task in event["tasks"].values():
            low, high = task["interval"]
            assert low <= task["delta"] <= task["at_most"] <= high
            assert task["delta"] == task["value"] - task["base"]


def test_a_probe_changes_nothing_in_training(runs):
    runs.ended_with("unprobed", 0)
    assert not (runs.folder / "unprobed" / "probe.json").exists()
    assert not probe_lines(runs, "unprobed")
    for key in ("loss", "grad_norm", "lr"):
        assert runs.column("probed", key)[:3] == runs.column("unprobed", key), key
    probed, unprobed = (runs.saved(out, 3) for out in ("probed", "unprobed"))
    assert all(torch.equal(probed[key], unprobed[key]) for key in unprobed)


def test_a_resume_compares_with_the_same_base_model(runs):
    runs.ended_with("resumed", 0)
    assert [event["step"] for event in runs.events("probed", "probe")] == [0, 2, 4], "asked of the base model once"
    for out in ("probed", "lost"):
        assert probe_lines(runs, out)[4] == pytest.approx(probe_lines(runs, "whole")[4], abs=1e-4), out


def test_the_budget_stops_the_run_saved_and_can_be_raised(runs):
    runs.ended_with("over", EXIT_GATE_FAILED)
    runs.ended_with("over_again", EXIT_GATE_FAILED)
    for name in ("over", "over_again"):
        assert "Traceback" not in runs.said(name)
        (line,) = [line for line in runs.said(name).splitlines() if line.startswith("gate failed")]
        assert "probe after step 2: " in line
        assert "hellaswag acc_norm 1.000 -> " in line
        assert "above eval.probe.max_drop 0.1" in line
        assert line.endswith("replay data)")
    reasons = [event["reason"] for event in runs.events("over", "gate_failed")]
    assert len(reasons) == 2
    assert reasons[0] == reasons[1]
    runs.ended_with("raised", 0)
    assert [event["step"] for event in runs.events("over", "resume")] == [2, 2]
    assert runs.column("over", "step") == [1, 2, 3, 4]
    assert [step_of(saved) for saved in list_checkpoints(runs.folder / "over" / "checkpoints")] == [2, 4]
    assert all(drop["probe_hellaswag_delta"] < -0.1 for drop in probe_lines(runs, "over").values())


def test_data_that_are_not_there_are_told_before_the_model_is_loaded(runs):
    runs.ended_with("no_data", EXIT_BAD_INPUT)
    said = runs.said("no_data").strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: eval.probe: ")
