"""Started by test_constants.py: models with frozen parameters, persistent buffers and parameters of 1 and 3 elements
are saved on 2 ranks, and loaded on 1 and on 4 over a base model in which what is not trained is different.

    constants_worker FOLDER DATA

Ranks are forked, so that imports are paid for once. FOLDER/<case>/saved and FOLDER/<case>/on-<ranks> are run folders,
with a checkpoint of what was trained and of what was loaded. What each rank computes with goes beside its checkpoint:
before-<rank>.safetensors and after-<rank>.safetensors, parameters (whole) and buffers by transformers' names.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

import sft.engine
from sft import resume
from sft.checkpoint import newest_complete
from sft.config import RunConfig
from sft.engine import choose_numerics, join
from sft.errors import run_rank
from sft.inputs import open_inputs
from sft.metrics import Recorder
from sft.model import PackedCausalLM
from sft.ports import free_port
from sft.preemption import StopRequest
from sft.rendezvous import meet
from sft.settings import load
from sft.signals import Inbox
from sft.step import Run, train_step
from sft.training import start_up, watch_over
from tests import tiny
from tests.dist.forked import set_rank
from tests.dist.training import SETTINGS

CASES = {"zero3-fp32": (3, "fp32"), "zero2-fp32": (2, "fp32"), "zero3-bf16": (3, "bf16"), "zero2-bf16": (2, "bf16")}
SAVED_ON, LOADED_ON = 2, (1, 4)
STEPS = 2
FROZEN = ("model.embed_tokens.", "model.layers.0.input_layernorm.")
BUFFERS = ("seen", "center")


class Norm(modeling_llama.LlamaRMSNorm):
    """Llama's, with parameters smaller than the number of ranks, and buffers that training changes."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.tilt = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("center", torch.ones(5))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 3
            self.center *= 0.5
        return super().forward(hidden_states) * self.gain + self.tilt.mean()


def make_bases(folder: Path) -> None:
    """<folder>/base, and <folder>/changed with other values of what is not trained."""
    for name in ("base", "changed"):
        tiny.make_model(folder / name)
    path = folder / "changed" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.startswith(FROZEN) or name.endswith(BUFFERS):
            tensors[name] = 2 * tensor + name.endswith((*BUFFERS, "tilt"))  # those begin with zeros
    save_file(tensors, path, metadata={"format": "pt"})


def main(argv: list[str]) -> None:
    """Fork the ranks of every case: first those that save, then those that load."""
    modeling_llama.LlamaRMSNorm = Norm
    freeze_on_load()
    folder, data = map(Path, argv)
    make_bases(folder)
    for stage in (2, 3):
        tiny.make_strategy(folder / f"zero{stage}.json", stage)
    fork_all([(case, SAVED_ON, True) for case in CASES], folder, data)
    fork_all([(case, ranks, False) for case in CASES for ranks in LOADED_ON], folder, data)


def freeze_on_load() -> None:
    """There is no option for it: what names a parameter in FROZEN is not trained."""
    original = sft.engine._load

    def load_frozen(*arguments: Any) -> PackedCausalLM:
        model = original(*arguments)
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        return model

    sft.engine._load = load_frozen


def fork_all(runs: list[tuple[str, int, bool]], folder: Path, data: Path) -> None:
    """All ranks of all runs at once; an error of any ends this process with 1."""
    pids = []
    for case, world_size, is_first in runs:
        port = free_port()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                set_rank(rank, world_size, port)
                run_rank(lambda _, case=case, is_first=is_first: run_case(case, folder, data, is_first))
            pids.append(pid)
    if any([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]):
        sys.exit(1)


def run_case(case: str, folder: Path, data: Path, is_first: bool) -> None:
    """Train and save; or load over the changed base, and save."""
    stage, precision = CASES[case]
    name = "saved" if is_first else f"on-{os.environ['WORLD_SIZE']}"
    options = {
        **SETTINGS, "model.path": folder / ("base" if is_first else "changed"), "model.precision": precision,
        "data.train": data / "train", "deepspeed": folder / f"zero{stage}.json", "train.max_steps": STEPS,
        "out": folder / case / name,
    }  # fmt: skip
    config = load(RunConfig, [text for key, value in options.items() for text in (f"--{key}", str(value))], prog=case)
    inputs = open_inputs(config, int(os.environ["WORLD_SIZE"]))
    meeting = meet(60.0)
    numerics = choose_numerics(config, join(meeting), {})
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with Recorder(config, out, False, STEPS) as recorder:
        watch = watch_over(meeting, config, out, recorder)  # not started: the test has a time limit
        run = start_up(config, inputs, numerics, out, recorder, watch, StopRequest(Inbox(), None))
        write_live(run, "before")
        if is_first:
            for step in range(STEPS):
                train_step(run, step)
        else:
            resume.load(run.engine, newest_complete(folder / case / "saved" / "checkpoints"))
        run.saver.begin(STEPS, None)
        run.saver.finish()
        write_live(run, "after")
        run.saver.wait_for_deletions()
        run.stop.close()
    dist.barrier()


def write_live(run: Run, when: str) -> None:
    """What this rank computes with."""
    named = dict(run.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        tensors = {name: tensor.detach().clone() for name, tensor in named.items()}
    tensors |= {name: buffer.clone() for name, buffer in run.engine.module.named_buffers() if name.endswith(BUFFERS)}
    tensors = {name.removeprefix("hf."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, run.out / f"{when}-{dist.get_rank()}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
