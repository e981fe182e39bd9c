"""The golden trajectory: 20 steps of a tiny Llama on 2 ranks, ZeRO-3, fp32, against what was committed.

Weights and data come from numpy's RandomState, whose stream never changes (NEP 19), so that what differs is ours or
that of the libraries in the stamp.
"""

import json
import platform
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.dist import contract_data
from tests.dist.training import Trained, run_cases

FILE = Path(__file__).with_name("trajectory.json")
STEPS = 20
RANKS = 2

LARGEST = 1e-5
"""Relative difference of one loss or gradient norm at most. Other vector units (AVX-512, AVX2, none) made 3e-7."""
MEAN = 2e-6
"""Mean relative difference over all losses and norms at most; between vector units it was 6e-8."""

OPTIONS: dict[str, Any] = {
    "model.precision": "fp32",
    "batch.rows_per_step": 8,
    "batch.micro_batch": 2,
    "train.max_steps": STEPS,
    "optim.lr": 3e-3,
    "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0,
    "schedule.warmup": 3,
    "track.wandb": "off",
}


def make_inputs(folder: Path) -> dict[str, Any]:
    """Model, shards and strategy below `folder`; returns the options of the run."""
    model = tiny.make_model(folder / "model")
    random = np.random.RandomState(20)
    shapes = {name: tensor.shape for name, tensor in sorted(load_file(model / "model.safetensors").items())}
    drawn = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights = {name: torch.from_numpy(0.2 * drawn[name] + (len(shape) == 1)) for name, shape in shapes.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    documents = contract_data.make_documents(STEPS)
    contract_data.write(folder / "data", documents, contract_data.in_rows(documents, 2), model)
    strategy = tiny.make_strategy(folder / "zero3.json")
    return {"model.path": str(model), "data.train": str(folder / "data" / "train"), "deepspeed": str(strategy)}


def train(folder: Path, changed: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    """Real training: the trajectory itself as "golden", and one run per name with changed options, in one launch."""
    made = make_inputs(folder)
    cases = [
        {"name": name, "steps": STEPS, "options": {**made, **OPTIONS, **changes}}
        for name, changes in {"golden": {}, **changed}.items()
    ]
    return run_cases(folder, RANKS, cases)


def record(trained: Trained) -> dict[str, Any]:
    """What is committed."""
    return {"stamp": stamp(), "losses": trained.losses, "grad_norms": trained.norms}


def stamp() -> dict[str, str]:
    """What the last digits depend on. Every rank runs one thread."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": tiny.rank_environment()["OMP_NUM_THREADS"],
    }


def differences(trained: Trained, golden: dict[str, Any]) -> tuple[float, float]:
    """(largest, mean) relative difference over losses and gradient norms."""
    measured = np.array([trained.losses, trained.norms], dtype=np.float64)
    expected = np.array([golden["losses"], golden["grad_norms"]], dtype=np.float64)
    relative = np.abs(measured - expected) / np.abs(expected)
    return float(relative.max()), float(relative.mean())


def verdict(trained: Trained, golden: dict[str, Any]) -> str | None:
    """None where the run is the golden one; else one line: by how much it differs, and how the environment does."""
    largest, mean = differences(trained, golden)
    if largest <= LARGEST and mean <= MEAN:
        return None
    line = f"largest relative difference {largest:.1e} (limit {LARGEST:.0e}), mean {mean:.1e} (limit {MEAN:.0e})"
    if changes := stamp_changes(golden["stamp"]):
        return f"{line}; recorded with another environment: {changes}"
    return f"{line}; recorded with this environment: the training changed"


def stamp_changes(recorded: dict[str, str]) -> str:
    """What of the environment is not as it was recorded, or nothing."""
    return "; ".join(
        f"{key} was {recorded.get(key)}, is {now}" for key, now in stamp().items() if recorded.get(key) != now
    )


def read() -> dict[str, Any]:
    """The committed trajectory."""
    return json.loads(FILE.read_text())
