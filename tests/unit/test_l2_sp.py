"""The pull towards the base, by hand; on real ranks: test_optimizers. Run: pytest tests/unit/test_l2_sp.py"""

from types import SimpleNamespace

import pytest
import torch

from sft import l2_sp


def after_a_step(lr, strength):
    """Of a weight that is 3 at the base, 5 now, and whose gradient is 2, under plain SGD."""
    weight = torch.tensor([3.0])
    weight.grad = torch.tensor([2.0])
    inner = torch.optim.SGD([weight], lr=lr)
    l2_sp.attach(SimpleNamespace(fp32_partitioned_groups_flat=[weight], optimizer=inner), strength)
    weight.fill_(5.0)
    inner.step()
    return weight.item()


def test_by_hand():
    """Step to 5 - 0.1 x 2 = 4.8; pulled by 0.1 x 0.5 of the 1.8 that lie between it and the base."""
    assert after_a_step(0.1, 0.5) == pytest.approx(4.8 - 0.05 * 1.8)
    assert after_a_step(0.1, 0.0) == pytest.approx(4.8), "control"


def test_it_never_pulls_beyond_the_base():
    """The learning-rate finder goes far above the run's own rate."""
    assert after_a_step(1.0, 100.0) == 3.0
