"""Which parameters decay; optimizers by name and states. Run: pytest tests/unit/test_optim.py"""

import importlib.util

import pytest
import torch
from torch import nn

from sft import moments
from sft.config import OptimSection
from sft.errors import UserError
from sft.optim import LARGEST_BETA_BF16, MOMENTS_DTYPE, build_optimizer, check_optimizer, parameter_groups
from sft.retention import bytes_per_parameter


def names_by_decay(named, **options):
    groups = parameter_groups(named, OptimSection(weight_decay=0.1, **options))
    names = {id(parameter): name for name, parameter in named}
    return {group["weight_decay"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


NAMED = [
    ("hf.model.embed_tokens.weight", nn.Parameter(torch.zeros(4, 2))),
    ("hf.model.layers.0.self_attn.q_proj.weight", nn.Parameter(torch.zeros(2, 2))),
    ("hf.model.layers.0.self_attn.q_proj.bias", nn.Parameter(torch.zeros(2))),
    ("hf.model.norm.weight", nn.Parameter(torch.zeros(2))),
    ("hf.lm_head.weight", nn.Parameter(torch.zeros(4, 2))),
]


def test_matrices_decay_but_embeddings_norms_and_biases_do_not():
    decayed = names_by_decay(NAMED)
    assert decayed[0.1] == ["hf.lm_head.weight", "hf.model.layers.0.self_attn.q_proj.weight"]
    assert len(decayed[0.0]) == 3


def test_exemptions_are_the_users_but_vectors_never_decay():
    assert "hf.model.embed_tokens.weight" in names_by_decay(NAMED, no_decay=[])[0.1]
    assert names_by_decay(NAMED, no_decay=["weight"])[0.0] == sorted(name for name, _ in NAMED)


def test_partitioned_parameters_count_by_their_true_shape():
    """Under ZeRO-3 a matrix is stored flat and empty: by ndim nothing would decay."""
    flat = nn.Parameter(torch.zeros(0))
    flat.ds_shape = torch.Size([8, 4])
    assert names_by_decay([("w", flat)])[0.1] == ["w"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert parameter_groups([("w", frozen)], OptimSection()) == []
    assert len(parameter_groups([("w", nn.Parameter(torch.zeros(2, 2)))], OptimSection())) == 1


def test_the_optimizer_has_the_options():
    optim = OptimSection(lr=0.5, betas=(0.8, 0.9), eps=1e-5)
    built = build_optimizer(nn.Linear(2, 2), optim, on_cpu_beside_gpu=False)
    assert isinstance(built, torch.optim.AdamW)
    assert (built.defaults["lr"], built.defaults["betas"], built.defaults["eps"]) == (0.5, (0.8, 0.9), 1e-5)


def flat_update(optim: OptimSection, lazily: bool) -> list[torch.Tensor]:
    """A flat tensor after each of three steps; its state made by the library at its first step, or by us before."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 1, bias=False)
    built = build_optimizer(model, optim, on_cpu_beside_gpu=False)
    if not lazily:
        moments.make(built, model.weight, MOMENTS_DTYPE[optim.states])
        moments.set_step(built, model.weight, 0)
    seen = []
    for _ in range(3):
        model.weight.grad = torch.randn(1, 1000)
        built.step()
        seen.append(model.weight.detach().clone())
    return seen


NAMES = [
    *[(name, states) for name in ("adamw", "lion", "sgd") for states in ("fp32", "bf16")],
    ("adamw", "8bit"),
    ("sgd", "8bit"),
]


@pytest.mark.parametrize(("name", "states"), NAMES)
def test_states_made_before_the_first_step_are_the_librarys_own(name, states):
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    optim = OptimSection(name=name, states=states, lr=0.1)
    for lazy, made in zip(flat_update(optim, True), flat_update(optim, False), strict=True):
        assert torch.equal(lazy, made)


@pytest.mark.parametrize(("name", "states"), NAMES)
def test_an_update_is_elementwise(name, states):
    """What ZeRO relies on: a part of a parameter is updated as in the whole, with 8-bit states in whole blocks."""
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    torch.manual_seed(0)
    start, gradients = torch.randn(2048), torch.randn(3, 2048)

    def trained(part: slice) -> torch.Tensor:
        model = nn.Module()
        model.weight = nn.Parameter(start[part].clone())
        built = build_optimizer(model, OptimSection(name=name, states=states, lr=0.1), on_cpu_beside_gpu=False)
        for gradient in gradients:
            model.weight.grad = gradient[part].clone()
            built.step()
        return model.weight.detach()

    whole = trained(slice(None))
    assert torch.equal(torch.cat([trained(slice(0, 768)), trained(slice(768, None))]), whole)
    assert not torch.equal(whole, start)


def test_bf16_states_are_held_in_bf16_and_moved_in_fp32():
    """0.5 x 1 + 0.501 = 1.001 is 1 in bf16, and the update has seen the exact value."""
    model = nn.Linear(1, 1, bias=False)
    optim = OptimSection(name="sgd", states="bf16", betas=(0.5, 0), lr=1.0, weight_decay=0)
    built = build_optimizer(model, optim, on_cpu_beside_gpu=False)
    model.weight.data.zero_()
    for gradient in (1.0, 0.501):
        model.weight.grad = torch.full((1, 1), gradient)
        built.step()
    assert built.state[model.weight]["momentum_buffer"].dtype == torch.bfloat16
    assert built.state[model.weight]["momentum_buffer"].item() == 1.0
    assert model.weight.item() == pytest.approx(-1 - 1.001, abs=1e-6)


def second_moment(states: str, beta2: float) -> float:
    """After a loss spike: of 500 gradients of 1, and then 3000 of 0.01."""
    model = nn.Linear(1, 1, bias=False)
    built = build_optimizer(model, OptimSection(states=states, betas=(0.9, beta2)), on_cpu_beside_gpu=False)
    for gradient in [1.0] * 500 + [0.01] * 3000:
        model.weight.grad = torch.full((1, 1), gradient)
        built.step()
    return float(built.state[model.weight]["exp_avg_sq"])


def test_a_second_moment_in_bf16_falls_with_the_betas_that_are_taken():
    assert second_moment("bf16", 0.95) == pytest.approx(1e-4, rel=0.1)
    assert second_moment("bf16", LARGEST_BETA_BF16) == pytest.approx(1e-4, rel=0.5)
    assert second_moment("bf16", 0.999) > 0.2, "control: it would have stood still"
    assert second_moment("fp32", 0.999) == pytest.approx(0.0197, rel=0.1)


ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("optim", "zero", "elements", "said"),
    [
        ({"states": "bf16", "betas": (0.9, 0.999)}, {"stage": 3}, 10, "betas [0.9, 0.999] change a moment by less"),
        ({"name": "sgd", "states": "bf16", "betas": (0.995, 0)}, {"stage": 3}, 10, "use at most 0.99"),
        ({"name": "lion"}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}, 10, "goes with adamw and fp32 alone"),
        ({"states": "bf16"}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, 10, "optim.states bf16"),
        ({"states": "8bit"}, {"stage": 2}, 2**31, "takes 2,147,483,647; use zero3"),
        ({"states": "8bit"}, {"stage": 3, "sub_group_size": 2**32}, 2**31, "lays 2,147,483,648 elements"),
        ({"name": "lion", "states": "8bit"}, {"stage": 3}, 10, "the sign of its moment"),
        ({"name": "sgd", "states": "8bit", "betas": (0, 0.9)}, {"stage": 3}, 10, "without momentum"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(optim, zero, elements, said):
    with pytest.raises(UserError) as caught:
        check_optimizer(OptimSection(**optim), {"zero_optimization": zero}, elements)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_where_it_is_needed_and_only_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, states in NAMES:
        if name == "lion" or states == "8bit":
            with pytest.raises(UserError, match="needs bitsandbytes"):
                check_optimizer(OptimSection(name=name, states=states), ZERO3, 10)
        else:
            check_optimizer(OptimSection(name=name, states=states), ZERO3, 10)


def test_what_can_be_built_passes():
    pytest.importorskip("bitsandbytes", reason="the extra lowbit is not installed")
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    check_optimizer(OptimSection(), offload, 2**40)
    for name, states in NAMES:
        check_optimizer(OptimSection(name=name, states=states), ZERO3, 2**40)  # sub_group_size keeps tensors small


def test_bytes_of_a_checkpoint_by_optimizer():
    each = {pair: bytes_per_parameter(OptimSection(name=pair[0], states=pair[1]), None) for pair in NAMES}
    assert [each["adamw", states] for states in ("fp32", "bf16", "8bit")] == [12, 8, 12]
    assert [each["lion", states] for states in ("fp32", "bf16")] == [8, 6]
    assert bytes_per_parameter(OptimSection(), 0.999) == 16
