"""A run that changes its ranks, micro-batch, ZeRO stage and offload at each resume equals the uninterrupted one, and
one whose checkpoints are damaged goes on from an intact one or not at all.
Run: pytest tests/dist/test_elastic_resume.py (all runs of a stage at once; see run_worker)"""

import pytest

from sft.order import step_rows
from tests import tiny
from tests.dist.runs import Runs, furthest
from tests.dist.training import SETTINGS, largest_relative

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, ROWS = 8, 8
STOPS = (2, 5, 6, STEPS)
"""Steps after which a chain stops: in mid-epoch, and beyond the end of the first one (4 steps)."""
ELASTIC = [(4, 1), (2, 2), (1, 8), (4, 2)]
"""Ranks and micro-batch."""
STAGES = [(2, "zero3"), (1, "zero1"), (2, "zero2"), (2, "zero3_offload_all")]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared):
    """One uninterrupted run, both chains, and what goes on from copies of the first one at step 6."""
    folder = tmp_path_factory.mktemp("elastic")
    strategies = {f"zero{stage}": tiny.make_strategy(folder / f"zero{stage}.json", stage) for stage in (1, 2, 3)}
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategies["zero3"],
        "train.max_steps": STEPS, "batch.rows_per_step": ROWS, "checkpoint.keep_last": 5,
    }  # fmt: skip

    def run(name, ranks, micro_batch=1, **more):
        own = {"batch.micro_batch": micro_batch, **more.pop("options", {})}
        return {"name": name, "ranks": ranks, "options": options | own, **more}

    def link(chain, index, ranks, micro_batch, strategy):
        own = {"train.stop_after": STOPS[index], "deepspeed": strategies.get(strategy, strategy)}
        return run(f"{chain}_{index}", ranks, micro_batch, options=own, out=chain)

    def copy(name, **changes):
        return run(name, 2, out=name, copy_of="elastic", **changes)

    plan = [[link("elastic", i, *ELASTIC[i], "zero3"), link("stages", i, STAGES[i][0], 1, STAGES[i][1])]
            for i in range(len(STOPS))]  # fmt: skip
    plan[0].append(run("whole", 2))
    newest, others = "step-00000006", ["step-00000002", "step-00000005"]
    plan.insert(3, [
        copy("no_adam_step", patches={"forget_adam_step": True}),
        copy("shifted", patches={"shift_moments": True}),
        copy("damaged", flip=[newest]),
    ])  # fmt: skip
    plan[3].append(copy("all_damaged", flip=[newest, *others]))
    plan.append([run("all_damaged_again", 2, out="all_damaged")])
    return Runs(folder, plan)


def assert_equal_to_the_whole(runs, out):
    for key in ("step", "epoch", "lr", "tokens", "label_tokens"):
        assert runs.column(out, key) == runs.column("whole", key), key
    for key in ("loss", "grad_norm"):
        assert largest_relative(runs.column(out, key), runs.column("whole", key)) < CLOSE, key
    final, expected = runs.saved(out, STEPS), runs.saved("whole", STEPS)
    assert furthest(final, expected) < CLOSE, "weights and both moments"


@pytest.mark.parametrize("chain", ["elastic", "stages"])
def test_a_chain_equals_the_uninterrupted_run(runs, chain):
    for index in range(len(STOPS)):
        runs.ended_with(f"{chain}_{index}", 0)
    resumes = [(event["step"], event["world_size"]) for event in runs.events(chain, "resume")]
    ranks = [ranks for ranks, _ in (ELASTIC if chain == "elastic" else STAGES)]
    assert resumes == list(zip(STOPS[:-1], ranks[1:], strict=True))
    assert_equal_to_the_whole(runs, chain)


@pytest.mark.parametrize("chain", ["elastic", "stages"])
def test_what_the_ranks_read_is_the_same_sequence_of_packs(runs, chain):
    whole = runs.packs_read("whole")
    read = {step: packs for index in range(len(STOPS)) for step, packs in runs.packs_read(f"{chain}_{index}").items()}
    assert list(whole) == list(range(1, STEPS + 1))
    assert read == whole
    num_packs = 1 + max(max(packs) for packs in whole.values())
    assert whole == {step: step_rows(0, step - 1, num_packs, ROWS).tolist() for step in whole}, "and the planned one"
    assert whole[1] != whole[5], "control: the second epoch has an order of its own"


@pytest.mark.parametrize("control", ["no_adam_step", "shifted"])
def test_control_a_resume_that_loses_something_is_noticed(runs, control):
    runs.ended_with(control, 0)
    assert runs.events(control, "resume")[-1]["step"] == 6
    with pytest.raises(AssertionError, match=r"loss|grad_norm"):
        assert_equal_to_the_whole(runs, control)
    assert furthest(runs.saved(control, STEPS), runs.saved("whole", STEPS)) > 100 * CLOSE


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(runs):
    runs.ended_with("damaged", 0)
    (event,) = runs.events("damaged", "damaged")
    assert "step-00000006 is damaged and will not be used: rank-00000-of-00001.safetensors" in event["reason"]
    assert f"WARNING: {event['reason']}" in runs.said("damaged")
    assert (runs.folder / "damaged" / "checkpoints" / "step-00000006.damaged").is_dir()
    assert runs.events("damaged", "resume")[-1]["step"] == 5
    assert_equal_to_the_whole(runs, "damaged")


@pytest.mark.parametrize("name", ["all_damaged", "all_damaged_again"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_over(runs, name):
    """Nor when a scheduler starts it again."""
    runs.ended_with(name, 2)
    said = runs.said(name)
    assert "step-00000002: is damaged, and no other is left" in said
    assert "Traceback" not in said
    out = runs.folder / "all_damaged"
    assert (out / "checkpoints" / "step-00000002").is_dir()
    assert [line["step"] for line in tiny.read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6], "nothing dropped"
    assert not runs.events("all_damaged", "start")[1:]
