"""Learning rates by parameter, against values by hand. Run: pytest tests/unit/test_lr_groups.py"""

import pytest
import torch
from torch import nn

from sft.config import LrMultiplier, OptimSection
from sft.errors import UserError
from sft.lr_groups import check_names, check_starts, count_layers, factor_at, factors_of
from sft.optim import parameter_groups, set_rates

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
NAMES = [EMBEDDING, "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", NORM, HEAD]


def rate(name, step=1, total=100, **optim):
    return factor_at(step, total, factors_of(name, OptimSection(**optim), count_layers(NAMES)))


def test_nothing_asked_nothing_changed():
    assert [factors_of(name, OptimSection(), 2) for name in NAMES] == [()] * 5
    assert rate(HEAD) == 1.0


def test_layer_decay_by_hand():
    """Two layers, 0.5: head and norm 1, layer 1 a half, layer 0 a quarter, the embedding an eighth."""
    assert [rate(name, layer_decay=0.5) for name in NAMES] == [0.125, 0.25, 0.5, 1.0, 1.0]


def test_layers_are_counted_from_the_names():
    assert count_layers(NAMES) == 2
    assert count_layers(["transformer.h.0.weight"]) == 0
    assert count_layers(["model.layers.10.a", "model.layers.9.a"]) == 11


def test_multipliers_are_a_product():
    both = [LrMultiplier(match="mlp", factor=0.5), LrMultiplier(match=r"layers\.1\.", factor=0.1)]
    assert [rate(name, multipliers=both) for name in NAMES] == pytest.approx([1.0, 0.5, 0.05, 1.0, 1.0])
    assert rate(NAMES[1], layer_decay=0.5, multipliers=both) == pytest.approx(0.25 * 0.5)


def test_unfreezing_begins_after_its_start():
    frozen = [LrMultiplier(match="embed", start=0.3), LrMultiplier(match="lm_head", factor=2, start=5)]
    assert [rate(EMBEDDING, step, multipliers=frozen) for step in (1, 30, 31, 100)] == [0, 0, 1, 1]
    assert [rate(HEAD, step, multipliers=frozen) for step in (5, 6)] == [0, 2]
    assert rate(NORM, 1, multipliers=frozen) == 1


def test_groups_carry_their_own_rates():
    named = [(f"hf.{name}", nn.Parameter(torch.zeros(2, 2))) for name in NAMES]
    groups = parameter_groups(named, OptimSection(layer_decay=0.5, weight_decay=0.1))
    set_rates(groups, 1, 100, 8.0, None)
    by_rate = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert by_rate == {(1.0, 0.0): 1, (2.0, 0.1): 1, (4.0, 0.1): 1, (8.0, 0.1): 1, (8.0, 0.0): 1}


def test_names_are_those_of_transformers():
    """PackedCausalLM's own prefix must not be in the way of ^."""
    groups = parameter_groups(
        [("hf.lm_head.weight", nn.Parameter(torch.zeros(2, 2)))],
        OptimSection(multipliers=[LrMultiplier(match="^lm_head", factor=0.5)]),
    )
    assert groups[0]["lr_factors"] == ((0.5, 0.0),)


def test_an_expression_that_matches_nothing_is_refused(base_model):
    check_names(
        OptimSection(multipliers=[LrMultiplier(match="lm_head"), LrMultiplier(match="q_proj")]), str(base_model)
    )
    with pytest.raises(UserError, match=r"match 'lmhead' is found in no parameter .* names look like model\.layers"):
        check_names(OptimSection(multipliers=[LrMultiplier(match="lmhead")]), str(base_model))


@pytest.mark.parametrize(("start", "refused"), [(0.9, False), (9, False), (10, True), (500, True)])
def test_a_start_behind_the_end_is_refused(start, refused):
    optim = OptimSection(multipliers=[LrMultiplier(match="embed", start=start)])
    if not refused:
        check_starts(optim, 10)
        return
    with pytest.raises(UserError, match=rf"'embed' starts after step {start}, and the run has 10; lower start"):
        check_starts(optim, 10)


def test_layers_that_cannot_be_told_are_refused(monkeypatch):
    monkeypatch.setattr("sft.pretrained.parameter_names", lambda _: ["transformer.h.0.weight", "wte.weight"])
    with pytest.raises(UserError, match=r"optim.layer_decay 0.9: .* no layers in their names .*transformer.h.0.weight"):
        check_names(OptimSection(layer_decay=0.9), "model")
    check_names(OptimSection(), "model")


def test_what_is_no_expression_is_refused():
    with pytest.raises(ValueError, match="is no regular expression"):
        LrMultiplier(match="(")
    with pytest.raises(ValueError, match="whole number of steps"):
        LrMultiplier(match="a", start=1.5)
