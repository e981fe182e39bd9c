"""What `sft eval` and `sft drift` refuse, in one line. Run: pytest tests/unit/test_eval_refusals.py"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft.errors import UserError
from sft.eval import drift, evaluate, run, weights
from sft.eval.ranks import Ranks
from tests import tiny
from tests.eval_flags import drift_flags, eval_flags, refused, report_of

ALONE, ALONE_DTYPE = Ranks(0, 1, torch.device("cpu")), torch.float32


def test_a_failed_start_leaves_earlier_results_alone(world, reported, tmp_path, capsys):
    out, flags = shutil.copytree(reported[0], tmp_path / "out"), list(reported[1])
    flags[flags.index("--out") + 1] = str(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(drift.main, drift_flags(world, out, tuned="absent"), capsys, "absent: no such folder")
    refused(drift.main, [*flags, "--limit", "3"], capsys, "holds results with other settings: limit was 9, is 3")
    refused(evaluate.main, eval_flags(world, out / "base", model="tuned"), capsys, "other settings: ")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_report_on_other_models_is_not_written_over(reported, tmp_path, capsys):
    sides = [str(reported[0] / side) for side in ("base", "tuned")]
    for order in (sides, sides):  # the same report again is no mistake
        drift.main(["--base", order[0], "--tuned", order[1], "--out", str(tmp_path)])
    before = (tmp_path / "drift.json").read_bytes()
    swapped = ["--base", sides[1], "--tuned", sides[0], "--out", str(tmp_path)]
    refused(drift.main, swapped, capsys, "drift.json: a report on", "choose another --out")
    assert (tmp_path / "drift.json").read_bytes() == before
    drift.main([*swapped[:-1], str(tmp_path / "other"), "--limit", "3"])
    assert "NOTE: both sides were scored before: --limit changes nothing" in capsys.readouterr().out


def test_scores_are_written_where_nobody_reads_what_is_printed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    evaluate.main(eval_flags(world, tmp_path, "--limit", "2", "--tasks", "mmlu"))
    assert (tmp_path / "results.json").is_file()


def test_a_folder_that_takes_no_files_is_found_before_the_scoring(world, capsys):
    taken = Path("/proc/self/net")
    if not taken.is_dir():
        pytest.skip("no /proc: no folder that refuses files even to root")
    refused(evaluate.main, eval_flags(world, taken, model="absent"), capsys, "cannot be written")


def test_a_rank_that_is_no_number_is_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    refused(evaluate.main, eval_flags(world, tmp_path), capsys, "RANK is 'x'")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(evaluate.main, eval_flags(world, tmp_path), capsys, "RANK is '2', WORLD_SIZE is '2'")
    monkeypatch.setenv("RANK", "0")
    refused(evaluate.main, eval_flags(world, tmp_path), capsys, "WORLD_SIZE is 2, but MASTER_ADDR is not set")


def test_models_that_would_be_asked_different_things_are_refused(world, tmp_path):
    short = tiny.make_model(world / "short", max_position_embeddings=300)
    with pytest.raises(UserError, match=r"max_position_embeddings: .*/base has 2048, .*/short has 300"):
        drift.main(drift_flags(world, tmp_path, tuned=short.name))
    lost_bos = shutil.copytree(world / "base", world / "lost_bos", dirs_exist_ok=True)
    state = json.loads((lost_bos / "tokenizer.json").read_text()) | {"post_processor": None}
    (lost_bos / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(
        UserError, match=r"give different ids, first at anatomy item 0 \(from token 0 on: \[1, .*BOS lost"
    ):
        drift.main(drift_flags(world, tmp_path, tuned="lost_bos"))
    assert not (tmp_path / "drift.json").exists()


def test_other_tokenizer_files_with_equal_ids_are_accepted(world, tmp_path):
    resaved = shutil.copytree(world / "base", world / "resaved", dirs_exist_ok=True)
    state = json.loads((resaved / "tokenizer.json").read_text())
    (resaved / "tokenizer.json").write_text(json.dumps(state, indent=4))
    drift.main(drift_flags(world, tmp_path, "--limit", "2", "--tasks", "mmlu", tuned="resaved"))
    report = report_of(tmp_path)
    assert report["base"]["tokenizer_sha256"] != report["tuned"]["tokenizer_sha256"]


def test_user_mistakes_are_one_line_and_code_2(world, tmp_path, capsys):
    (tmp_path / "no_tokenizer").mkdir()
    shutil.copy(world / "base" / "config.json", tmp_path / "no_tokenizer")
    headless = shutil.copytree(world / "base", tmp_path / "headless")
    strip(headless, "lm_head.weight")
    broken = shutil.copytree(world / "base", tmp_path / "broken")
    strip(broken, None)
    wide = shutil.copytree(world / "base", tmp_path / "wide")
    tiny.make_tokenizer(wide, merges=[("t", "h"), ("i", "s")])
    file = tmp_path / "a_file"
    file.write_text("")
    mistakes = [
        (eval_flags(world, tmp_path / "o", model="absent"), "absent: no such folder"),
        (eval_flags(world, tmp_path / "o", model=tmp_path / "no_tokenizer"), "holds no tokenizer.json"),
        (eval_flags(world, tmp_path / "o", model=headless), "lack 1 tensors of the architecture, first lm_head.weight"),
        (eval_flags(world, tmp_path / "o1", model=broken), "scores are not finite; the weights hold NaN"),
        (eval_flags(world, tmp_path / "o2", model=wide), "the tokenizer gives id 260, the model has 259 embeddings"),
        (eval_flags(world, file), "a_file: cannot be written: File exists"),
        (eval_flags(world, tmp_path / "o", "--tasks", "mmlu,arc"), "arc"),
        (eval_flags(world, tmp_path / "o", "--data", str(tmp_path)), str(tmp_path)),
        (eval_flags(world, tmp_path / "o", "--shots.mmlu", "6"), "shots.mmlu"),
        (eval_flags(world, tmp_path / "o", "--batch_size", "4"), "batch_size 4: only engine plain has rows"),
        (
            eval_flags(world, tmp_path / "o", "--shots.hellaswag", "30"),
            "--shots.hellaswag 30, but the train split has 30",
        ),
    ]
    for flags, message in mistakes:
        refused(evaluate.main, flags, capsys, message)
    assert not list(tmp_path.rglob("results.json"))
    refused(drift.main, drift_flags(world, tmp_path / "d", tuned="tuned,tuned/"), capsys, "tuned is given twice")
    refused(drift.main, drift_flags(world, world / "base"), capsys, "holds a config.json, so it is no report's folder")
    flags = drift_flags(world, tmp_path / "d", "--gate.max_drop", "1")
    refused(drift.main, flags, capsys, "--gate.max_drop: got 1", "a fraction from 0 to 0.5: 0.01 is one point")
    refused(evaluate.main, [*eval_flags(world, tmp_path / "o"), "--model", ""], capsys, "--model: is empty")
    refused(drift.main, [*drift_flags(world, tmp_path / "d"), "--tuned", ""], capsys, "--tuned: is empty")
    without = drift_flags(world, tmp_path / "d")
    at = without.index("--data")
    refused(drift.main, without[:at] + without[at + 2 :], capsys, "--data is missing")


def strip(folder, name):
    """Take a tensor out of the weights; without a name make one NaN."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if name is None:
        tensors["model.norm.weight"][0] = float("nan")
    else:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "cannot be used"),
        ('{"model_type": "llama", ', "cannot be used: .*not a valid JSON file"),
        ({"hidden_size": "x"}, "cannot be used: .*'hidden_size'"),
        ({"num_attention_heads": 0}, "cannot be used"),
        ({"dtype": "float99"}, "cannot be used: .*float99"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5; need at least 1 token"),
    ],
)
def test_a_bad_config_is_one_line_and_not_the_tokenizers_fault(world, tmp_path, content, message):
    copy = shutil.copytree(world / "base", tmp_path / "copy")
    whole = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(UserError, match=f"^model .*copy/config.json: {message}") as caught:
        evaluate.main(eval_flags(world, tmp_path / "out", model=copy))
    assert "\n" not in str(caught.value)


def test_a_model_path_that_no_file_system_takes_is_one_line():
    with pytest.raises(UserError, match="cannot be used: .*too long"):
        weights.read_config("a" * 300)


def test_weights_that_cannot_be_used(world, tmp_path):
    def read_weights(folder):
        with run.weights.open_model(str(folder), ALONE_DTYPE, "replicas", ALONE):
            pass

    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError, match=r"model .*/bare: holds no config.json"):
        read_weights(bare)
    shutil.copy(world / "base" / "config.json", bare)
    with pytest.raises(UserError, match=r"model .*/bare: holds no \*.safetensors weights"):
        read_weights(bare)
    (bare / "model.safetensors").write_bytes((world / "base" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model .*/bare: cannot be loaded"):
        read_weights(bare)


def test_max_length_is_the_configs_then_the_tokenizers(world, tmp_path):
    class Limit:
        hf = SimpleNamespace(model_max_length=int(1e30))

    assert weights.read_max_length(weights.read_config(str(world / "base")), Limit()) == 2048
    other = shutil.copytree(world / "base", tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "mamba"}
    del config["max_position_embeddings"], config["architectures"]
    (other / "config.json").write_text(json.dumps(config))
    assert weights.read_max_length(weights.read_config(str(other)), Limit()) == 2048
    Limit.hf.model_max_length = 77
    assert weights.read_max_length(weights.read_config(str(other)), Limit()) == 77
