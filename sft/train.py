"""ZeRO-3 supervised fine-tuning: `deepspeed … --module sft.train --config run.yaml [--section.key value]`."""

import os
from collections.abc import Sequence
from pathlib import Path

from sft.config import RunConfig
from sft.errors import Preempted, UserError, run_rank
from sft.launch_env import take_secrets
from sft.settings import load
from sft.signals import Inbox


def main(argv: Sequence[str]) -> None:
    """Train, or resume, the run that the options describe; at its end, export the model."""
    inbox = Inbox()
    inbox.listen()  # first: the imports take seconds, in which a signal would end the process
    take_secrets()
    config = load(RunConfig, argv, prog="sft train")
    # a rank whose peers are lost says so in one line; torch's own account of the broken store is a C++ stack
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sft.checkpoint import step_folder
    from sft.retention import best_checkpoint
    from sft.training import run_training

    ended = run_training(config, inbox)
    inbox.end_at_once()
    if ended is None:
        return
    if ended.already:
        print(f"{ended.out}: this run is finished ({ended.step} of {ended.total_steps} steps); nothing to train")
    if ended.stalled is not None:
        print(f"{ended.out}: stopped early: {ended.stalled}")
    elif ended.step < ended.total_steps:
        print(f"{ended.out}: stopped after step {ended.step} of {ended.total_steps} as asked; run again to go on")
        return
    checkpoints = ended.out / "checkpoints"
    saved = step_folder(checkpoints, ended.step) if ended.stalled is None else best_checkpoint(checkpoints)
    export(saved, Path(config.model.path), ended.out / "export")
    if config.train.ema_decay is not None:
        export(saved, Path(config.model.path), ended.out / "export-ema", ema=True)


def export(saved: Path, base: Path, folder: Path, *, ema: bool = False) -> None:
    """Export the weights of a finished run, or their moving average, once, and say where they are."""
    from sft.checkpoint import step_of
    from sft.hf_folder import export_checkpoint, verify_export
    from sft.metrics import record_event

    out, step = folder.parent, step_of(saved)
    try:
        if folder.exists():
            verify_export(saved, folder, ema=ema)
        else:
            export_checkpoint(saved, base, folder, ema=ema)
    except (UserError, Preempted, OSError) as error:
        record_event(out, "preempt" if isinstance(error, Preempted) else "error", step, reason=str(error))
        raise
    record_event(out, "export", step, folder=str(folder))
    print(f"model: {folder} (loaded back with transformers, every tensor equal to the checkpoint of step {step})")


if __name__ == "__main__":
    run_rank(main)
