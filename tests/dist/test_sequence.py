"""Ranks that share packs, and MLPs in tiles, change nothing: neither an update nor a figure.
Run: pytest tests/dist/test_sequence.py (single forwards: sequence_worker; whole runs: run_worker)"""

import json

import pytest

from tests import tiny
from tests.dist import forked
from tests.dist.runs import Runs, furthest
from tests.dist.training import SETTINGS, largest_relative, metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

EXACT = 1e-6
SPANNING = [7, 30, 3, 1]
"""41 tokens: odd, and the cut after 21 goes through the second document."""

FORWARDS = {
    "one part": {"size": 1},
    "two parts": {},
    "recomputed": {"checkpointing": True},
    "tiled": {"tiles": 3},
    "tiled, one part": {"size": 1, "tiles": 3},
    "tiled, recomputed": {"tiles": 3, "checkpointing": True},
    "more tiles than tokens": {"tiles": 50},
    "one key head": {"model": "one key head"},
    "bias": {"model": "bias", "tiles": 2},
    "fewer tokens than ranks": {"lengths": [1]},
    "no target in the first part": {"lengths": [20, 7, 12], "supervised": [2]},
    "no target in the second part": {"lengths": [20, 7, 12], "supervised": [0]},
}
MISTAKES = {
    "layout dropped": {"mistake": "layout dropped"},
    "parts alone": {"mistake": "parts alone"},
    "targets within parts": {"mistake": "targets within parts"},
    "parts swapped": {"mistake": "parts swapped"},
}
ON_FOUR = {
    "two groups": {},
    "four parts": {"size": 4},
    "four parts, one key head": {"size": 4, "model": "one key head"},
    "four parts, tiled": {"size": 4, "tiles": 2, "checkpointing": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders; 4 query heads, and 2 of keys and values where not named otherwise."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "two key heads": tiny.make_model(folder / "two"),
        "one key head": tiny.make_model(folder / "one", num_key_value_heads=1),
        "bias": tiny.make_model(folder / "bias", mlp_bias=True, attention_bias=True),
    }


@pytest.fixture(scope="module")
def forwards(tmp_path_factory, models):
    """What sequence_worker found, by case."""
    folder = tmp_path_factory.mktemp("forwards")
    found = {}
    for ranks, cases in ((2, FORWARDS | MISTAKES), (4, ON_FOUR)):
        plan, out = folder / f"plan-{ranks}.json", folder / f"found-{ranks}.json"
        default = {"size": 2, "lengths": SPANNING}
        named = [
            {**default, **case, "name": name, "model": str(models[case.get("model", "two key heads")])}
            for name, case in cases.items()
        ]
        plan.write_text(json.dumps(named))
        done = forked.run_ranks(ranks, "tests.dist.sequence_worker", str(plan), str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", [*FORWARDS, *ON_FOUR])
def test_a_shared_forward_and_backward_equal_the_whole(forwards, name):
    found = forwards[name]
    for what in ("loss", "by_source", "gradient", "hidden"):
        assert found[what] < EXACT, what
    assert found["isolation"].startswith("isolation probe: ")


def test_the_cases_are_what_they_are_named(forwards):
    assert forwards["no target in the first part"]["targets"][0] == 0
    assert forwards["no target in the second part"]["targets"][1] == 0
    assert forwards["fewer tokens than ranks"]["targets"] == [0, 0]
    assert min(forwards["two parts"]["targets"]) > 0
    assert min(forwards["four parts"]["targets"]) > 0


@pytest.mark.parametrize("name", MISTAKES)
def test_control_mistakes_are_noticed(forwards, name):
    assert forwards[name]["loss"] > 1000 * EXACT
    assert forwards[name]["gradient"] > 1000 * EXACT


@pytest.mark.parametrize("name", ["layout dropped", "parts swapped"])
def test_control_the_isolation_probe_refuses_what_mixes_documents(forwards, name):
    assert forwards[name]["isolation"].startswith("refused: isolation probe: ")
    assert "batch.sequence_parallel 1 instead of 2" in forwards[name]["isolation"]


# Whole runs

STEPS = 4
SHARED = {"batch.sequence_parallel": 2}
TILED = {"model.mlp_tiles": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory, base_model):
    """Two sources, packs of at most 300 tokens."""
    from data_prep.build import main

    folder = tmp_path_factory.mktemp("data")
    paths = [tiny.make_alpaca(folder / f"{name}.json", rows=30, seed=seed) for seed, name in enumerate(("one", "two"))]
    main(["--sources", ",".join(map(str, paths)), "--tokenizer", str(base_model), "--seq_len", "300", "--heldout", "6",
          "--workers", "1", "--out", str(folder / "out")])  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, data, strategy):
    folder = tmp_path_factory.mktemp("sequence")
    zero2 = tiny.make_strategy(folder / "zero2.json", stage=2)
    options = {
        **SETTINGS, "model.path": base_model, "data.train": data / "train", "data.heldout": data / "heldout",
        "deepspeed": strategy, "batch.rows_per_step": 4, "train.max_steps": STEPS + 1, "train.stop_after": STEPS,
        "optim.lr": 1e-3, "train.neftune_alpha": 20, "checkpoint.every": 2, "eval.every": 2,
        "eval.probe.data": tiny.make_evals(folder / "evals", items=2), "eval.probe.every": 2,
    }  # fmt: skip

    def run(name, changes, ranks=2, **more):
        return {"name": name, "ranks": ranks, "options": options | changes, **more}

    part = {"train.stop_after": 2}
    first = [
        run("whole", {}),
        run("shared", SHARED),
        run("tiled", TILED),
        run("shared_part", SHARED | part, out="shared_then_whole"),
        run("whole_part", part, out="whole_then_shared"),
    ]
    second = [
        run("shared_tiled", {**SHARED, **TILED, "model.activation_checkpointing": "none", "batch.micro_batch": 2}),
        run("zero2", {**SHARED, **TILED, "deepspeed": zero2}),
        run("whole_rest", {}, out="shared_then_whole"),
        run("shared_rest", SHARED, out="whole_then_shared"),
        run("averaged", {**SHARED, "train.stop_after": 1}, patches={"average_over_packs": 2}),
    ]
    return Runs(folder, [first, second, [run("two_groups", SHARED | part, ranks=4)]])


EQUAL = ["shared", "tiled", "shared_tiled", "zero2", "shared_then_whole", "whole_then_shared"]


@pytest.mark.parametrize("out", [*EQUAL, "two_groups"])
def test_a_run_equals_the_one_without(runs, out):
    runs.ended_with("whole", 0)
    lines, expected = metrics(runs.folder / out), metrics(runs.folder / "whole")
    assert len(lines) == (STEPS if out in EQUAL else 2), runs.said(out) if out in runs.ends else out
    for line, other in zip(lines, expected, strict=False):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=EXACT), key
        assert line["loss_by_source"] == pytest.approx(other["loss_by_source"], rel=EXACT)
        assert line["token_share_by_source"] == other["token_share_by_source"]
        assert line["tokens"] == other["tokens"]
        assert evaluated(line) == pytest.approx(evaluated(other), rel=EXACT, abs=EXACT)
    step = len(lines)
    assert furthest(runs.saved(out, step), runs.saved("whole", step)) < 10 * EXACT


def evaluated(line):
    return {key: value for key, value in line.items() if key.startswith(("probe_", "heldout_"))}


def test_the_runs_have_something_to_differ_in(runs):
    lines = metrics(runs.folder / "whole")
    assert all(len(line["loss_by_source"]) == 2 for line in lines)
    assert any(key.startswith("probe_") for key in lines[1])
    assert lines[1]["heldout_loss"] > 0
    assert lines[-1]["loss"] < 0.99 * lines[0]["loss"]


def test_base_scores_of_the_probe_equal(runs):
    scores = {
        out: json.loads((runs.folder / out / "probe.json").read_text())["scores"] for out in ("whole", "two_groups")
    }
    flat = [[score for item in scores[out] for score in item] for out in ("two_groups", "whole")]
    assert largest_relative(*flat) < EXACT


def test_control_an_average_over_other_ranks_is_noticed(runs):
    runs.ended_with("averaged", 0)
    assert runs.column("averaged", "grad_norm")[0] == pytest.approx(runs.column("whole", "grad_norm")[0] / 2, rel=1e-3)


def test_tiles_cost_no_gathers_of_zero3(tmp_path, base_model, strategy):
    out = tmp_path / "gathers.json"
    done = forked.run_ranks(2, "tests.dist.gathers_worker", str(base_model), str(strategy), str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    gathers = json.loads(out.read_text())
    assert gathers["2"] == gathers["5"] < gathers["1"], "one for the MLP, not one for each of its linear layers"
