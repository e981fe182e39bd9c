"""Interrupted scoring goes on from its finished bins, or is refused. Run: pytest tests/unit/test_eval_finished.py"""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from sft.errors import run_command
from sft.eval import evaluate, finished, run, score, tree
from sft.eval.finished import Kept
from sft.eval.ranks import Ranks
from sft.eval.requests import Request
from sft.eval.tree import distinct_rows, plan_packed
from sft.pretrained import load_causal_lm
from tests import tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
NUM_ITEMS = 12


class Computed:
    """Bins that were computed: each is kept once."""

    def __init__(self, monkeypatch):
        self.count = 0
        self.stop_at = None
        keep = Kept.write

        def counted(*given):
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            self.count += 1
            keep(*given)

        monkeypatch.setattr(Kept, "write", counted)


@pytest.fixture
def computed(monkeypatch):
    return Computed(monkeypatch)


@pytest.fixture(scope="module")
def model(base_model):
    return load_causal_lm(base_model, dtype=torch.float32, attention="sdpa").eval()


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    contexts = [rng.integers(3, 259, 30).astype(np.int32) for _ in range(NUM_ITEMS)]
    return [Request(ids, np.array([letter, 80], dtype=np.int32)) for ids in contexts for letter in (70, 71, 72, 73)]


@pytest.fixture(scope="module")
def bins(requests):
    with mock.patch.object(tree, "TREE_TOKENS", 40):
        made = plan_packed(distinct_rows(requests, 512), 80)
    assert len(made) >= 6
    return made


def ask(model, bins, out, rank=0):
    return score.score_requests(
        model,
        bins,
        4 * NUM_ITEMS,
        ranks=ALONE,
        native=False,
        lockstep=False,
        kept=Kept(out, "test", rank),
        label="test",
    )


def interrupt(model, bins, out, computed, after, rank=0):
    computed.stop_at = computed.count + after
    with pytest.raises(KeyboardInterrupt):
        ask(model, bins, out, rank)
    computed.stop_at = None


def test_only_what_is_left_is_computed_and_equals_an_uninterrupted_run(model, bins, tmp_path, computed):
    whole = ask(model, bins, None)
    interrupt(model, bins, tmp_path, computed, after=3)
    interrupt(model, bins, tmp_path, computed, after=1, rank=1)  # another rank's file
    started = computed.count
    resumed = ask(model, bins, tmp_path)
    assert computed.count - started == len(bins) - 4
    assert resumed.lls.tobytes() == whole.lls.tobytes()
    assert resumed.greedy.tobytes() == whole.greedy.tobytes()
    again = ask(model, bins, tmp_path)
    assert computed.count - started == len(bins) - 4
    assert again.lls.tobytes() == whole.lls.tobytes()


def test_torn_and_foreign_lines_are_passed_over(model, bins, requests, tmp_path, computed):
    whole = ask(model, bins, None)
    interrupt(model, bins, tmp_path, computed, after=3)
    file = tmp_path / "unfinished" / "test-0.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[-2])
    foreign = [
        "no json",
        "[]",
        "7",
        "\udcff",
        json.dumps(row | {"bin": len(bins)}),
        json.dumps(row | {"bin": -1}),
        json.dumps(row | {"bin": "0"}),
        json.dumps(row | {"requests": row["requests"][::-1], "lls": row["lls"]}),
        json.dumps(row | {"lls": row["lls"][1:]}),
        json.dumps({key: row[key] for key in ("bin", "requests", "lls")}),
        json.dumps(row | {"lls": [5.0] * len(row["lls"])}),
        json.dumps(row | {"lls": [float("nan")] * len(row["lls"])}),
        json.dumps(row | {"lls": [[-1.0, -1.0]] * len(row["lls"])}),
        json.dumps(row | {"lls": [-1.0] * len(row["lls"]), "bin": True}),
        f'{{"bin": 0, "requests": [0], "greedy": [true], "lls": [-1{"0" * 400}]}}',
        "[" * 200_000,
    ]
    text = "\n".join([*lines[:-1], *foreign, lines[-1]])  # behind the bin that they pretend to be
    file.write_bytes(text.encode(errors="surrogateescape")[:-9])  # the last line is torn
    started = computed.count
    resumed = ask(model, bins, tmp_path)
    assert computed.count - started == len(bins) - 2
    assert resumed.lls.tobytes() == whole.lls.tobytes()
    # the torn line did not swallow the one that was written behind it
    ask(model, bins, tmp_path)
    assert computed.count - started == len(bins) - 2


def test_answers_that_were_kept_are_the_ones_that_count(model, bins, tmp_path, computed):
    """Negative control: were they computed anew, an altered one would not show."""
    interrupt(model, bins, tmp_path, computed, after=1)
    file = tmp_path / "unfinished" / "test-0.jsonl"
    row = json.loads(file.read_text())
    file.write_text(json.dumps(row | {"lls": [-123.0] * len(row["lls"])}) + "\n")
    assert set(ask(model, bins, tmp_path).lls.reshape(-1)[row["requests"]]) == {-123.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_evals(tmp_path_factory.mktemp("finished") / "data")


@pytest.fixture
def flags(base_model, data, monkeypatch):
    monkeypatch.setattr(tree, "TREE_TOKENS", 64)

    def make(out, **changed):
        options = {"model": base_model, "data": data, "dtype": "fp32", "tokens_per_batch": 300, "out": out} | changed
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    return make


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(flags, capsys, *words):
    """The command ends with code 2 and one line that holds these words."""
    assert run_command(evaluate.main, flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_command_that_was_interrupted_goes_on(flags, tmp_path, capsys, computed, monkeypatch, base_model):
    assert run_command(evaluate.main, flags(tmp_path / "whole")) == 0
    assert not (tmp_path / "whole" / "unfinished").exists()
    needed = computed.count
    computed.stop_at = needed + needed // 2
    out = tmp_path / "out"
    assert run_command(evaluate.main, flags(out)) == 130
    computed.stop_at = None
    assert sorted(path.name for path in out.iterdir()) == ["unfinished"]
    capsys.readouterr()

    before = contents(out)
    other = shutil.copytree(base_model, tmp_path / "other")
    tiny.make_model(other, seed=3)
    for name, value in (("dtype", "bf16"), ("limit", "3"), ("tokens_per_batch", "301"), ("score_dtype", "native")):
        refused(flags(out, **{name: value}), capsys, f"--out {out} holds an interrupted run", f"{name} was")
    refused(flags(out, model=other), capsys, f"--out {out} holds an interrupted run", "weights_sha256 was")
    refused(flags(out, tasks="mmlu"), capsys, f"--out {out} holds an interrupted run", "tasks.hellaswag was")
    refused(
        flags(out, **{"shots.mmlu": 2}), capsys, f"--out {out} holds an interrupted run", "tasks.mmlu.shots was 5, is 2"
    )
    assert contents(out) == before

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # everything is computed, nothing is written yet
        patch.setattr(run, "write_results", killed)
        started = computed.count
        assert run_command(evaluate.main, flags(out)) == 130
    assert "goes on from what an interrupted run had finished" in capsys.readouterr().out
    assert 0 < computed.count - started < needed
    assert sorted(path.name for path in out.iterdir()) == ["unfinished"]

    started = computed.count
    assert run_command(evaluate.main, flags(out)) == 0
    assert computed.count == started
    assert contents(out) == contents(tmp_path / "whole")


def test_results_that_are_complete_are_not_computed_again(flags, tmp_path, capsys, computed, monkeypatch):
    assert run_command(evaluate.main, flags(tmp_path)) == 0
    before = contents(tmp_path)

    def opened(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run.weights, "open_model", opened)
    started = computed.count
    assert run_command(evaluate.main, flags(tmp_path)) == 0
    assert "nothing is computed again" in capsys.readouterr().out
    for name, value in (("dtype", "bf16"), ("limit", "3"), ("tokens_per_batch", "301")):
        refused(flags(tmp_path, **{name: value}), capsys, f"--out {tmp_path} holds results", f"{name} was")
    assert computed.count == started
    assert contents(tmp_path) == before
    (tmp_path / "items-mmlu.jsonl").write_bytes(before["items-mmlu.jsonl"][:-40])
    refused(flags(tmp_path), capsys, "items-mmlu.jsonl")


def test_an_identity_that_cannot_be_read_is_refused(flags, tmp_path, capsys):
    (tmp_path / finished.FOLDER).mkdir()
    (tmp_path / finished.FOLDER / finished.IDENTITY).write_text('{"dtype": ')
    refused(flags(tmp_path), capsys, "identity.json: cannot be read; remove the folder")
