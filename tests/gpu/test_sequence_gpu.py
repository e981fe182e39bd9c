"""Long documents on GPUs: memory of MLPs in tiles, and packs shared over NCCL. Run on a GPU host: pytest tests/gpu"""

import numpy as np
import pytest
import torch

from sft.attention import choose_kernel, register
from sft.batch import build
from sft.model import load_model
from sft.tiled_mlp import tile_mlps
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

BF16_BAND = 2e-2
"""As in test_gpu.py."""
TOKENS = 16_384


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """MLPs 16 times as wide as the hidden states: 256 MiB for each of an MLP's activations of TOKENS tokens in bf16."""
    return tiny.make_model(
        tmp_path_factory.mktemp("wide") / "base", hidden_size=512, intermediate_size=8192, initializer_range=0.02,
        max_position_embeddings=TOKENS,
    )  # fmt: skip


def step(folder, tiles):
    """(peak bytes above what the model takes, loss, gradients) of a forward and backward."""
    device = torch.device("cuda")
    kernel = choose_kernel("auto", device, torch.bfloat16)
    model = load_model(str(folder), dtype=torch.bfloat16, attention=register(kernel), checkpointing=True, liger=False)
    model = model.to(device).train()
    if tiles > 1:
        tile_mlps(model.hf, tiles)
    ids = np.random.RandomState(0).randint(3, 259, TOKENS)
    batch = build([(ids, ids)], device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = model(batch)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    return peak, loss.item(), {name: weight.grad.float() for name, weight in model.named_parameters()}


def test_tiles_lower_the_peak_and_change_nothing(wide_model):
    whole_peak, whole_loss, whole = step(wide_model, 1)
    tiled_peak, tiled_loss, tiled = step(wide_model, 8)
    assert tiled_peak < 0.5 * whole_peak, (tiled_peak, whole_peak)
    assert tiled_loss == pytest.approx(whole_loss, rel=BF16_BAND)
    worst = max(float((tiled[name] - whole[name]).norm() / whole[name].norm()) for name in whole)
    assert worst < 5 * BF16_BAND, worst


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="sequence parallelism needs two GPUs")
@pytest.mark.parametrize("kernel", ["flash_attention_2", "varlen", "sdpa"])
def test_shared_packs_equal_whole_ones_with_every_kernel(wide_model, prepared, tmp_path, kernel):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    lines = {}
    for size in (1, 2):
        flags = {
            "model.path": wide_model, "data.train": prepared / "train", "out": tmp_path / str(size),
            "batch.rows_per_step": 4, "batch.sequence_parallel": size, "train.max_steps": 3, "optim.lr": 1e-4,
            "model.precision": "bf16", "model.attention": kernel, "track.wandb": "off", "deepspeed": "zero3",
        }  # fmt: skip
        arguments = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        done = tiny.run_module_on_gpu(2, "sft.train", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "isolation probe" in done.stdout
        lines[size] = tiny.read_jsonl(tmp_path / str(size) / "metrics.jsonl")
    for shared, whole in zip(lines[2], lines[1], strict=True):
        assert shared["loss"] == pytest.approx(whole["loss"], rel=BF16_BAND)
        assert shared["grad_norm"] == pytest.approx(whole["grad_norm"], rel=5 * BF16_BAND)
