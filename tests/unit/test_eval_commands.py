"""`sft eval` and `sft drift`: files, fallback, gate. Run: pytest tests/unit/test_eval_commands.py"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from sft.errors import run_command
from sft.eval import drift, evaluate, forward
from sft.eval.options import DriftConfig
from sft.eval.results import Record
from sft.eval.run import load_items
from sft.settings import load
from tests import tiny
from tests.eval_flags import drift_flags, eval_flags, read, refused, report_of


def test_eval_writes_records_and_results(world, tmp_path, capsys):
    evaluate.main(eval_flags(world, tmp_path / "out", "--shots.hellaswag", "3"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "items-hellaswag.jsonl",
        "items-mmlu.jsonl",
        "results.json",
    ]
    records = read(tmp_path / "out" / "items-mmlu.jsonl")
    assert list(records[0]) == [field.name for field in fields(Record)]
    assert [(record["subject"], record["doc_id"]) for record in records] == [
        *(("anatomy", number) for number in range(7)),
        *(("island_trade", number) for number in range(13)),
    ]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["mmlu"]["acc"] == sum(record["correct"] for record in records) / 20
    assert set(results["tasks"]["mmlu"]["categories"]) == {"stem"}  # the invented subject belongs to none
    hellaswag = read(tmp_path / "out" / "items-hellaswag.jsonl")
    assert results["tasks"]["hellaswag"]["acc_norm"] == sum(record["correct_norm"] for record in hellaswag) / 30
    assert results["tasks"]["hellaswag"]["shots"] == 3
    header = results["header"]
    assert (header["dtype"], header["max_length"], header["bos"]) == ("float32", 2048, [1])
    assert (header["engine"], header["fallback"]) == ("packed", None)
    assert (header["placement"], header["ranks"]) == ("replicas", 1)
    assert header["data"] == str(world / "data")
    assert results["tasks"]["mmlu"]["source"].startswith(f"MMLU from {world}/data/cais/mmlu (jsonl): 2 subjects")
    assert "20 test rows" in results["tasks"]["mmlu"]["source"]
    assert "30 validation rows" in results["tasks"]["hellaswag"]["source"]
    assert "30 train rows" in results["tasks"]["hellaswag"]["source"]
    assert len(header["weights_sha256"]) == len(header["tokenizer_sha256"]) == 64
    printed = capsys.readouterr().out
    assert "MMLU from" in printed
    assert "items are longer" not in printed
    assert "results.json" in printed
    assert "engine probe: packed against plain" in printed
    assert "cannot be shown" not in printed  # all items: their power is in the report


def test_eval_is_repeatable_and_limit_takes_the_first_items(world, tmp_path):
    for out, more in (("a", []), ("b", ["--tokens_per_batch", "16384"]), ("c", ["--limit", "4"])):
        evaluate.main(eval_flags(world, tmp_path / out, *more))
    for task in ("mmlu", "hellaswag"):
        a, b, c = ((tmp_path / out / f"items-{task}.jsonl").read_text() for out in "abc")
        assert a == b
        kept = [record for record in read(tmp_path / "a" / f"items-{task}.jsonl") if record["doc_id"] < 4]
        assert [record["prompt_sha256"] for record in kept] == [
            json.loads(line)["prompt_sha256"] for line in c.splitlines()
        ]


def test_limit_tells_the_power_that_is_left(world, tmp_path, capsys):
    evaluate.main(eval_flags(world, tmp_path, "--limit", "2", "--tasks", "mmlu"))
    printed = capsys.readouterr().out
    assert "mmlu: with 4 items a drop below" in printed
    assert "cannot be shown" in printed


def forget_branches(monkeypatch):
    """Branches of a tree see their neighbours."""
    right = forward._ancestors
    monkeypatch.setattr(forward, "_ancestors", lambda end, *more: right(torch.full_like(end, end.shape[1]), *more))


@pytest.mark.parametrize("fault", ["mask", "rope"])
def test_where_packing_is_wrong_plain_rows_are_used_and_it_is_told(world, tmp_path, capsys, monkeypatch, fault):
    model = "base"
    if fault == "mask":
        forget_branches(monkeypatch)
        reason = "scores differ by"
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        tiny.make_model(world / "rope", max_position_embeddings=2048, rope_parameters=rope)
        model, reason = "rope", "its rotary frequencies (dynamic) depend on the length of a row"
    flags = [eval_flags(world, tmp_path / name, "--limit", "3", model=model) for name in ("packed", "plain")]
    evaluate.main(flags[0])
    printed = capsys.readouterr().out
    assert f"WARNING: {world / model}: {reason}" in printed
    assert "engine plain is used" in printed
    evaluate.main([*flags[1], "--engine", "plain"])
    assert "WARNING" not in capsys.readouterr().out
    for task in ("mmlu", "hellaswag"):
        packed, plain = ((tmp_path / name / f"items-{task}.jsonl").read_text() for name in ("packed", "plain"))
        assert packed == plain
    headers = [json.loads((tmp_path / name / "results.json").read_text())["header"] for name in ("packed", "plain")]
    assert [header["engine"] for header in headers] == ["plain", "plain"]
    assert reason in headers[0]["fallback"]
    assert headers[1]["fallback"] is None
    evaluate.main(flags[0])  # what was asked for is what counts: not computed again
    assert "nothing is computed again" in capsys.readouterr().out


def test_drift_counts_what_the_records_say(world, reported):
    out, _ = reported
    report = report_of(out)
    for task, metric, field in (("mmlu", "acc", "correct"), ("hellaswag", "acc_norm", "correct_norm")):
        base, tuned = (read(out / side / f"items-{task}.jsonl") for side in ("base", "tuned"))
        lost = sum(before[field] and not after[field] for before, after in zip(base, tuned, strict=True))
        won = sum(after[field] and not before[field] for before, after in zip(base, tuned, strict=True))
        row = report["tasks"][task]
        assert (row["metric"], row["n"]) == (metric, len(base))
        assert (row["right_to_wrong"], row["wrong_to_right"]) == (lost, won)
        assert row["delta"] == pytest.approx((won - lost) / len(base))
        assert row["interval"][0] <= row["delta"] <= row["interval"][1]
        assert lost + won > 0  # two random models do disagree
        assert (row["noise"]["items"], row["noise"]["flips"]) == (4, 0)
        assert row["noise"]["max_abs_ll"] < 1e-4
        assert row["examples"]
    assert (report["gate"]["max_drop"], report["gate"]["passed"], report["gate"]["failed"]) == (None, None, [])
    assert [model["name"] for model in report["models"]] == ["base", "tuned", "other"]
    assert len({model["heldout_loss"] for model in report["models"]}) == 3
    assert [answer["prompt"] for answer in report["answers"]] == ["Say item 3", "Name a river"]
    assert {path.name for path in out.iterdir()} >= {"base", "tuned", "tuned-2", "drift.md", "drift.html", "drift.json"}
    assert any(path.suffix == ".png" for path in out.iterdir())
    markdown = (out / "drift.md").read_text()
    assert all(words in markdown for words in ("anatomy", "stem", f"MMLU from {world}/data", "inconclusive"))


def test_another_gate_loads_no_model_and_another_model_only_itself(world, reported, loaded, tmp_path, capsys):
    out, flags = shutil.copytree(reported[0], tmp_path / "out"), list(reported[1])
    flags[flags.index("--out") + 1] = str(out)
    assert run_command(drift.main, [*flags, "--gate.max_drop", "0.001"]) == 3
    assert loaded == []
    said = capsys.readouterr().err
    assert "gate failed: mmlu acc" in said
    assert "hellaswag acc_norm" in said
    assert report_of(out)["gate"]["passed"] is False
    flags[flags.index("--tuned") + 1] = str(world / "tuned")
    flags[flags.index("--noise_items") + 1] = "5"  # the base alone is asked again, and scores nothing
    drift.main(flags)
    assert loaded == ["base"]
    assert report_of(out)["tasks"]["mmlu"]["noise"]["items"] == 5
    assert [model["name"] for model in report_of(out)["models"]] == ["base", "tuned"]


def test_results_of_sft_eval_stand_for_a_model(world, reported, loaded, tmp_path, capsys):
    out, flags = reported[0], drift_flags(world, tmp_path)
    for side in ("base", "tuned"):
        flags[flags.index(f"--{side}") + 1] = str(out / side)
    drift.main(flags)
    assert loaded == []
    printed = " ".join(capsys.readouterr().out.split())
    assert "mmlu: with 16 items a drop below" in printed  # what --limit leaves
    assert "hellaswag: with 9 items a drop below" in printed
    before, after = report_of(out), report_of(tmp_path)
    for task in before["tasks"]:
        assert after["tasks"][task]["metrics"] == before["tasks"][task]["metrics"]
        assert after["tasks"][task]["examples"] == []  # no texts are at hand
    flags = drift_flags(world, tmp_path / "half")
    flags[flags.index("--base") + 1] = str(out / "base")
    drift.main(flags)
    assert loaded == ["tuned"]
    assert report_of(tmp_path / "half")["tasks"]["mmlu"]["metrics"] == before["tasks"]["mmlu"]["metrics"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--limit", "8"], "does not"),
        (["--dtype", "bf16"], "dtype: "),
        (["--shots.mmlu", "3"], "5 and 3 solved examples"),
        (["--compat", "<=0.4.9.1"], "compat: "),
        (["--engine", "plain"], "engine: "),
    ],
)
def test_results_of_other_settings_are_refused_before_a_model_is_loaded(
    world, reported, loaded, tmp_path, capsys, flags, words
):
    given = drift_flags(world, tmp_path)
    given[given.index("--base") + 1] = str(reported[0] / "base")
    refused(drift.main, [*given, *flags], capsys, words)
    assert loaded == []


def test_a_prompt_that_one_side_cannot_answer_is_refused_before_a_model_is_loaded(world, loaded, tmp_path, capsys):
    """The last side: the first one's scores would have taken hours by then."""
    talks = shutil.copytree(world / "base", tmp_path / "talks")
    (talks / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    flags = [*drift_flags(world, tmp_path / "out"), "--answers.prompts", "default"]
    flags[flags.index("--base") + 1] = str(talks)
    refused(drift.main, [*flags, "--answers.max_new_tokens", "2000"], capsys, "prompt 1 has", "2000")
    refused(drift.main, [*flags, "--answers.template", "chat"], capsys, f"{world / 'tuned'} has no chat template")
    assert loaded == []


def test_scores_are_those_of_a_config_too(world, tmp_path, capsys):
    """The same tensors turn by another rope_theta."""
    model = shutil.copytree(world / "base", tmp_path / "turned")
    flags = [*eval_flags(world, tmp_path / "out", "--limit", "2"), "--model", str(model)]
    evaluate.main(flags)
    config = json.loads((model / "config.json").read_text())
    rope = dict(config["rope_parameters"], rope_theta=500.0)
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    refused(evaluate.main, flags, capsys, "holds results with other settings: weights_sha256 was")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_neither_a_reader_that_leaves_nor_its_encoding_costs_the_gate(world, reported, tmp_path, encoding):
    flags = drift_flags(world, tmp_path / "out", "--gate.max_drop", "0.0001")
    for side in ("base", "tuned"):
        flags[flags.index(f"--{side}") + 1] = str(reported[0] / side)
    command = [sys.executable, "-m", "sft.eval.drift", *flags]
    environment = tiny.rank_environment() | {"PYTHONIOENCODING": encoding}
    if encoding == "ascii":
        done = tiny.run(command, environment=environment)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
    assert done.returncode == 3
    assert done.stderr.startswith("gate failed: ")
    assert (tmp_path / "out" / "drift.json").is_file()


def test_items_that_lose_their_beginning_are_counted_and_told(world, tmp_path, capsys):
    options = load(DriftConfig, drift_flags(world, tmp_path), prog="sft drift")
    lengths = [1 + len(f"{item.context} A") for item in load_items(options).items["mmlu"]]  # BOS, a token per byte
    room = sorted(lengths)[8] - 2  # the last token is predicted, not read
    cut = sum(length > room + 1 for length in lengths)
    assert 0 < cut < 16
    short = tiny.make_model(world / "cut", max_position_embeddings=room)
    evaluate.main(eval_flags(world, tmp_path, "--limit", "9", model=short.name))
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert tasks["mmlu"]["truncated_items"] == cut
    assert tasks["hellaswag"]["truncated_items"] == 0
    printed = capsys.readouterr().out
    assert f"mmlu: {cut} of 16 items are longer than the model's {room} tokens and lose their beginning" in printed
    assert "hellaswag: 9 of" not in printed


def test_a_model_against_itself_is_identical_and_passes_the_gate(world, tmp_path, monkeypatch):
    """With plain rows, for the noise floor must be measured with the engine that was used."""
    forget_branches(monkeypatch)
    more = ["--limit", "4", "--gate.max_drop", "0.2", "--gate.confidence", "0.6"]
    drift.main(drift_flags(world, tmp_path, *more, tuned="base"))
    report = report_of(tmp_path)
    assert report["base"]["engine"] == "plain"
    for row in report["tasks"].values():
        assert (row["delta"], row["right_to_wrong"], row["wrong_to_right"], row["mcnemar_p"]) == (0, 0, 0, 1)
        assert row["verdict"] == "identical"
        assert row["noise"]["max_abs_ll"] < 1e-4
    assert report["gate"]["passed"] is True
