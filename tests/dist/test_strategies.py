"""Every shipped strategy saves, resumes and equals plain PyTorch. Run: pytest tests/dist/test_strategies.py"""

import numpy as np
import pytest

from tests.dist.training import largest_difference, metrics, reference, train, weights

pytestmark = pytest.mark.dist

CHAIN = ["zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all", "zero1"]


def test_a_run_that_changes_its_strategy_at_each_resume_equals_plain_pytorch(tmp_path, base_model, prepared):
    """Each reads what the one before it wrote, so every one has to load, train and save the same state."""
    out = tmp_path / "run"
    steps = len(CHAIN)
    for done, name in enumerate(CHAIN, start=1):
        train(out, base_model, prepared, name, 2, train__max_steps=steps, train__stop_after=done)
    losses, norms, parameters = reference(base_model, prepared, steps)
    np.testing.assert_allclose([line["loss"] for line in metrics(out)], losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in metrics(out)], norms, rtol=1e-5)
    assert largest_difference(weights(out), parameters) < 1e-4
