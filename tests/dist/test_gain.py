"""Held-out loss and answers on two ranks are those of one, with the model on each rank and spread over both.

Run: pytest tests/dist/test_gain.py
"""

import json

import pytest
import torch

from sft.eval.ranks import Ranks
from tests import tiny
from tests.dist import forked
from tests.dist.gain_worker import PROMPTS, measure

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def test_two_ranks_give_what_one_gives(prepared, tmp_path):
    # wide enough that ZeRO-3 spreads its matrices: it keeps those below 100,000 elements on each rank
    model = str(tiny.make_model(tmp_path / "model", hidden_size=320, intermediate_size=320, initializer_range=0.1))
    shards = str(prepared / "heldout")
    done = forked.run_ranks(2, "tests.dist.gain_worker", model, shards, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    alone = measure(model, shards, "replicas", Ranks(0, 1, torch.device("cpu")))
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"replicas-0", "replicas-1", "zero3-0", "zero3-1"}
    for name, facts in found.items():
        assert facts["losses"] == pytest.approx(alone["losses"], rel=1e-6), name
    assert len(set(alone["answers"])) > len(PROMPTS) // 2, "answers that are all alike would prove nothing"
    assert (
        found["replicas-0"]["answers"] == found["zero3-0"]["answers"] == found["zero3-1"]["answers"] == alone["answers"]
    )
    assert found["replicas-1"]["answers"] == []
