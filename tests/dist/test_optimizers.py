"""Each optimizer, and what is kept beside it, equals its written-out rule on every stage, and goes on exactly after a
resume. Run: pytest tests/dist/test_optimizers.py (all runs of a stage at once; see run_worker)"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft.checkpoint import Pieces, read_meta, step_folder
from sft.config import OptimSection
from sft.moments import MOMENTS
from sft.retention import bytes_per_parameter
from tests import tiny
from tests.dist import optimizer_reference
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS

pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, SAVED, ROWS = 6, 3, 8
TOTAL = 7
"""The schedule's steps: what stops before its end exports nothing."""
COMMON = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "betas": (0.9, 0.95)}
OPTIMS = {
    "lion-zero3": OptimSection(name="lion", **COMMON),
    "lion-zero2": OptimSection(name="lion", **COMMON),
    "sgd-zero3": OptimSection(name="sgd", **COMMON | {"lr": 1e-2}),
    "sgd-zero1": OptimSection(name="sgd", **COMMON | {"lr": 1e-2}),
    "bf16-zero3": OptimSection(states="bf16", **COMMON),
    "lion_bf16-zero3": OptimSection(name="lion", states="bf16", **COMMON),
    "8bit-zero3": OptimSection(states="8bit", **COMMON),
    "sgd_8bit-zero3": OptimSection(name="sgd", states="8bit", **COMMON | {"lr": 1e-2}),
    **{f"recipe-zero{stage}": OptimSection(layer_decay=0.5, l2_sp=30, **COMMON) for stage in (1, 2, 3)},
}
FACTORS = {"layers.0.": 0.25, "layers.1.": 0.5, "embed": 0.125}
"""Of the tiny model's two layers at layer_decay 0.5; the final norm and the head have 1."""
EMA_DECAY = 0.5
TOLERANCE = 5e-5
"""Of what training has made of a tensor."""
CLOSE_8BIT = 0.12
RESUMED = ("sgd-zero3", "bf16-zero3", "8bit-zero3", "recipe-zero1", "recipe-zero2", "recipe-zero3")
ON_ONE_RANK = {"8bit-zero3": 0.02, "recipe-zero3": 1e-4}
"""Limits of the difference."""
CONTROLS = {"shifted": "shift_moments", "no_average": "lose_average"}
CONTROL_OF = {"shifted": "8bit-zero3", "no_average": "recipe-zero3"}


def options_of(name: str) -> dict[str, object]:
    optim = OPTIMS[name].model_dump(exclude_defaults=True)
    optim["betas"] = list(OPTIMS[name].betas)
    recipe = {"train.ema_decay": EMA_DECAY} if name.startswith("recipe") else {}
    return {**{f"optim.{key}": value for key, value in optim.items()}, **recipe}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared):
    """Every optimizer from the start; then, from copies of them at step SAVED, what goes on to the end."""
    folder = tmp_path_factory.mktemp("optimizers")
    options = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "train.max_steps": TOTAL,
        "train.stop_after": STEPS, "batch.rows_per_step": ROWS, "checkpoint.every": SAVED,
    }  # fmt: skip
    # parts of several parameters in one flat tensor, and several flat tensors of a group
    strategies = {stage: tiny.make_strategy(folder / f"zero{stage}.json", stage) for stage in (1, 2)}
    strategies[3] = tiny.make_strategy(folder / "zero3.json", 3, sub_group_size=5000)

    def run(name, **more):
        own = {**options, **options_of(name), "deepspeed": strategies[int(name[-1])]}
        return {"name": name, "ranks": 2, "options": own, **more}

    def go_on(name, kind, **more):
        started = {"copy_of": name, "remove": [f"checkpoints/{step_folder(Path(), STEPS)}"]}
        return run(name, out=f"{name}-{kind}", **started) | {"name": f"{name}-{kind}", **more}

    resumed = [go_on(name, "resumed") for name in RESUMED] + [go_on(name, "one", ranks=1) for name in ON_ONE_RANK]
    resumed += [go_on(of, kind, patches={CONTROLS[kind]: True}) for kind, of in CONTROL_OF.items()]
    first = [run(name) for name in OPTIMS]
    return Runs(folder, [*at_once(first), *at_once(resumed)])


def at_once(planned: list) -> list[list]:
    """In stages of four."""
    return [planned[first : first + 4] for first in range(0, len(planned), 4)]


@pytest.fixture(scope="module")
def expected(base_model, prepared):
    def of(optim, scale_error=1.0):
        recipe = {"factors": FACTORS, "ema_decay": EMA_DECAY} if optim.l2_sp else {"factors": {}}
        return optimizer_reference.train(
            base_model, prepared, STEPS, TOTAL, ROWS, optim, scale_error=scale_error, **recipe
        )

    return of


States = dict[str, torch.Tensor]


def states_of(runs: Runs, name: str, step: int = STEPS) -> States:
    """Everything that a checkpoint says it holds, by "<name>|<state>"."""
    folder = step_folder(runs.folder / name / "checkpoints", step)
    meta, pieces = read_meta(folder), Pieces(folder)
    return {
        f"{name}|{state}": pieces.read(name, state, 0, torch.Size(shape).numel())
        for name, shape in meta["shapes"].items()
        for state in meta["states"]
    }


def off(one: States, other: States, base: States, *states: str) -> float:
    """Largest L2 difference of a tensor of these states, relative to what training has made of it."""
    assert one.keys() == other.keys()
    return max(
        float((one[key].float() - other[key].float()).norm() / (other[key] - base.get(key, 0)).float().norm())
        for key in other
        if key.rpartition("|")[2] in states
    )


@pytest.fixture(scope="module")
def base(base_model) -> States:
    """What weights and averages begin with; moments begin with 0."""
    named = load_file(base_model / "model.safetensors").items()
    return {f"{name}|{state}": weight.flatten() for name, weight in named for state in ("fp32", "ema")}


EXACT = [name for name, optim in OPTIMS.items() if optim.states != "8bit"]


@pytest.mark.parametrize("name", EXACT)
def test_an_optimizer_equals_its_rule_on_whole_parameters(runs, expected, base, name):
    runs.ended_with(name, 0)
    optim, found = OPTIMS[name], states_of(runs, name)
    wanted = expected(optim)
    assert off(found, wanted, base, "fp32", "ema") < TOLERANCE
    moments = MOMENTS[optim.name]
    # a moment that lies between two bf16 numbers may be rounded to either
    assert off(found, wanted, base, *moments) < (1e-3 if optim.states == "bf16" else TOLERANCE)
    held = torch.bfloat16 if optim.states == "bf16" else torch.float32
    assert {found[key].dtype for key in found if key.rpartition("|")[2] in moments} == {held}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lion-zero3", {"weight_decay": 0.099}),
        ("sgd-zero3", {"betas": (0.899, 0.95)}),
        ("bf16-zero3", {"states": "fp32"}),
        ("lion_bf16-zero3", {"states": "fp32"}),
        ("recipe-zero3", {"l2_sp": 29}),
    ],
)
def test_control_a_slightly_other_rule_is_noticed(runs, expected, base, name, change):
    wanted = expected(OPTIMS[name].model_copy(update=change))
    assert off(states_of(runs, name), wanted, base, "fp32") > 3 * TOLERANCE


def test_control_the_learning_rates_of_two_layers_exchanged_are_noticed(runs, base_model, prepared, base):
    exchanged = {**FACTORS, "layers.0.": FACTORS["layers.1."], "layers.1.": FACTORS["layers.0."]}
    wanted = optimizer_reference.train(
        base_model, prepared, STEPS, TOTAL, ROWS, OPTIMS["recipe-zero3"], exchanged, ema_decay=EMA_DECAY
    )
    assert off(states_of(runs, "recipe-zero3"), wanted, base, "fp32") > 0.1


def test_8_bit_moments_stay_close_to_fp32_ones(runs, expected, base):
    """Measured: 0.056 of AdamW's change of a tensor, 0.007 of SGD's; 0.02 of a moment."""
    adamw, sgd = expected(OPTIMS["8bit-zero3"]), expected(OPTIMS["sgd_8bit-zero3"])
    assert 1e-4 < off(states_of(runs, "8bit-zero3"), adamw, base, "fp32") < CLOSE_8BIT
    assert 1e-3 < off(states_of(runs, "8bit-zero3"), adamw, base, "exp_avg", "exp_avg_sq") < CLOSE_8BIT
    assert 1e-4 < off(states_of(runs, "sgd_8bit-zero3"), sgd, base, "fp32", "momentum_buffer") < CLOSE_8BIT
    broken = expected(OPTIMS["8bit-zero3"], scale_error=0.5)
    assert off(broken, adamw, base, "fp32") > 2 * CLOSE_8BIT, "control: second moments at half their scale"


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_on_as_many_ranks_is_the_uninterrupted_run(runs, name):
    runs.ended_with(f"{name}-resumed", 0)
    assert [event["step"] for event in runs.events(f"{name}-resumed", "resume")] == [SAVED]
    resumed, whole = states_of(runs, f"{name}-resumed"), states_of(runs, name)
    assert resumed.keys() == whole.keys()
    for key in whole:
        assert torch.equal(resumed[key], whole[key]), key


@pytest.mark.parametrize(("name", "limit"), ON_ONE_RANK.items())
def test_a_resume_on_one_rank_is_close_to_it(runs, base, name, limit):
    """8-bit blocks lie elsewhere then: measured 0.004 of the change; the others differ by rounding."""
    runs.ended_with(f"{name}-one", 0)
    assert [event["world_size"] for event in runs.events(f"{name}-one", "resume")] == [1]
    assert off(states_of(runs, f"{name}-one"), states_of(runs, name), base, "fp32", "ema") < limit


def test_control_a_resume_that_shifts_8_bit_moments_is_noticed(runs, base):
    runs.ended_with("8bit-zero3-shifted", 0)
    shifted = states_of(runs, "8bit-zero3-shifted")
    assert off(shifted, states_of(runs, "8bit-zero3"), base, "fp32") > 5 * ON_ONE_RANK["8bit-zero3"]


def test_control_a_resume_without_the_average_changes_it_alone(runs, base):
    runs.ended_with("recipe-zero3-no_average", 0)
    found, whole = states_of(runs, "recipe-zero3-no_average"), states_of(runs, "recipe-zero3")
    assert off(found, whole, base, "fp32", "exp_avg", "exp_avg_sq") == 0
    assert off(found, whole, base, "ema") > 1e-3


def test_a_checkpoint_lists_what_it_holds(runs):
    listed = {name: read_meta(step_folder(runs.folder / name / "checkpoints", STEPS))["states"] for name in OPTIMS}
    assert listed["lion-zero3"] == ["fp32", "exp_avg"]
    assert listed["sgd-zero1"] == listed["sgd_8bit-zero3"] == ["fp32", "momentum_buffer"]
    assert listed["8bit-zero3"] == ["fp32", "exp_avg", "exp_avg_sq"]
    assert listed["recipe-zero2"] == ["fp32", "exp_avg", "exp_avg_sq", "ema"]


@pytest.mark.parametrize("name", ["lion-zero3", "bf16-zero3", "8bit-zero3", "recipe-zero3"])
def test_a_checkpoint_is_as_large_as_is_predicted(runs, name):
    """Slices of odd lengths have headers of some size, but no value that is not counted."""
    files = list(step_folder(runs.folder / name / "checkpoints", STEPS).glob("rank-*"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    numel = sum(len(value) for key, value in states_of(runs, name).items() if key.endswith("|fp32"))
    each = bytes_per_parameter(OPTIMS[name], EMA_DECAY if name.startswith("recipe") else None)
    assert sum(path.stat().st_size for path in files) - headers == each * numel
