"""8-bit moments: what is saved of them, and set again. Run: pytest tests/unit/test_quantised.py"""

import pytest
import torch

from sft.config import OptimSection
from sft.moments import held
from sft.optim import build_optimizer
from sft.quantised import BLOCK, Quantised

pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")


def moments_of(name: str, numel: int) -> dict[str, Quantised]:
    """Moments that bitsandbytes has made of gradients over seven orders of magnitude."""
    torch.manual_seed(0)
    model = torch.nn.Linear(numel, 1, bias=False)
    built = build_optimizer(model, OptimSection(name=name, states="8bit"), on_cpu_beside_gpu=False)
    for _ in range(3):
        model.weight.grad = torch.randn(1, numel) * 10 ** torch.randint(-6, 1, (1, numel)).float()
        built.step()
    return {
        key: Quantised(moment.codes.flatten(), moment.scales, moment.table)
        for key, moment in held(built, model.weight).items()
    }


def values_of(moment: Quantised, size: int = 777) -> torch.Tensor:
    return torch.cat(list(moment.split(size)))


@pytest.mark.parametrize("numel", [1, BLOCK, 3 * BLOCK + 7, 70_001])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_values_that_are_set_again_give_the_same_codes_and_scales(name, numel):
    for moment in moments_of(name, numel).values():
        again = Quantised(torch.zeros_like(moment.codes), torch.zeros_like(moment.scales), moment.table)
        again.copy_(values_of(moment))
        assert torch.equal(again.codes, moment.codes)
        assert torch.equal(again.scales, moment.scales)


def test_control_without_the_minus_one_scales_shrink():
    """Some block has its largest value below zero, whose nearest code is -0.993."""
    moment = moments_of("sgd", 70_001)["momentum_buffer"]
    values = moment.table[moment.codes.int()] * moment.scales.repeat_interleave(BLOCK)[:70_001]
    again = Quantised(torch.zeros_like(moment.codes), torch.zeros_like(moment.scales), moment.table)
    again.copy_(values)
    assert (again.scales < 0.995 * moment.scales).any()


def test_a_part_has_the_values_of_the_whole_there_whatever_the_size_of_the_pieces():
    moment = moments_of("adamw", 3 * BLOCK)["exp_avg"]
    whole = values_of(moment)
    for first, last in ((0, 5), (250, 262), (300, 3 * BLOCK)):
        for size in (1, 100, 10_000):
            assert torch.equal(values_of(moment[first:last], size), whole[first:last])
    nested = moment[200:700][100:300]
    assert torch.equal(values_of(nested), whole[300:500])
    assert (nested.numel(), nested.element_size(), nested.dtype) == (200, 4, torch.float32)


def test_setting_rounds_to_the_nearest_code_with_the_scale_of_the_block():
    moment = moments_of("sgd", 2 * BLOCK)["momentum_buffer"]
    wanted = torch.cat([torch.linspace(-1, 1, BLOCK), torch.linspace(-50, 20, BLOCK)])
    moment.copy_(wanted)
    assert moment.scales.tolist() == [1, 50]
    steps = torch.tensor([1.0, 50.0]).repeat_interleave(BLOCK)
    nearest = (wanted[:, None] / steps[:, None] - moment.table).abs().amin(1) * steps
    as_the_library_reads_them = moment.table[moment.codes.int()] * steps
    assert ((as_the_library_reads_them - wanted).abs() <= nearest * (1 + 1e-4) + 1e-5).all()


def test_zeros_stay_zeros():
    moment = moments_of("adamw", BLOCK)["exp_avg"]
    assert moment.any()
    moment.copy_(torch.zeros(BLOCK))
    assert not moment.any()
    assert not values_of(moment).any()
    moment.copy_(torch.ones(BLOCK))
    moment.zero_()
    assert not values_of(moment).any()
