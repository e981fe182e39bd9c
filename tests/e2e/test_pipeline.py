"""The whole path through the command line: prep, train, resume, export, drift.

Run: pytest tests/e2e/test_pipeline.py
"""

import json
import shutil
import sys

import pytest
import yaml

from tests import tiny
from tests.dist import forked

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.timeout(600)]


def sft(*arguments, expect=0):
    return checked(tiny.run([sys.executable, "-m", "sft.cli", *map(str, arguments)]), expect)


def sft_again(*arguments, expect=0):
    """For a command that has run as above once: without its seconds of imports."""
    return checked(forked.run("sft.cli", *map(str, arguments)), expect)


def checked(done, expect):
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory, base_model):
    """A folder in which every command of the pipeline has run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.make_alpaca(folder / "alpaca.json", rows=40)
    tiny.make_evals(folder / "evals")
    strategy = tiny.make_strategy(folder / "zero3.json")
    sft("prep", "--sources", folder / "alpaca.json", "--tokenizer", base_model, "--seq_len", 512, "--heldout", 5,
        "--out", folder / "data")  # fmt: skip
    run_file = {
        "model": {"path": str(base_model), "precision": "fp32"},
        "data": {"train": str(folder / "data" / "train"), "heldout": str(folder / "data" / "heldout")},
        "batch": {"rows_per_step": 4, "micro_batch": 1},
        "train": {"max_steps": 6},
        "optim": {"lr": 0.003},
        "deepspeed": str(strategy),
        "checkpoint": {"every": 100},
        "track": {"wandb": "off"},
        "out": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file))
    first = sft("train", "--config", folder / "run.yaml", "--ranks", 2, "--train.stop_after", 4)
    assert "stopped after step 4 of 6" in first.stdout
    assert not (folder / "run" / "export").exists()
    second = sft("train", "--config", folder / "run.yaml", "--ranks", 2)
    assert "resumed from" in second.stdout
    (folder / "weightless").mkdir()
    shutil.copy(base_model / "config.json", folder / "weightless")
    tiny.make_strategy(folder / "stage0.json", stage=0)
    sft("export", folder / "run", "--out", folder / "bf16", "--dtype", "bf16")
    sft("drift", "--base", base_model, "--tuned", folder / "run" / "export", "--data", folder / "evals",
        "--out", folder / "drift", "--dtype", "fp32")  # fmt: skip
    return folder


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_prep_wrote_exactly_these_files(work):
    split = ["data-00000-of-00001.arrow", "dataset_info.json", "manifest.json", "state.json"]
    expected = [f"{name}/{file}" for name in ("heldout", "train") for file in split]
    assert files_below(work / "data") == sorted([*expected, "report.json"])


def test_training_wrote_exactly_these_files(work):
    state = ["COMPLETE", "meta.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    checkpoints = [f"checkpoints/step-{step:08d}/{file}" for step in (4, 6) for file in state]
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    model = ["config.json", "export.json", "generation_config.json", "model.safetensors", *tokenizer]
    export = [f"export/{file}" for file in model]
    files = ["config.yaml", "events.jsonl", "lock", "metrics.jsonl"]
    assert files_below(work / "run") == sorted([*checkpoints, *export, *files])
    assert files_below(work / "bf16") == sorted(model)


def test_drift_wrote_exactly_these_files(work):
    each = ["extras.json", "items-hellaswag.jsonl", "items-mmlu.jsonl", "results.json"]
    expected = [f"{side}/{file}" for side in ("base", "tuned") for file in each]
    plots = ["margins-hellaswag.png", "margins-mmlu.png", "subjects.png"]
    assert files_below(work / "drift") == sorted([*expected, *plots, "drift.html", "drift.json", "drift.md"])
    report = json.loads((work / "drift" / "drift.json").read_text())
    assert report["tasks"]["mmlu"]["n"] == 8
    assert report["tasks"]["hellaswag"]["n"] == 4


def test_metrics_have_every_step_once_and_all_keys(work):
    lines = tiny.read_jsonl(work / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    promised = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "label_tokens", "tokens_per_s", "mfu",
                "step_time_s", "peak_mem_gib"}  # fmt: skip
    assert all(promised <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_resolved_config_is_saved_and_runs(work):
    saved = yaml.safe_load((work / "run" / "config.yaml").read_text())
    assert saved["schedule"]["warmup"] == 0.03
    again = sft_again("train", "--config", work / "run" / "config.yaml", "--ranks", 1)
    assert "finished" in again.stdout


def test_a_gate_that_fails_exits_with_3_after_the_report(work, base_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = -weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    options = ["--data", work / "evals", "--out", tmp_path / "out", "--dtype", "fp32", "--gate.max_drop", "0"]
    pairs = [(base_model, broken), (broken, base_model)]  # one direction must lose something
    codes = []
    for base, tuned in pairs:
        done = forked.run("sft.cli", "drift", "--base", str(base), "--tuned", str(tuned), *map(str, options))
        codes.append(done.returncode)
        assert (tmp_path / "out" / "drift.json").is_file()
    assert 3 in codes


BAD = {
    "missing model": (["--model.path", "{work}/none"], "no such folder"),
    "no model folder": (["--model.path", "{work}/evals"], "config.json"),
    "model without weights": (["--model.path", "{work}/weightless"], "no *.safetensors"),
    "stage that cannot be saved": (["--deepspeed", "{work}/stage0.json"], "stage must be 1, 2 or 3"),
    "missing shards": (["--data.train", "{work}/none"], "no such folder"),
    "folder above the shards": (["--data.train", "{work}/data"], "did you mean its train/"),
    "ranks that do not divide": (["--batch.rows_per_step", "3"], "no multiple of 2 ranks"),
    "a typo": (["--optim.learning_rate", "1"], "did you mean"),
    "a missing strategy": (["--deepspeed", "zero4"], "shipped: zero1"),
    "an out folder that is no run": (["--out", "{work}/data"], "is no run folder"),
    "a kernel that cannot run here": (["--model.attention", "varlen", "--out", "{work}/varlen"], "cannot run on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(work, name):
    flags, expected = BAD[name]
    before = files_below(work)
    flags = [flag.format(work=work) for flag in flags]
    done = sft_again("train", "--config", work / "run.yaml", "--ranks", 2, *flags, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert expected in errors[0]
    assert files_below(work) == before


def test_shards_of_another_tokenizer_are_refused(work, base_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base_model, other)
    description = json.loads((other / "tokenizer.json").read_text())
    vocab = description["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(description))
    done = sft("train", "--config", work / "run.yaml", "--ranks", 2, "--model.path", other, expect=2)
    assert "another tokenizer" in done.stderr


def test_an_unknown_command_names_the_nearest():
    assert "did you mean 'sft train'" in sft("trian", expect=2).stderr
