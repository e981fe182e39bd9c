"""Samples on a GPU. Run on a GPU host: pytest tests/gpu/test_sampling_gpu.py"""

import json

import pytest
import torch

from tests import tiny
from tests.sampled import LONGEST, ROWS, answers, make_readable_model, plain_answers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_answers_equal_transformers_in_fp32_and_come_in_bf16_too(prepared, tmp_path):
    """In bf16 two tokens may be equally likely to the last bit, so that answers differ."""
    model = make_readable_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(ROWS))
    for precision in ("fp32", "bf16"):
        options = {
            "model.path": model, "data.train": prepared / "train", "out": tmp_path / precision, "deepspeed": "zero3",
            "batch.rows_per_step": 4, "train.max_steps": 2, "model.precision": precision, "track.wandb": "off",
            "eval.samples.prompts": prompts, "eval.samples.max_new_tokens": LONGEST,
        }  # fmt: skip
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        done = tiny.run_module_on_gpu(1, "sft.train", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert answers(tmp_path / "fp32", 0) == plain_answers(model)
    assert answers(tmp_path / "fp32", 2) == plain_answers(tmp_path / "fp32" / "export")
    assert [len(answers(tmp_path / "bf16", step)) for step in (0, 2)] == [len(ROWS)] * 2
