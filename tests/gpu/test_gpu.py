"""What only a GPU can show. Run on a GPU host: pytest tests/gpu"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sft.attention import choose_kernel, register
from sft.batch import build
from sft.config import DataSection, ModelSection, RunConfig
from sft.errors import UserError
from sft.model import load_model
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

BF16_BAND = 2e-2
"""Relative difference that bf16 leaves between two ways of computing the same thing: a few of its 2^-8 steps."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Head size 32: FlashAttention takes multiples of 8."""
    return tiny.make_model(tmp_path_factory.mktemp("gpu") / "base", hidden_size=128, intermediate_size=256)


def documents(lengths=(200, 31, 77, 5, 120)):
    random = np.random.RandomState(0)
    made = []
    for length in lengths:
        ids = random.randint(3, 259, length)
        labels = ids.copy()
        labels[: length // 3] = -100
        made.append((ids, labels))
    return made


def usable_kernels():
    usable = []
    for name in ("flash_attention_2", "varlen", "sdpa"):
        try:
            usable.append(choose_kernel(name, torch.device("cuda"), torch.bfloat16))
        except UserError:
            continue
    return usable


def loss_and_gradients(folder, kernel, dtype):
    device = torch.device("cuda")
    model = load_model(str(folder), dtype=dtype, attention=register(kernel), checkpointing=True, liger=False)
    model = model.to(device).train()
    loss, _ = model(build(documents(), device))
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.hf.named_parameters()}


def relative(one, other):
    return float((one - other).norm() / other.norm())


def test_attention_kernels_agree_on_packs(model_folder):
    kernels = usable_kernels()
    assert len(kernels) > 1, f"only {kernels} can run here: nothing to compare"
    reference_loss, reference = loss_and_gradients(model_folder, "sdpa", torch.float32)
    for kernel in kernels:
        loss, gradients = loss_and_gradients(model_folder, kernel, torch.bfloat16)
        assert abs(loss - reference_loss) / reference_loss < BF16_BAND, kernel
        worst = max(relative(gradients[name], reference[name]) for name in reference)
        assert worst < 10 * BF16_BAND, (kernel, worst)


def test_control_joined_documents_differ(model_folder):
    device = torch.device("cuda")
    kernel = usable_kernels()[0]
    model = load_model(
        str(model_folder), dtype=torch.bfloat16, attention=register(kernel), checkpointing=False, liger=False
    ).to(device)
    joined = [tuple(np.concatenate(part) for part in zip(*documents(), strict=True))]
    with torch.no_grad():
        packed = model(build(documents(), device), ask="hidden").float()
        leaking = model(build(joined, device), ask="hidden").float()
    assert relative(leaking, packed) > 5 * BF16_BAND


def test_a_bf16_zero3_step_equals_a_plain_bf16_step(model_folder, prepared, tmp_path):
    """One launched ZeRO-3 step on one GPU against plain PyTorch in bf16, within the band."""
    from data_prep.shards import open_shards
    from sft import batch
    from sft.order import step_rows

    out = tmp_path / "run"
    flags = {
        "model.path": model_folder, "data.train": prepared / "train", "out": out, "batch.rows_per_step": 4,
        "train.max_steps": 1, "model.precision": "bf16", "track.wandb": "off", "deepspeed": "zero3",
    }  # fmt: skip
    done = tiny.run_module_on_gpu(
        1, "sft.train", *[text for key, value in flags.items() for text in (f"--{key}", str(value))]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "isolation probe" in done.stdout
    line = tiny.read_jsonl(out / "metrics.jsonl")[0]

    device = torch.device("cuda")
    shards = open_shards(prepared / "train")
    rows = step_rows(0, 0, len(shards), 4)
    model = load_model(
        str(model_folder), dtype=torch.bfloat16, attention=register("sdpa"), checkpointing=False, liger=False
    ).to(device)
    total, labels = 0.0, batch.num_labels(shards, rows)
    for row in rows:
        built = batch.from_shards(shards, np.array([row]), device)
        hidden_TE = model(built, ask="hidden")
        logits_NV = (hidden_TE[built.predict_N] @ model.hf.lm_head.weight.T).float()
        loss = cross_entropy(logits_NV, built.targets_N, reduction="sum") / labels
        loss.backward()
        total += loss.item()
    norm = torch.stack([parameter.grad.float().norm() for parameter in model.parameters()]).norm().item()
    assert line["loss"] == pytest.approx(total, rel=BF16_BAND)
    assert line["grad_norm"] == pytest.approx(norm, rel=5 * BF16_BAND)


def test_liger_kernels_agree_with_torch(model_folder):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    import importlib

    from transformers.models.llama import modeling_llama

    device = torch.device("cuda")
    losses = []
    for liger in (False, True):
        model = load_model(
            str(model_folder), dtype=torch.bfloat16, attention=register("sdpa"), checkpointing=False, liger=liger
        ).to(device)
        losses.append(model(build(documents(), device))[0].item())
    importlib.reload(modeling_llama)  # liger replaces classes of the module
    assert losses[1] == pytest.approx(losses[0], rel=BF16_BAND)


def test_rotary_frequencies_stay_fp32(model_folder, prepared, monkeypatch):
    from sft.engine import build_engine, choose_numerics, join, read_strategy
    from sft.ports import free_port
    from sft.rendezvous import meet

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(
        model=ModelSection(path=str(model_folder)), data=DataSection(train=str(prepared / "train")), out="unused"
    )
    numerics = choose_numerics(config, join(meet(60.0)), "llama")
    assert numerics.dtype == torch.bfloat16
    engine = build_engine(config, read_strategy("zero3"), numerics)
    frequencies = [buffer for name, buffer in engine.module.named_buffers() if "inv_freq" in name]
    assert frequencies
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)
    torch.distributed.destroy_process_group()
