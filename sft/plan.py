"""What follows from a run file, before it runs: `sft plan --config run.yaml [--ranks N] [--plot-schedule [FILE.png]]`.

No process group, no GPU, no weights: the run's inputs are opened and checked as `sft train` does it first.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config import PositiveInt, RunConfig
from sft.errors import UserError, run_command
from sft.inputs import RunInputs, batch_arithmetic, find_resume, open_inputs
from sft.lr_groups import Factors
from sft.optim import parameter_groups
from sft.png import save_png
from sft.pretrained import empty_model
from sft.retention import GIB, bytes_per_parameter, most_checkpoints
from sft.run_folder import run_folder
from sft.schedule import lr_at, warmup_steps
from sft.schedule_plot import Marks, curve, draw, first_step, share_of
from sft.settings import load

HELP = """Prints what follows from a run file, and starts nothing.

--plot-schedule [FILE.png]  Also draw the learning rate of the whole run. [default file: <out>-schedule.png]
"""
FLAG = "--plot-schedule"


class PlanConfig(RunConfig):
    ranks: PositiveInt | None = None
    """Processes that will train; null: one per GPU that is visible here, 1 where there is none."""


def main(argv: Sequence[str]) -> None:
    """Print the plan of the run that the options describe and, where asked, draw its learning rate."""
    plot, flags = take_plot(argv)
    if {"-h", "--help"} & set(flags):
        print(HELP)
    config = load(PlanConfig, flags, prog="sft plan")
    inputs = open_inputs(config, config.ranks or _visible_gpus())
    run_folder(config)
    groups = groups_of(config)
    marks = marks_of(config, inputs)
    for line in describe(config, inputs, groups, marks):
        print(line)
    if plot is not None:
        path = Path(plot or f"{os.path.normpath(config.out)}-schedule.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = sorted({group["lr_factors"] for group in groups}, key=lambda found: (-share_of(found), found))
        curves = [curve(config.schedule, inputs.total_steps, config.optim.lr, found) for found in factors]
        save_png(draw(config.schedule, config.optim.lr, curves, marks), path)
        print(f"drawn: {path}")


def take_plot(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Where the picture goes (None: none is wanted; empty: the default), and the flags without --plot-schedule [FILE].

    Raises:
        UserError: FILE is no name of a PNG file in a folder that can be written.
    """
    at = next((place for place, word in enumerate(argv) if word.partition("=")[0].replace("_", "-") == FLAG), None)
    if at is None:
        return None, list(argv)
    target, rest = argv[at].partition("=")[2], list(argv[at + 1 :])
    if "=" not in argv[at] and rest and not rest[0].startswith("-"):
        target, rest = rest[0], rest[1:]
    flags = [*argv[:at], *rest]
    if not target:
        return target, flags
    path = Path(target)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"{FLAG} {target}: must be the name of a .png file, as in runs/schedule.png")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{FLAG} {target}: cannot be written; name a file in a folder that is there and writable")
    return target, flags


def groups_of(config: RunConfig) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, as the run itself makes them, of a model without weights."""
    return parameter_groups(empty_model(config.model.path).named_parameters(), config.optim)


def marks_of(config: RunConfig, inputs: RunInputs) -> list[Marks]:
    """What happens between the steps."""
    total, saves = inputs.total_steps, config.checkpoint.every
    found = [Marks("checkpoint", (saves,), total)]
    if inputs.heldout is not None:
        found.append(Marks("held-out loss", (config.eval.every, saves), total))  # each checkpoint knows its own
    if inputs.probe is not None:
        found.append(Marks("probe", (config.eval.probe.every,), total))
    if config.eval.samples.prompts is not None:
        found.append(Marks("samples", (config.eval.samples.every,), total))
    return found


def describe(
    config: RunConfig, inputs: RunInputs, groups: Sequence[dict[str, Any]], marks: Sequence[Marks]
) -> list[str]:
    """The plan, line by line."""
    lines = batch_arithmetic(config, inputs)
    if config.batch.micro_batch == "auto":
        lines.append("micro-batch     auto: found by trial at the start; here 1 stands for it")
    if newest := find_resume(config, inputs):
        lines.append(f"goes on from    {newest}")
    if inputs.last_step < inputs.total_steps:
        lines.append(f"leaves after    step {inputs.last_step:,} (train.stop_after)")
    if (patience := config.train.early_stop.patience) is not None:
        lines.append(f"may end early   after {patience} measurements of the held-out loss without a new lowest")
    num_parameters = sum(_numel(group) for group in groups)
    lines += _describe_schedule(config, inputs.total_steps)
    lines += _describe_groups(groups, num_parameters, inputs.total_steps)
    lines += _describe_checkpoints(config, inputs, num_parameters)
    lines += [f"{row.name:<15} {row.count:,}: {_when(row.every)}" for row in marks[1:]]
    return lines


def _describe_schedule(config: RunConfig, total_steps: int) -> list[str]:
    def lr(step: int) -> str:
        return f"{lr_at(step, total_steps, config.optim.lr, config.schedule):.2e} at step {step:,}"

    schedule = config.schedule
    warmup_end = warmup_steps(schedule, total_steps)
    points = dict.fromkeys([1, min(max(warmup_end, 1), total_steps), total_steps])
    cycles = f", {schedule.cycles} cycles" if schedule.cycles > 1 else ""
    warmup = f"warm-up to step {warmup_end:,}" if warmup_end else "no warm-up"
    return [f"learning rate   {schedule.name}{cycles}, {warmup}: {', '.join(map(lr, points))}"]


def _describe_groups(groups: Sequence[dict[str, Any]], num_parameters: int, total_steps: int) -> list[str]:
    lines = [f"parameters      {num_parameters:,} in {len(groups)} group{'s' if len(groups) > 1 else ''}"]
    for group in groups:
        factors: Factors = group["lr_factors"]
        share, start = share_of(factors), first_step(factors, total_steps)
        when = f", from step {start:,}" if start > 1 else ""
        rate = "kept as they are" if share == 0 or start > total_steps else f"lr x {share:.4g}{when}"
        lines.append(f"  {_numel(group):>15,}  weight decay {group['weight_decay']:g}, {rate}")
    return lines


def _describe_checkpoints(config: RunConfig, inputs: RunInputs, num_parameters: int) -> list[str]:
    keep, total = config.checkpoint, inputs.total_steps
    at_most = most_checkpoints(keep, total, heldout=inputs.heldout is not None)
    gib = num_parameters * bytes_per_parameter(config.optim, config.train.ema_decay) / GIB
    saves = Marks("", (keep.every,), total).count
    return [
        f"checkpoints     {saves:,}: {_when((keep.every,))}; {gib:,.2f} GiB each, at most {at_most:,} on disk "
        f"at once = {at_most * gib:,.2f} GiB"
    ]


def _when(every: Sequence[int]) -> str:
    own = [steps for steps in sorted(set(every)) if not any(steps % other == 0 for other in every if other < steps)]
    return " and ".join(f"every {steps:,} steps" if steps > 1 else "every step" for steps in own) + " and at the last"


def _numel(group: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in group["params"])


def _visible_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(run_command(main))
