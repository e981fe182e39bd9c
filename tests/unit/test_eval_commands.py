"""`sft eval` and `sft drift`: files, fallback, gate, refusals. Run: pytest tests/unit/test_eval_commands.py"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft.errors import UserError, run_command
from sft.eval import drift, evaluate, examine, forward, run, weights
from sft.eval.options import DriftConfig
from sft.eval.ranks import Ranks
from sft.eval.results import Record
from sft.eval.run import load_items
from sft.settings import load
from tests import tiny

ALONE, ALONE_DTYPE = Ranks(0, 1, torch.device("cpu")), torch.float32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data in the hub's layout, and two models."""
    folder = tmp_path_factory.mktemp("commands")
    for subject, num in (("anatomy", 7), ("island_trade", 13)):
        target = folder / "data" / "cais" / "mmlu" / subject
        target.mkdir(parents=True)
        rows = [
            {
                "question": f"What is {number} in {subject}?",
                "choices": [f"it {number}", "no", "so", "None"],
                "answer": number % 4,
            }
            for number in range(num)
        ]
        for split, part in (("dev", rows[:5]), ("test", rows)):
            (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    rows = [
        {"ind": number, "activity_label": "Fishing", "ctx_a": f"They cast net {number}.", "ctx_b": "then",
         "endings": ["fish", f"sleep {number}", "all go home", "eat it"],
         "source_id": f"v~{number // 2}", "label": number % 4}
        for number in range(30)
    ]  # fmt: skip
    for split in ("train", "val"):
        (folder / "data" / f"hellaswag_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("base", "tuned", "other")):
        tiny.make_model(folder / name, seed=seed, max_position_embeddings=2048)
    return folder


def eval_flags(world, out, *more, model="base"):
    return ["--model", str(world / model), "--data", str(world / "data"), "--out", str(out), "--dtype", "fp32", *more]


FAST = ["--limit", "9", "--answers.prompts", "none"]


def drift_flags(world, out, *more, base="base", tuned="tuned"):
    flags = ["--base", str(world / base), "--tuned", ",".join(str(world / name) for name in tuned.split(","))]
    return [*flags, "--data", str(world / "data"), "--out", str(out), "--dtype", "fp32", *FAST, *more]


@pytest.fixture(scope="module")
def reported(world, prepared, tmp_path_factory):
    """One report of all there is: two tuned models, held-out loss, answers, noise floor."""
    out = tmp_path_factory.mktemp("reported")
    (world / "prompts.txt").write_text("Say item 3\nName a river\n")
    more = ["--answers.prompts", str(world / "prompts.txt"), "--answers.max_new_tokens", "5"]
    more += ["--heldout", str(prepared / "heldout"), "--noise_items", "4"]
    flags = drift_flags(world, out, *more, tuned="tuned,other")
    drift.main(flags)
    return out, flags


@pytest.fixture
def loaded(monkeypatch):
    """Folders of the models that were loaded."""
    folders = []
    right = weights.open_model

    def noted(folder, *given):
        folders.append(Path(folder).name)
        return right(folder, *given)

    for module in (weights, examine):
        monkeypatch.setattr(module, "open_model", noted)
    return folders


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_of(out):
    return json.loads((out / "drift.json").read_text())


def refused(command, flags, capsys, *words):
    """The command ends with code 2 and one line that holds these words."""
    assert run_command(command, flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in words:
        assert word in said


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
