"""Real training runs on CPU ranks, and a plain PyTorch reference of what they must equal."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data_prep.shards import open_shards
from sft.batch import split_documents
from sft.config import OptimSection, ScheduleSection
from sft.optim import parameter_groups
from sft.order import FILLER, step_rows
from sft.schedule import lr_at
from tests import tiny

SETTINGS = {
    "batch.rows_per_step": 8,
    "train.max_steps": 4,
    "optim.lr": 0.01,
    "optim.grad_clip": 1.0,
    "schedule.warmup": 0,
    "model.precision": "fp32",
    "track.wandb": "off",
}


def train(out: Path, model: Path, data: Path, strategy: Path, ranks: int, expect: int = 0, **options: object):
    """Run sft.train through the deepspeed launcher; returns the finished process."""
    settings = {**SETTINGS, "model.path": model, "data.train": data / "train", "deepspeed": strategy, "out": out}
    settings |= {name.replace("__", "."): value for name, value in options.items()}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = tiny.run_module(ranks, "sft.train", *flags)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    return tiny.read_jsonl(out / "metrics.jsonl")


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Exported parameters."""
    return dict(AutoModelForCausalLM.from_pretrained(out / "export").named_parameters())


def reference(model_path: Path, data: Path, steps: int = 4, rows_per_step: int = 8, mean_of_means: bool = False):
    """Plain single-process AdamW, one document at a time, in a loop that shares nothing with ours but order and lr.

    With `mean_of_means` the loss is averaged per row and then over rows, as several trainers do: the negative control.
    Returns (losses, gradient norms before clipping, parameters).
    """
    shards = open_shards(data / "train")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optim = OptimSection(lr=SETTINGS["optim.lr"])
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), optim), betas=optim.betas, eps=optim.eps)
    losses, norms = [], []
    for step in range(steps):
        rows = [row for row in step_rows(0, step, len(shards), rows_per_step) if row != FILLER]
        sums = torch.stack([_row_loss(model, shards.pack(int(row))) for row in rows])
        labels = torch.tensor([int(shards.num_labels[row]) for row in rows])
        loss = (sums / labels).mean() if mean_of_means else sums.sum() / labels.sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, steps, optim.lr, ScheduleSection(warmup=0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


def _row_loss(model, pack) -> torch.Tensor:
    total = torch.zeros(())
    for ids, labels in split_documents(pack):
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(labels.astype(np.int64))[1:]
        total = total + cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum")
    return total


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 difference over parameters."""
    assert one.keys() == other.keys()
    with torch.no_grad():
        return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)
