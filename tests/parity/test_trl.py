"""Shards in other hands: `datasets` loads them and a stock TRL SFTTrainer trains on them, with our labels."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.shards import COLUMNS, Pack, open_shards
from tests.tiny import run

pytestmark = pytest.mark.parity
TOLERANCE = 2e-6
"""Relative: a few roundings of fp32. A random model's losses on right and wrong labels may differ as little as 3e-5."""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory, base_model: Path, prepared: Path) -> dict[str, Any]:
    pytest.importorskip("trl", reason="TRL is not installed (pip install .[dev], Python 3.11 or newer)")
    out = tmp_path_factory.mktemp("trl") / "answer.json"
    script = Path(__file__).with_name("trl_steps.py")
    done = run([sys.executable, str(script), str(base_model), str(prepared / "train"), str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def first_pack(answer: dict[str, Any], prepared: Path) -> Pack:
    """The pack of TRL's first step, as our own reader has it."""
    [ids] = answer["batches"][0]["input_ids"]
    shards = open_shards(prepared / "train")
    [found] = [pack for pack in map(shards.pack, range(len(shards))) if pack.input_ids.tolist() == ids]
    return found


def masked_loss(model: Path, pack: Pack, labels: list[int]) -> float:
    """Mean cross-entropy of the targets of one pack under the plain causal mask, which is what stock TRL applies."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = network(input_ids=torch.from_numpy(pack.input_ids.astype("int64"))[None]).logits[0]
    log_probs_TV = logits_TV.double().log_softmax(-1)
    losses = [-float(log_probs_TV[at - 1, label]) for at, label in enumerate(labels) if at and label != -100]
    return sum(losses) / len(losses)


def test_datasets_loads_every_pack(prepared: Path) -> None:
    from datasets import load_from_disk

    for split in ("train", "heldout"):
        shards, loaded = open_shards(prepared / split), load_from_disk(prepared / split)
        assert tuple(loaded.column_names) == COLUMNS
        assert len(loaded) == len(shards)
        for index, row in enumerate(loaded):
            pack = shards.pack(index)
            assert row["num_labels"] == pack.num_labels
            for name in ("input_ids", "labels", "seq_lens", "doc_ids", "source_ids"):
                assert row[name] == getattr(pack, name).tolist()


def test_trl_trains_without_conversion(answer: dict[str, Any]) -> None:
    assert tuple(answer["columns"]) == COLUMNS
    assert answer["packs"] > 2
    assert len(answer["losses"]) == 2
    assert answer["moved"] > 0


def test_trl_uses_our_labels(answer: dict[str, Any], first_pack: Pack, base_model: Path) -> None:
    [labels] = answer["batches"][0]["labels"]
    assert labels == first_pack.labels.tolist()
    assert -100 in labels
    assert answer["losses"][0] == pytest.approx(masked_loss(base_model, first_pack, labels), rel=TOLERANCE)


def test_control_other_labels_give_another_loss(answer: dict[str, Any], first_pack: Pack, base_model: Path) -> None:
    labels = first_pack.labels.tolist()
    for wrong in ([-100, *labels[:-1]], first_pack.input_ids.tolist()):
        assert answer["losses"][0] != pytest.approx(masked_loss(base_model, first_pack, wrong), rel=TOLERANCE)
