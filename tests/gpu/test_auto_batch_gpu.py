"""micro_batch auto with the memory of a real GPU. Run on a GPU host: pytest tests/gpu/test_auto_batch_gpu.py"""

import json

import pytest
import torch

from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

BF16_BAND = 2e-3
"""What atomic additions in backward leave between two runs of the same steps."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Wide enough that a pack takes tens of MiB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4}
    return tiny.make_model(tmp_path_factory.mktemp("gpu") / "base", **sizes)


def train(model_folder, prepared, out, micro_batch):
    options = {
        "model.path": model_folder, "data.train": prepared / "train", "out": out, "batch.rows_per_step": 8,
        "batch.micro_batch": micro_batch, "train.max_steps": 3, "optim.lr": 1e-3, "schedule.warmup": 0,
        "model.attention": "sdpa", "model.activation_checkpointing": "none", "track.wandb": "off",
    }  # fmt: skip
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = tiny.run_module_on_gpu(1, "sft.train", *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_found_fits_and_trains_the_same(model_folder, prepared, tmp_path):
    auto, given = tmp_path / "auto", tmp_path / "given"
    train(model_folder, prepared, auto, "auto")
    record = json.loads((auto / "micro_batch.json").read_text())
    trials = {trial["micro_batch"]: trial["peak_gib"] for trial in record["trials"]}
    assert set(trials) >= {0, 1}
    assert trials[record["micro_batch"]] > trials[1] > trials[0], "more packs take more memory"
    assert all(trial["peak_gib"] <= trial["limit_gib"] for trial in record["trials"])
    train(model_folder, prepared, given, record["micro_batch"])
    losses = [[line["loss"] for line in tiny.read_jsonl(out / "metrics.jsonl")] for out in (auto, given)]
    assert losses[0] == pytest.approx(losses[1], rel=BF16_BAND)


def test_expected_memory_is_close_to_what_is_taken(model_folder, prepared, tmp_path):
    """The line through two trials, against a third."""
    train(model_folder, prepared, tmp_path / "run", "auto")
    trials = json.loads((tmp_path / "run" / "micro_batch.json").read_text())["trials"]
    none, one, most = (trials[index]["peak_gib"] for index in (0, 1, -1))
    packs = trials[-1]["micro_batch"]
    assert most == pytest.approx(none + (one - none) * packs, rel=0.1)
