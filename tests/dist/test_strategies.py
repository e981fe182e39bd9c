"""Every shipped strategy trains, resumes and equals plain PyTorch. Run: pytest tests/dist/test_strategies.py"""

import numpy as np
import pytest

from tests.dist.training import largest_difference, metrics, reference, train, weights

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all"])
def test_strategy_equals_plain_pytorch_through_a_resume(tmp_path, base_model, prepared, name):
    out = tmp_path / "run"
    train(out, base_model, prepared, name, 2, train__stop_after=2)
    train(out, base_model, prepared, name, 2)
    losses, norms, parameters = reference(base_model, prepared)
    np.testing.assert_allclose([line["loss"] for line in metrics(out)], losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in metrics(out)], norms, rtol=1e-5)
    assert largest_difference(weights(out), parameters) < 1e-4
