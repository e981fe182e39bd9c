"""What lm_eval asked and answered on invented text, against ours. Run: pytest tests/unit/test_eval_golden.py"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.errors import UserError
from sft.eval.options import ScoreOptions
from sft.eval.run import load_items, score_model
from tests.golden import evaluation, regenerate
from tests.parity.world import make_world

JOBS = {job.name: job for job in evaluation.JOBS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), evaluation.JOBS)


@pytest.fixture(scope="module")
def golden():
    return evaluation.read()["jobs"]


def options_of(world, job, out):
    return ScoreOptions(**job.options(), data=str(world / job.hub), dtype="fp32", tokens_per_batch=700, out=str(out))


def ask(world, job):
    items = load_items(options_of(world, job, "unused")).items[job.task]
    return evaluation.asked(world, job, items)


def answer(world, job, out):
    return evaluation.answered(score_model(str(world / job.model), options_of(world, job, out)).records[job.task])


@pytest.mark.parametrize("name", JOBS)
def test_requests_are_lm_evals_token_by_token(world, golden, name):
    assert evaluation.differences(ask(world, JOBS[name]), golden[name]) == []


@pytest.mark.parametrize("name", JOBS)
def test_scores_and_choices_are_lm_evals(world, golden, name, tmp_path):
    assert evaluation.differences(answer(world, JOBS[name], tmp_path / "out"), golden[name]) == []


def test_the_file_holds_every_oddity(golden):
    texts = [sample for samples in golden.values() for sample in samples.values()]
    assert len(texts) > 90
    assert any(len(set(sample["lls"])) < 4 for sample in texts)  # equal endings
    assert {sample["pred"] for sample in texts} == {0, 1, 2, 3}  # no letter wins always
    assert {sample["acc"] for sample in texts} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mmlu-5-short", {"shots": 4}),
        ("hellaswag-10-bytes", {"shots": 9}),
        ("mmlu-2-turns-system", {"chat": "single_turn"}),
        ("mmlu-2-turn", {"system_instruction": None}),
        ("mmlu-5-old", {"compat": "lm_eval>=0.4.9.2"}),
        ("hellaswag-10-short", {"world": 2}),
    ],
)
def test_control_other_requests_are_noticed(world, golden, name, changes):
    found = evaluation.differences(ask(world, replace(JOBS[name], **changes)), golden[name])
    noticed = {line.partition(":")[0] for line in found}
    assert len(noticed) >= len(golden[name]) - ("world" in changes)


def test_control_other_weights_are_noticed(world, golden, tmp_path):
    job = JOBS["hellaswag-0"]
    model = tmp_path / "model"
    model.mkdir()
    for file in (world / job.model).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] * 1.002
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert torch.isfinite(weights[name]).all()
    ours = evaluation.answered(score_model(str(model), options_of(world, job, tmp_path / "out")).records["hellaswag"])
    assert any("lls is" in line for line in evaluation.differences(ours, golden["hellaswag-0"]))


def test_control_each_field_is_compared(golden):
    samples = golden["hellaswag-0"]
    assert evaluation.differences(samples, samples) == []
    key = next(iter(samples))
    changes = {
        "prompt_sha256": "0",
        "ctx_sha256": "0",
        "cont_ids": [[1], [2], [3], [4]],
        "lls": [samples[key]["lls"][0] + 2e-3, *samples[key]["lls"][1:]],
        "pred": 9,
        "acc": 0.5,
        "acc_norm": 0.5,
    }
    assert changes.keys() == samples[key].keys()
    for field, value in changes.items():
        [line] = evaluation.differences({**samples, key: {**samples[key], field: value}}, samples)
        assert line.startswith(f"{key}: {field} is ")
    missing = {other: sample for other, sample in samples.items() if other != key}
    assert len(evaluation.differences(missing, samples)) == 1


def test_recording_says_what_changed(golden, tmp_path):
    file = tmp_path / "evaluation.json"
    recorded = evaluation.read()
    assert regenerate.write_evaluation(recorded, file) == "evaluation.json: first recording"
    assert file.read_bytes() == evaluation.FILE.read_bytes()
    assert regenerate.write_evaluation(recorded, file) == "evaluation.json: 0 documents differ"
    sample = next(iter(recorded["jobs"]["hellaswag-0"].values()))
    sample["pred"] = 9
    assert regenerate.write_evaluation(recorded, file) == "evaluation.json: 1 documents differ"


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="weights: no golden file; there are trajectory and evaluation"):
        regenerate.main(["weights"])
