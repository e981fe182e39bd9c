"""Memory and MFU of a step on a GPU. Run: pytest tests/gpu/test_metrics_gpu.py"""

import pytest
import torch

from sft.metrics import gpu_model
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_memory_and_mfu_of_a_step(prepared, tmp_path):
    model = tiny.make_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    out = tmp_path / "run"
    flags = {
        "model.path": model, "data.train": prepared / "train", "out": out, "batch.rows_per_step": 4,
        "train.max_steps": 2, "track.wandb": "off", "deepspeed": "zero3",
    }  # fmt: skip
    done = tiny.run_module_on_gpu(
        1, "sft.train", *[text for key, value in flags.items() for text in (f"--{key}", str(value))]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = tiny.read_jsonl(out / "metrics.jsonl")
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert 0 < first["peak_mem_gib"] <= second["peak_mem_gib"] < total_gib
    known = gpu_model(torch.cuda.get_device_name(0)) is not None
    assert (second["mfu"] is not None) == known
    assert not known or 0 < second["mfu"] < 1
