"""Checkpoints of versions that did not know today's options. Run: pytest tests/unit/test_older_checkpoints.py"""

from pathlib import Path

import pytest

from sft import inputs
from sft.checkpoint import publish
from sft.config import RunConfig, defaults
from sft.errors import UserError
from tests import saved

NEW = ("optim.name", "optim.states", "optim.layer_decay", "optim.multipliers", "optim.l2_sp", "train.ema_decay")


class Inputs:
    """Of a run that goes on to step 9."""

    last_step = 9


def own_identity(**options: object) -> dict[str, object]:
    """What a run compares: the options among it as sft.inputs.identity has them."""
    optim = {"optim.lr": 1.0e-5, "optim.name": "adamw", "optim.states": "fp32", "optim.layer_decay": 1.0}
    return {"data_key": "k", **optim, "optim.multipliers": [], "optim.l2_sp": 0.0, "train.ema_decay": None, **options}


@pytest.fixture
def older(tmp_path, monkeypatch):
    """find_resume of a run with these options, on a checkpoint from before the NEW ones."""
    identity = {key: value for key, value in own_identity().items() if key not in NEW}
    files = saved.write_files(tmp_path / "out" / "checkpoints", 3)
    publish(tmp_path / "out" / "checkpoints", 3, {**saved.meta(files), "identity": identity})
    config = RunConfig(model={"path": "m"}, data={"train": "d"}, out=str(tmp_path / "out"))

    def find(**options: object) -> Path | None:
        monkeypatch.setattr(inputs, "identity", lambda *_: own_identity(**options))
        return inputs.find_resume(config, Inputs())

    return find


def test_an_older_checkpoint_is_gone_on_from_with_what_it_did(older):
    assert older().name == "step-00000003"


@pytest.mark.parametrize(("key", "value"), [("optim.name", "lion"), ("train.ema_decay", 0.99), ("optim.lr", 2.0e-5)])
def test_and_with_nothing_else(older, key, value):
    with pytest.raises(UserError, match=rf"belongs to another run \({key}: was .*, now {value}\)"):
        older(**{key: value})


def test_every_option_of_a_run_s_identity_has_its_default():
    found = defaults(dict.fromkeys([*NEW, "data_key", "schedule.cycles", "model.attention_dropout"]))
    assert found == {
        "optim.name": "adamw", "optim.states": "fp32", "optim.layer_decay": 1.0, "optim.multipliers": [],
        "optim.l2_sp": 0.0, "train.ema_decay": None, "schedule.cycles": 1, "model.attention_dropout": None,
    }  # fmt: skip
