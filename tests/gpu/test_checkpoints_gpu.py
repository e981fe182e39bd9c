"""Saving beside training on a GPU: pinned copies on a stream of their own. Run on a GPU host: pytest tests/gpu"""

import signal
import subprocess
import sys
import time

import pytest
import torch

from sft.checkpoint import check_undamaged, list_checkpoints
from sft.errors import EXIT_PREEMPTED
from sft.ports import free_port
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

BF16_BAND = 2e-3
"""What atomic additions in backward leave between two runs of the same steps."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Large enough (11M parameters) that a copy takes longer than a launch."""
    return tiny.make_model(tmp_path_factory.mktemp("gpu") / "base", hidden_size=512, intermediate_size=2048)


def flags(model_folder, prepared, out, **more):
    options = {
        "model.path": model_folder, "data.train": prepared / "train", "out": out, "batch.rows_per_step": 4,
        "train.max_steps": 6, "optim.lr": 1e-3, "schedule.warmup": 0, "model.attention": "sdpa",
        "checkpoint.every": 1, "checkpoint.keep_last": 10, "track.wandb": "off", "deepspeed": "zero3", **more,
    }  # fmt: skip
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def losses(out):
    return [line["loss"] for line in tiny.read_jsonl(out / "metrics.jsonl")]


def run(*arguments):
    done = tiny.run_module_on_gpu(1, "sft.train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_save_holds_the_state_of_its_step(model_folder, prepared, tmp_path):
    """A copy that raced with the update would go on from a later state."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*flags(model_folder, prepared, whole))
    for stop in (2, 4, 6):
        run(*flags(model_folder, prepared, parts, **{"train.stop_after": stop}))
    assert losses(parts) == pytest.approx(losses(whole), rel=BF16_BAND)
    for saved in list_checkpoints(whole / "checkpoints"):
        check_undamaged(saved)
    assert abs(losses(whole)[2] - losses(whole)[1]) / losses(whole)[1] > BF16_BAND, "control: a step later shows"


def test_a_signal_saves_and_leaves_with_75(model_folder, prepared, tmp_path):
    out = tmp_path / "run"
    arguments = flags(model_folder, prepared, out, **{"train.max_steps": 100_000, "checkpoint.every": 1000})
    environment = {**tiny.gpu_environment(), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "sft.train", *arguments], env=environment)
    deadline_s = time.monotonic() + 200
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == EXIT_PREEMPTED
    (saved,) = list_checkpoints(out / "checkpoints")
    check_undamaged(saved)
    assert int(saved.name.removeprefix("step-")) == len(losses(out)) > 0
