"""Every shipped strategy saves, resumes and equals plain PyTorch. Run: pytest tests/dist/test_strategies.py"""

import numpy as np
import pytest

from tests.dist.runs import Runs
from tests.dist.training import SETTINGS, largest_difference, reference, weights

pytestmark = pytest.mark.dist

CHAIN = ["zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all", "zero1"]


def test_a_run_that_changes_its_strategy_at_each_resume_equals_plain_pytorch(tmp_path, base_model, prepared):
    """Each reads what the one before it wrote, so every one has to load, train and save the same state."""
    options = {**SETTINGS, "model.path": base_model, "data.train": prepared / "train", "train.max_steps": len(CHAIN)}
    plan = []
    for done, name in enumerate(CHAIN, start=1):
        own = {"deepspeed": name, "train.stop_after": done}
        plan.append([{"name": f"{done}-{name}", "ranks": 2, "out": "run", "options": options | own, "patches": {}}])
    runs = Runs(tmp_path, plan)
    for (link,) in plan:
        runs.ended_with(link["name"], 0)
    losses, norms, parameters = reference(base_model, prepared, len(CHAIN))
    np.testing.assert_allclose(runs.column("run", "loss"), losses, rtol=1e-5)
    np.testing.assert_allclose(runs.column("run", "grad_norm"), norms, rtol=1e-5)
    assert largest_difference(weights(tmp_path / "run"), parameters) < 1e-4
