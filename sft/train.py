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
    from sft.training import run_training

    ended = run_training(config, inbox)
    inbox.end_at_once()
    if ended is None:
        return
    if ended.already:
        print(f"{ended.out}: this run is finished ({ended.total_steps} steps); nothing to train")
    elif ended.step < ended.total_steps:
        print(f"{ended.out}: stopped after step {ended.step} of {ended.total_steps} as asked; run again to go on")
        return
    export(ended.out, ended.total_steps, Path(config.model.path))


def export(out: Path, total_steps: int, base: Path) -> None:
    """Export a finished run, once, and say where it is."""
    from sft.checkpoint import step_folder
    from sft.hf_folder import export_checkpoint, verify_export
    from sft.metrics import record_event

    last, folder = step_folder(out / "checkpoints", total_steps), out / "export"
    try:
        if folder.exists():
            verify_export(last, folder)
        else:
            export_checkpoint(last, base, folder)
    except (UserError, Preempted, OSError) as error:
        record_event(out, "preempt" if isinstance(error, Preempted) else "error", total_steps, reason=str(error))
        raise
    record_event(out, "export", total_steps, folder=str(folder))
    print(f"model: {folder} (loaded back with transformers, every tensor equal to the checkpoint)")


if __name__ == "__main__":
    run_rank(main)
