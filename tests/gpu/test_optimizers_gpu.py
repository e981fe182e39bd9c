"""Optimizers by name and states on a GPU. Run on a GPU host: pytest tests/gpu"""

import pytest
import torch
from torch import nn

from sft import moments
from sft.config import OptimSection
from sft.optim import MOMENTS_DTYPE, build_optimizer
from sft.quantised import Quantised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

NAMES = [
    *[(name, states) for name in ("adamw", "lion", "sgd") for states in ("fp32", "bf16")],
    ("adamw", "8bit"),
    ("sgd", "8bit"),
]


def trained(device: str, optim: OptimSection) -> tuple[torch.Tensor, torch.optim.Optimizer, nn.Parameter]:
    """A weight after three steps, its optimizer, and the live weight; state made as sft.zero_state makes it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(70_001).to(device))
    built = build_optimizer(model, optim, on_cpu_beside_gpu=False)
    moments.make(built, model.weight, MOMENTS_DTYPE[optim.states])
    moments.set_step(built, model.weight, 0)
    for _ in range(3):
        gradient = torch.randn(70_001)
        gradient[::3] = 0  # as in rows of the embedding that no token has used
        model.weight.grad = gradient.to(device)
        built.step()
    return model.weight.detach().cpu(), built, model.weight


@pytest.mark.parametrize(("name", "states"), NAMES)
def test_a_gpu_makes_the_update_of_the_cpu(name, states):
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    optim = OptimSection(name=name, states=states, lr=1e-3)
    reference = OptimSection(name=name, states="fp32" if states == "8bit" else states, lr=1e-3)
    on_gpu, on_cpu = trained("cuda", optim)[0], trained("cpu", reference)[0]
    torch.manual_seed(0)
    change = on_cpu - torch.randn(70_001)
    limit = {"fp32": 1e-5, "bf16": 1e-2, "8bit": 0.1}[states]
    if name == "lion":
        limit = 1e-2  # a sign or two that depend on the last bit
    assert (on_gpu - on_cpu).norm() / change.norm() < limit
    assert change.norm() > 0.1, "it moved"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_8_bit_moments_of_the_gpu_kernels_come_back_from_their_values(name):
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    _, built, weight = trained("cuda", OptimSection(name=name, states="8bit", lr=1e-3))
    for moment in moments.held(built, weight).values():
        assert isinstance(moment, Quantised)
        again = Quantised(torch.zeros_like(moment.codes), torch.zeros_like(moment.scales), moment.table)
        again.copy_(torch.cat([part.cpu() for part in moment.split(10_000)]))
        assert torch.equal(again.codes, moment.codes)
        assert torch.equal(again.scales, moment.scales)
