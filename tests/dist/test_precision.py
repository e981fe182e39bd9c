"""bf16 compute: gradients are added up in fp32, rotary frequencies stay fp32, and the losses keep to those of fp32.

Every claim is read from live engines on 2 ranks. Run: pytest tests/dist/test_precision.py
"""

import json

import numpy as np
import pytest
import torch

from data_prep.shards import open_shards
from sft import attention, batch
from sft.config import OptimSection
from sft.model import load_model
from sft.order import FILLER, step_rows
from tests import tiny
from tests.dist import contract_data
from tests.dist.training import largest_difference, reference, run_cases

pytestmark = pytest.mark.dist

STAGES = (1, 2, 3)
MANY = 128
"""Rows of the step that is looked at closely: 64 micro-steps on each of 2 ranks."""
BAND_STEPS = 50
BAND_LARGEST, BAND_MEAN = 5e-3, 1.5e-3
"""Relative difference of a bf16 run's losses from those of the fp32 run; measured: 1.7e-3 and 4.4e-4."""
BAND_OPTIM = OptimSection(lr=3e-4, weight_decay=0.1, grad_clip=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("precision")
    tiny.make_model(work / "model")
    documents = contract_data.make_documents(BAND_STEPS)
    contract_data.write(work / "data", documents, contract_data.in_rows(documents, 2), work / "model")
    return work


@pytest.fixture(scope="module")
def runs(folder):
    """One launch: a step of 64 micro-steps for every stage and way to add up, and 50 steps in both precisions."""
    plan = []
    for stage in STAGES:
        for accumulation in ("fp32", "bf16"):
            file = tiny.make_strategy(folder / f"zero{stage}-{accumulation}.json", stage)
            content = json.loads(file.read_text())
            content["data_types"]["grad_accum_dtype"] = accumulation
            file.write_text(json.dumps(content))
            options = {"deepspeed": str(file), "batch.rows_per_step": MANY, "optim.grad_clip": 0}
            plan.append(planned(folder, file.stem, 1, {**options, "model.precision": "bf16"}) | {"moments": True})
    for precision in ("fp32", "bf16"):
        options = {
            "deepspeed": str(folder / "zero3-fp32.json"),
            "batch.rows_per_step": 8,
            "batch.micro_batch": 4,
            "optim.lr": BAND_OPTIM.lr,
            "optim.weight_decay": BAND_OPTIM.weight_decay,
            "optim.grad_clip": BAND_OPTIM.grad_clip,
        }
        plan.append(planned(folder, f"band-{precision}", BAND_STEPS, {**options, "model.precision": precision}))
    return run_cases(folder, 2, plan)


def planned(folder, name, steps, options):
    common = {
        "model.path": str(folder / "model"), "data.train": str(folder / "data" / "train"), "train.max_steps": steps,
        "model.activation_checkpointing": "none", "schedule.warmup": 0, "track.wandb": "off",
    }  # fmt: skip
    return {"name": name, "steps": steps, "options": {**common, **options}}


@pytest.fixture(scope="module")
def summed(folder):
    """The gradient of that step: row by row in bf16 by plain autograd, added up in fp32."""
    shards = open_shards(folder / "data" / "train")
    rows = [row for row in step_rows(0, 0, len(shards), MANY) if row != FILLER]
    model = load_model(
        str(folder / "model"), dtype=torch.bfloat16, attention=attention.register("sdpa"), checkpointing=False,
        liger=False,
    )  # fmt: skip
    scale = 2 / batch.num_labels(shards, np.array(rows))  # of 2 ranks, whose average is taken
    total = {name: torch.zeros(weight.shape) for name, weight in model.hf.named_parameters()}
    for row in rows:
        loss, _ = model(batch.from_shards(shards, np.array([row]), torch.device("cpu")))
        (loss * scale).backward()
        for name, weight in model.hf.named_parameters():
            total[name] += weight.grad.float() / 2
        model.zero_grad()
    return total


def accumulated(run):
    """Gradient of a run of one step: what AdamW's first moment holds, with beta1 0.9."""
    return {name: moment / 0.1 for name, moment in run.first_moments.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_64_micro_steps_are_added_up_in_fp32(runs, summed, stage):
    run = runs[f"zero{stage}-fp32"]
    assert run.data_types == ["torch.bfloat16", "torch.float32"], "compute, accumulation"
    assert largest_difference(accumulated(run), summed) < 1e-5
    norm = torch.stack([gradient.norm() for gradient in summed.values()]).norm()
    assert run.norms[0] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_control_added_up_in_bf16_they_differ(runs, summed, stage):
    """A hundred times outside: what the key in the strategy files is there for."""
    run = runs[f"zero{stage}-bf16"]
    assert run.data_types == ["torch.bfloat16", "torch.bfloat16"]
    assert largest_difference(accumulated(run), summed) > 1e-3


def test_rotary_frequencies_are_fp32_to_the_last_bit(runs):
    expected = 1.0 / (10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8))
    for name in ("zero1-fp32", "zero2-fp32", "zero3-fp32", "band-bf16"):
        assert runs[name].rotary
        for dtype, values in runs[name].rotary.values():
            assert dtype == "torch.float32"
            assert torch.equal(torch.tensor(values), expected)
    rounded = expected.to(torch.bfloat16).float()
    assert not torch.equal(rounded, expected), "control: in bf16 they would be others"


def test_bf16_losses_stay_within_the_band_of_fp32(runs):
    exact, rounded = (np.array(runs[f"band-{precision}"].losses) for precision in ("fp32", "bf16"))
    assert exact[-5:].mean() < 0.95 * exact[:5].mean(), "a run that learns nothing would stay in any band"
    off = np.abs(rounded - exact) / exact
    assert off.max() > 1e-6, "control: it was another precision"
    assert off.max() < BAND_LARGEST
    assert off.mean() < BAND_MEAN


def test_control_without_fp32_master_weights_the_losses_leave_the_band(runs, folder):
    """Plain AdamW on bf16 weights: updates below half a unit in the last place are lost."""
    exact = np.array(runs["band-fp32"].losses)
    losses, _, _ = reference(folder / "model", folder / "data", BAND_STEPS, 8, BAND_OPTIM, dtype=torch.bfloat16)
    off = np.abs(np.array(losses) - exact) / exact
    assert off.max() > 5 * BAND_LARGEST
    assert off.mean() > 5 * BAND_MEAN
