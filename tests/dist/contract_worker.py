"""Started on real ranks: trains one engine after the other in one process group and writes what each came to.

    contract_worker PLAN.json OUT

The plan is a list of cases, each {"name", "options": run options by flag, "steps"} and perhaps "moments": true.
Rank 0 writes OUT/<name>.json (losses and norms, null where no step was taken; dtypes) and OUT/<name>.safetensors.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sft import zero_state
from sft.config import RunConfig
from sft.engine import choose_numerics, join
from sft.inputs import open_inputs
from sft.metrics import Recorder
from sft.model import read_model_config
from sft.preemption import StopRequest
from sft.rendezvous import Meeting, meet
from sft.settings import load
from sft.signals import Inbox
from sft.step import train_step
from sft.training import start_up, watch_over


def main(argv: list[str]) -> None:
    """Every case of the plan, in order."""
    plan, out = map(Path, argv[-2:])  # the launcher puts --local_rank in front
    meeting = meet(60.0)
    device = join(meeting)
    for case in json.loads(plan.read_text()):
        run_case(case, out, meeting, device)
        gc.collect()
    dist.barrier()


def run_case(case: dict[str, Any], out: Path, meeting: Meeting, device: torch.device) -> None:
    """Train `steps` steps and write losses, norms and weights."""
    flags = [text for name, value in case["options"].items() for text in (f"--{name}", str(value))]
    config = load(RunConfig, [*flags, "--out", str(out / case["name"])], prog="contract_worker")
    inputs = open_inputs(config, dist.get_world_size())
    numerics = choose_numerics(config, device, read_model_config(config.model.path))
    out = Path(config.out)
    with Recorder(config, out, False, inputs.total_steps) as recorder:
        # not started: a rank that is lost here ends the test by its launcher
        watch = watch_over(meeting, config, out, recorder)
        run = start_up(config, inputs, numerics, out, recorder, watch, StopRequest(Inbox(), None))
        lines = [train_step(run, step) for step in range(case["steps"])]
        run.saver.wait_for_deletions()
        run.stop.close()
    write(case, run.engine, lines, out)
    run.engine.destroy()


def write(case: dict[str, Any], engine: Any, lines: list[dict[str, Any]], out: Path) -> None:
    """<out>.safetensors and <out>.json."""
    tensors = weights(engine)
    if case.get("moments"):
        tensors |= {f"exp_avg|{name}": moment for name, moment in first_moments(engine).items()}
    result = {
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "data_types": [str(dtype) for dtype in engine.get_data_types()],
        "rotary": {
            name: (str(buffer.dtype), buffer.tolist())
            for name, buffer in engine.module.named_buffers()
            if "inv_freq" in name
        },
    }
    if dist.get_rank() == 0:
        save_file(tensors, out.with_suffix(".safetensors"))
        out.with_suffix(".json").write_text(json.dumps(result))


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights that the model computes with, whole on every rank."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name.removeprefix("hf."): weight.detach().clone() for name, weight in named.items()}


def first_moments(engine: Any) -> dict[str, torch.Tensor]:
    """Adam's exp_avg, fp32, whole on every rank; after one step without clipping it is (1 - beta1) x gradient."""
    whole = {name: torch.zeros(shape) for name, shape in zero_state.shapes(engine).items()}
    flats = zero_state.state_tensors(engine.optimizer)["exp_avg"]
    for piece in zero_state.owned_slices(engine.optimizer):
        values = flats[piece.flat][piece.flat_offset : piece.flat_offset + piece.numel]
        whole[piece.name].view(-1)[piece.start : piece.start + piece.numel] = values
    for moment in whole.values():
        dist.all_reduce(moment)
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
