"""`sft eval` and `sft drift` on two ranks say what they say on one. Run: pytest tests/dist/test_evaluation.py"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sft.eval import drift
from sft.ports import free_port
from tests import tiny
from tests.dist import forked

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, prepared):
    """One launch of two ranks, and the same report by one process."""
    folder = tmp_path_factory.mktemp("evaluation")
    # wide enough that ZeRO-3 spreads its matrices: it keeps those below 100,000 elements on each rank
    wide = {"hidden_size": 320, "intermediate_size": 320, "initializer_range": 0.1, "max_position_embeddings": 2048}
    base, tuned = (tiny.make_model(folder / name, seed, **wide) for seed, name in enumerate(("base", "tuned")))
    data = tiny.make_evals(folder / "data")
    prompts = folder / "prompts.txt"
    prompts.write_text("Say item 3\nName a river\n")
    scoring = ["--data", str(data), "--dtype", "fp32", "--tokens_per_batch", "600"]
    both = ["--base", str(base), "--tuned", str(tuned), "--heldout", str(prepared / "heldout"), "--noise_items", "3"]
    both += [*scoring, "--answers.prompts", str(prompts), "--answers.max_new_tokens", "6"]

    def step(name, command, *flags):
        return {"name": name, "command": command, "flags": [*flags, "--out", str(folder / name)], "port": free_port()}

    plan = [
        step("no_data", "eval", "--model", str(base), "--data", str(folder / "absent")),
        step("replicas", "eval", "--model", str(base), *scoring),
        step("again", "eval", "--model", str(base), *scoring, "--limit", "2"),
        step("zero3", "drift", *both, "--placement", "zero3", "--gate.max_drop", "0.001"),
    ]
    plan[2]["flags"][-1] = str(folder / "replicas")  # holds results of other settings by then
    (folder / "plan.json").write_text(json.dumps(plan))
    done = forked.run_ranks(2, "tests.dist.evaluation_worker", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    drift.main([*both, "--out", str(folder / "alone")])
    ends = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, done=done, ends=ends)


def test_replicas_give_the_records_of_one_process(world):
    assert [end["replicas"]["code"] for end in world.ends] == [0, 0]
    for task in ("mmlu", "hellaswag"):
        alone, two = (world.folder / side / f"items-{task}.jsonl" for side in ("alone/base", "replicas"))
        assert two.read_text() == alone.read_text()
    header = json.loads((world.folder / "replicas" / "results.json").read_text())["header"]
    assert (header["ranks"], header["placement"], header["engine"]) == (2, "replicas", "packed")
    assert not (world.folder / "replicas" / "unfinished").exists()


def test_mistakes_end_both_ranks_with_one_line_each(world):
    for name, line in (
        ("no_data", "absent: no such folder"),
        ("again", "holds results with other settings: limit was not given, is 2"),
    ):
        assert [end[name]["code"] for end in world.ends] == [2, 2]
        assert world.done.stderr.count(line) == 2
    assert world.done.stderr.count("error: ") == 4
    assert "Traceback" not in world.done.stderr


def test_spread_weights_give_the_same_scores_loss_and_answers(world):
    # two random models: the gate fails, on the first rank, which writes the report
    assert [end["zero3"]["code"] for end in world.ends] == [3, 0]
    assert max(end["zero3"]["idle"] for end in world.ends) > 0, "even work would prove nothing"
    alone, spread = (json.loads((world.folder / name / "drift.json").read_text()) for name in ("alone", "zero3"))
    assert (spread["base"]["ranks"], spread["base"]["placement"], spread["base"]["engine"]) == (2, "zero3", "packed")
    for side in ("base", "tuned"):
        for task in ("mmlu", "hellaswag"):
            ours, theirs = (
                tiny.read_jsonl(world.folder / name / side / f"items-{task}.jsonl") for name in ("alone", "zero3")
            )
            np.testing.assert_allclose(
                [record["lls"] for record in theirs], [record["lls"] for record in ours], atol=1e-4
            )
            for field in ("pred", "pred_norm", "prompt_sha256", "doc_id", "subject"):
                assert [record[field] for record in theirs] == [record[field] for record in ours]
    losses = [[model["heldout_loss"] for model in report["models"]] for report in (alone, spread)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)
    assert spread["answers"] == alone["answers"]
    assert spread["tasks"]["mmlu"]["noise"]["items"] == 3
    assert world.done.stdout.count("engine probe") == 3  # of replicas, base and tuned; only the first rank speaks
