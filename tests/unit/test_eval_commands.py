"""`sft eval` and `sft drift`: files, gate, refusals, two ranks. Run: pytest tests/unit/test_eval_commands.py"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from sft.eval.options import DriftConfig

from sft.errors import UserError, run_command
from sft.eval import drift, evaluate
from sft.eval.run import load_items
from sft.settings import load
from tests import tiny

RECORD_FIELDS = ["task", "subject", "doc_id", "gold", "lls", "pred", "pred_norm", "correct", "correct_norm"]
RECORD_FIELDS += ["prompt_sha256", "cluster"]


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
    tiny.make_model(folder / "base", seed=0, max_position_embeddings=2048)
    tiny.make_model(folder / "tuned", seed=1, max_position_embeddings=2048)
    return folder


def eval_flags(world, out, *more, model="base"):
    return ["--model", str(world / model), "--data", str(world / "data"), "--out", str(out), "--dtype", "fp32", *more]


def drift_flags(world, out, *more, base="base", tuned="tuned"):
    flags = ["--base", str(world / base), "--tuned", str(world / tuned), "--data", str(world / "data")]
    return [*flags, "--out", str(out), "--dtype", "fp32", "--limit", "9", *more]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_writes_records_and_results(world, tmp_path, capsys):
    evaluate.main(eval_flags(world, tmp_path / "out", "--shots.hellaswag", "3"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "items-hellaswag.jsonl",
        "items-mmlu.jsonl",
        "results.json",
    ]
    records = read(tmp_path / "out" / "items-mmlu.jsonl")
    assert list(records[0]) == RECORD_FIELDS
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
    assert header["data"] == str(world / "data")
    assert results["tasks"]["mmlu"]["source"].startswith(f"MMLU from {world}/data/cais/mmlu (jsonl): 2 subjects")
    assert "20 test rows" in results["tasks"]["mmlu"]["source"]
    assert results["tasks"]["hellaswag"]["source"].endswith(": 30 validation rows, 30 train rows")
    assert len(header["weights_sha256"]) == len(header["tokenizer_sha256"]) == 64
    printed = capsys.readouterr().out
    assert "MMLU from" in printed
    assert "items are longer" not in printed
    assert "results.json" in printed


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


@pytest.mark.dist
def test_two_ranks_give_the_same_records(world, tmp_path):
    evaluate.main(eval_flags(world, tmp_path / "one", "--tokens_per_batch", "3000"))
    flags = eval_flags(world, tmp_path / "two", "--tokens_per_batch", "3000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outcome = tiny.run([*launcher, "-m", "sft.eval", *flags])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for task in ("mmlu", "hellaswag"):
        assert (tmp_path / "two" / f"items-{task}.jsonl").read_text() == (
            tmp_path / "one" / f"items-{task}.jsonl"
        ).read_text()
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["header"].pop("ranks"), two["header"].pop("ranks")) == (1, 2)
    assert one == two
    assert outcome.stdout.count("MMLU from") == 1  # only the first rank speaks


def test_drift_counts_what_the_records_say(world, tmp_path, capsys):
    drift.main(drift_flags(world, tmp_path))
    report = json.loads((tmp_path / "drift.json").read_text())
    for task, metric, field in (("mmlu", "acc", "correct"), ("hellaswag", "acc_norm", "correct_norm")):
        base, tuned = (read(tmp_path / side / f"items-{task}.jsonl") for side in ("base", "tuned"))
        lost = sum(before[field] and not after[field] for before, after in zip(base, tuned, strict=True))
        won = sum(after[field] and not before[field] for before, after in zip(base, tuned, strict=True))
        row = report["tasks"][task]
        assert (row["metric"], row["n"]) == (metric, len(base))
        assert (row["right_to_wrong"], row["wrong_to_right"]) == (lost, won)
        assert row["delta"] == pytest.approx((won - lost) / len(base))
        assert row["interval"][0] <= row["delta"] <= row["interval"][1]
    assert lost + won > 0  # two random models do disagree
    assert report["gate"] == {"max_drop": None, "passed": None, "failed": []}
    markdown = (tmp_path / "drift.md").read_text()
    for words in (
        "| mmlu acc |",
        "| hellaswag acc_norm |",
        "| anatomy |",
        "| island_trade |",
        "| stem |",
        "How to read",
    ):
        assert words in markdown
    for line in (f"* data: {world}/data", f"* MMLU from {world}/data", f"* HellaSwag from {world}/data"):
        assert line in markdown
    assert "9 items longer than max_length" in markdown
    assert "drift.md" in capsys.readouterr().out


def test_items_that_lose_their_beginning_are_counted_and_told(world, tmp_path, capsys):
    items, _ = load_items(load(DriftConfig, drift_flags(world, tmp_path), prog="sft drift"))
    lengths = [1 + len(f"{item.context} A") for item in items["mmlu"]]  # BOS, and one token per byte
    room = sorted(lengths)[8] - 2  # the last token is predicted, not read
    cut = sum(length > room + 1 for length in lengths)
    assert 0 < cut < 16
    short = tiny.make_model(world / "cut", max_position_embeddings=room)
    drift.main(drift_flags(world, tmp_path, base=short.name, tuned=short.name))
    report = json.loads((tmp_path / "drift.json").read_text())
    assert report["tuned"]["tasks"]["mmlu"]["truncated_items"] == cut
    assert report["tuned"]["tasks"]["hellaswag"]["truncated_items"] == 0
    assert f"{cut} of 16 items longer than max_length" in (tmp_path / "drift.md").read_text()
    printed = capsys.readouterr().out
    assert f"mmlu: {cut} of 16 items are longer than the model's {room} tokens and lose their beginning" in printed
    assert "hellaswag: " not in printed


def test_no_results_of_an_earlier_run_stay(world, tmp_path):
    evaluate.main(eval_flags(world, tmp_path / "eval", "--limit", "2"))
    (tmp_path / "eval" / "notes.txt").write_text("mine")
    evaluate.main(eval_flags(world, tmp_path / "eval", "--limit", "2", "--tasks", "mmlu"))
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
        "items-mmlu.jsonl",
        "notes.txt",
        "results.json",
    ]
    drift.main(drift_flags(world, tmp_path / "drift", "--limit", "2"))
    for command, flags in (
        (evaluate.main, eval_flags(world, tmp_path / "eval", model="absent")),
        (drift.main, drift_flags(world, tmp_path / "drift", tuned="absent")),
    ):
        assert run_command(command, flags) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


def test_only_the_first_rank_clears_the_folder(world, tmp_path, monkeypatch):
    """The second one may come late, when the first one has written."""
    evaluate.main(eval_flags(world, tmp_path, "--limit", "2"))
    monkeypatch.setenv("RANK", "1")
    assert run_command(evaluate.main, eval_flags(world, tmp_path, model="absent")) == 2
    assert (tmp_path / "results.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert run_command(evaluate.main, eval_flags(world, tmp_path, model="absent")) == 2
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", ["results.json", "items-mmlu.jsonl", "drift.json", "drift.md", "tuned/results.json"])
def test_a_folder_in_a_results_place_is_found_before_the_scoring(world, tmp_path, capsys, name):
    """The model is missing too: what is told first was looked at first."""
    (tmp_path / name).mkdir(parents=True)
    command, flags = evaluate.main, eval_flags(world, tmp_path, model="absent")
    if name.startswith(("drift", "tuned")):
        command, flags = drift.main, drift_flags(world, tmp_path, base="absent")
    assert run_command(command, flags) == 2
    assert f"{name}: cannot be written: Is a directory" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_found_before_the_scoring(world, capsys):
    taken = Path("/proc/self/net")
    if not taken.is_dir():
        pytest.skip("no /proc: no folder that refuses files even to root")
    assert run_command(evaluate.main, eval_flags(world, taken, model="absent")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_rank_that_is_no_number_is_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    assert run_command(evaluate.main, eval_flags(world, tmp_path)) == 2
    assert "RANK is 'x'" in capsys.readouterr().err


def test_a_model_against_itself_shows_no_change(world, tmp_path):
    drift.main(drift_flags(world, tmp_path, "--gate.max_drop", "0", tuned="base"))
    report = json.loads((tmp_path / "drift.json").read_text())
    for row in report["tasks"].values():
        assert (row["delta"], row["right_to_wrong"], row["wrong_to_right"], row["mcnemar_p"]) == (0, 0, 0, 1)
        assert row["verdict"] == "no change shown"
        assert row["interval"][0] < 0 < row["interval"][1]
    assert report["gate"]["passed"] is True


def test_the_gate_fails_after_the_report_is_written(world, tmp_path, capsys):
    """Two random models, both ways round: one of the directions loses accuracy."""
    outcomes = {}
    for name, base, tuned in (("there", "base", "tuned"), ("back", "tuned", "base")):
        flags = drift_flags(world, tmp_path / name, "--gate.max_drop", "0.0", "--tasks", "mmlu", base=base, tuned=tuned)
        outcomes[name] = run_command(drift.main, flags)
        report = json.loads((tmp_path / name / "drift.json").read_text())
        assert outcomes[name] == (3 if report["tasks"]["mmlu"]["drop"] > 0 else 0)
        assert report["gate"]["passed"] == (outcomes[name] == 0)
    assert sorted(outcomes.values()) == [0, 3]
    assert "gate failed: mmlu acc dropped by" in capsys.readouterr().err
    # a generous gate lets the same loss pass
    base, tuned = ("base", "tuned") if outcomes["there"] == 3 else ("tuned", "base")
    flags = drift_flags(world, tmp_path / "wide", "--gate.max_drop", "1.0", "--tasks", "mmlu", base=base, tuned=tuned)
    assert run_command(drift.main, flags) == 0


def test_models_that_would_be_asked_different_things_are_refused(world, tmp_path):
    short = tiny.make_model(world / "short", max_position_embeddings=300)
    with pytest.raises(UserError, match=r"max_position_embeddings: .*/base has 2048, .*/short has 300"):
        drift.main(drift_flags(world, tmp_path, tuned=short.name))
    lost_bos = shutil.copytree(world / "base", world / "lost_bos", dirs_exist_ok=True)
    state = json.loads((lost_bos / "tokenizer.json").read_text()) | {"post_processor": None}
    (lost_bos / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"give different ids, first at anatomy item 0 \(ids begin \[1, .*BOS lost"):
        drift.main(drift_flags(world, tmp_path, tuned="lost_bos"))
    assert not (tmp_path / "drift.json").exists()


def test_other_tokenizer_files_with_equal_ids_are_accepted(world, tmp_path):
    resaved = shutil.copytree(world / "base", world / "resaved", dirs_exist_ok=True)
    state = json.loads((resaved / "tokenizer.json").read_text())
    (resaved / "tokenizer.json").write_text(json.dumps(state, indent=4))
    drift.main(drift_flags(world, tmp_path, tuned="resaved"))
    report = json.loads((tmp_path / "drift.json").read_text())
    assert report["base"]["tokenizer_sha256"] != report["tuned"]["tokenizer_sha256"]


def test_user_mistakes_are_one_line_and_code_2(world, tmp_path, capsys):
    (tmp_path / "no_tokenizer").mkdir()
    shutil.copy(world / "base" / "config.json", tmp_path / "no_tokenizer")
    file = tmp_path / "a_file"
    file.write_text("")
    mistakes = [
        (eval_flags(world, tmp_path / "o", model="absent"), "absent: no such folder"),
        (eval_flags(world, tmp_path / "o", model=tmp_path / "no_tokenizer"), "holds no tokenizer.json"),
        (eval_flags(world, file), "a_file: cannot be created"),
        (eval_flags(world, tmp_path / "o", "--tasks", "mmlu,arc"), "arc"),
        (eval_flags(world, tmp_path / "o", "--shots.mmlu", "6"), "shots.mmlu"),
        (
            eval_flags(world, tmp_path / "o", "--shots.hellaswag", "30"),
            "--shots.hellaswag 30, but the train split has 30",
        ),
    ]
    for flags, message in mistakes:
        assert run_command(evaluate.main, flags) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ")
        assert message in said
        assert "\n" not in said
    assert not (tmp_path / "o" / "results.json").exists()
