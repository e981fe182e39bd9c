"""Real training runs on CPU ranks, and a plain PyTorch reference of what they must equal."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data_prep.shards import Pack, Shards, open_shards
from sft.batch import IGNORE, split_documents
from sft.config import OptimSection, ScheduleSection
from sft.optim import parameter_groups
from sft.order import FILLER, step_rows
from sft.schedule import lr_at
from tests import tiny
from tests.dist import forked

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
    """Run sft.train on real ranks; returns the finished process."""
    settings = {**SETTINGS, "model.path": model, "data.train": data / "train", "deepspeed": strategy, "out": out}
    settings |= {name.replace("__", "."): value for name, value in options.items()}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = forked.run_ranks(ranks, "sft.train", *flags)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    return tiny.read_jsonl(out / "metrics.jsonl")


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Exported parameters."""
    return dict(AutoModelForCausalLM.from_pretrained(out / "export").named_parameters())


Mistake = Literal[
    "mean of means", "divided by accumulation", "everything decayed", "lost micro-batch", "leaking packs",
    "empty step taken",
]  # fmt: skip
"""What other trainers were seen to do; a comparison with `reference` must notice each of them."""

DEFAULT_OPTIM = OptimSection(lr=SETTINGS["optim.lr"])
NO_CLIPPING = float("inf")


def reference(
    model_path: Path,
    data: Path,
    steps: int = 4,
    rows_per_step: int = 8,
    optim: OptimSection = DEFAULT_OPTIM,
    mistake: Mistake | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float | None], list[float | None], dict[str, torch.Tensor]]:
    """Plain single-process AdamW, one document at a time, in a loop that shares nothing with ours but order and lr.

    `dtype` is that of weights, gradients and moments alike: no master weights. Losses are computed in fp32.
    Returns (losses, gradient norms before clipping, parameters); None for a step without labels, which is not taken.
    """
    shards = open_shards(data / "train")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    groups = parameter_groups(model.named_parameters(), optim)
    if mistake == "everything decayed":
        groups = [{**group, "weight_decay": optim.weight_decay} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    losses: list[float | None] = []
    norms: list[float | None] = []
    for step in range(steps):
        rows = [int(row) for row in step_rows(0, step, len(shards), rows_per_step) if row != FILLER]
        has_labels = shards.num_labels[rows].any()
        if not has_labels and mistake != "empty step taken":
            losses.append(None)
            norms.append(None)
            continue
        loss = _step_loss(model, shards, rows, mistake) if has_labels else 0.0 * _row_loss(model, shards.pack(rows[0]))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or NO_CLIPPING)))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, steps, optim.lr, ScheduleSection(warmup=0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: weight.detach() for name, weight in model.named_parameters()}


def _step_loss(model: torch.nn.Module, shards: Shards, rows: list[int], mistake: Mistake | None) -> torch.Tensor:
    """Sum of token losses / labels, over all rows; rows stand for micro-batches in the mistakes."""
    labels = torch.from_numpy(shards.num_labels[rows])
    taken = rows[:-1] if mistake == "lost micro-batch" else rows
    sums = torch.stack([_row_loss(model, shards.pack(row), leaking=mistake == "leaking packs") for row in taken])
    if mistake == "mean of means":
        return (sums / labels.clamp(min=1)).mean()
    return sums.sum() / labels.sum() / (len(rows) if mistake == "divided by accumulation" else 1)


def _row_loss(model: torch.nn.Module, pack: Pack, *, leaking: bool = False) -> torch.Tensor:
    """Summed token losses of a row. Leaking: its documents are read as one, though none predicts into the next."""
    documents = split_documents(pack)
    if leaking:
        unsupervised_start = [np.concatenate([[IGNORE], labels[1:]]) for _, labels in documents]
        documents = [(pack.input_ids, np.concatenate(unsupervised_start))]
    total = torch.zeros(())
    for ids, labels in documents:
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()
        targets = torch.from_numpy(labels.astype(np.int64))[1:]
        total = total + cross_entropy(logits[:-1], targets, ignore_index=IGNORE, reduction="sum")
    return total


def largest_relative(measured: list[float | None], expected: list[float | None]) -> float:
    """Largest relative difference; a step that was taken on one side alone is infinitely far off."""
    assert len(measured) == len(expected)
    pairs = [pair for pair in zip(measured, expected, strict=True) if pair != (None, None)]
    if any(None in pair for pair in pairs):
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in pairs)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 difference over parameters."""
    assert one.keys() == other.keys()
    with torch.no_grad():
        return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


def largest_share_of_change(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> float:
    """Largest L2 difference over parameters, relative to what training changed in that parameter of `other`."""
    return max(float((one[name] - other[name]).norm() / (other[name] - base[name]).norm()) for name in other)


def run_cases(folder: Path, ranks: int, cases: list[dict[str, Any]], timeout_s: int = 280) -> dict[str, "Trained"]:
    """Train every case of tests.dist.contract_worker on `ranks` real ranks, in one launch; by name."""
    out = folder / f"trained-on-{ranks}"
    out.mkdir()
    plan = out / "plan.json"
    plan.write_text(json.dumps(cases))
    done = forked.run_ranks(ranks, "tests.dist.contract_worker", str(plan), str(out), timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return {case["name"]: Trained(out / case["name"]) for case in cases}


class Trained:
    """What a case of contract_worker came to."""

    def __init__(self, path: Path) -> None:
        told = json.loads(path.with_suffix(".json").read_text())
        self.losses: list[float | None] = told["losses"]
        self.norms: list[float | None] = told["norms"]
        self.data_types: list[str] = told["data_types"]
        self.rotary: dict[str, tuple[str, list[float]]] = told["rotary"]
        tensors = load_file(path.with_suffix(".safetensors"))
        self.weights = {name: tensor for name, tensor in tensors.items() if "|" not in name}
        self.first_moments = {
            name.removeprefix("exp_avg|"): tensor for name, tensor in tensors.items() if name.startswith("exp_avg|")
        }
