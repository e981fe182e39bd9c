"""Loss and token share by data source equal plain transformers, one document at a time, on real ranks.

Run: pytest tests/dist/test_sources.py
"""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data_prep.shards import open_shards
from sft.batch import split_documents
from sft.order import FILLER, step_rows
from tests.dist.runs import Runs
from tests.dist.training import SETTINGS

pytestmark = pytest.mark.dist

ROWS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory, base_model):
    """Packs of three sources of very unequal answers."""
    from data_prep.build import main

    folder = tmp_path_factory.mktemp("sources")
    answers = {"short": "yes", "long": "a b c d e f g h " * 8, "digits": "0123456789"}
    for name, answer in answers.items():
        rows = [{"instruction": f"{name} {row}", "output": answer} for row in range(15)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    sources = ",".join(str(folder / f"{name}.json") for name in answers)
    main(["--sources", sources, "--tokenizer", str(base_model), "--seq_len", "512", "--workers", "1",
          "--dedup", "none", "--out", str(folder / "out")])  # fmt: skip
    return folder / "out"


def expected(model_path, shards, step):
    """By source: (sum of losses, labels, tokens) of a step."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    sums = {source["name"]: np.zeros(3) for source in shards.manifest["sources"]}
    names = list(sums)
    for row in step_rows(0, step, len(shards), ROWS):
        if row == FILLER:
            continue
        pack = shards.pack(int(row))
        for (ids, labels), source in zip(split_documents(pack), pack.source_ids, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
            targets = torch.from_numpy(labels.astype(np.int64))[1:]
            loss = cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum")
            sums[names[source]] += [float(loss), int((targets != -100).sum()), len(ids)]
    return sums


def test_loss_and_share_by_source(tmp_path, base_model, strategy, shards):
    options = {**SETTINGS, "model.path": base_model, "data.train": shards / "train", "deepspeed": strategy,
               "batch.rows_per_step": ROWS, "train.max_steps": 2}  # fmt: skip
    runs = Runs(tmp_path, [[{"name": "run", "ranks": 2, "options": options, "patches": {}}]])
    runs.ended_with("run", 0)
    sums = expected(base_model, open_shards(shards / "train"), step=0)
    losses, shares = runs.column("run", "loss_by_source")[0], runs.column("run", "token_share_by_source")[0]
    assert losses == pytest.approx({name: loss / labels for name, (loss, labels, _) in sums.items()}, rel=1e-5)
    all_tokens = sum(tokens for _, _, tokens in sums.values())
    assert shares == pytest.approx({name: tokens / all_tokens for name, (_, _, tokens) in sums.items()})
    whole = sum(loss for loss, _, _ in sums.values()) / sum(labels for _, labels, _ in sums.values())
    assert runs.column("run", "loss")[0] == pytest.approx(whole, rel=1e-5)
    assert len(set(np.round(list(losses.values()), 2))) == 3, "control: the sources differ"
