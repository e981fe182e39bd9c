"""ZeRO-3 supervised fine-tuning: `deepspeed … --module sft.train --config run.yaml [--section.key value]`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config import RunConfig
from sft.errors import Preempted, UserError, run_rank
from sft.launch_env import take_secrets
from sft.settings import load
from sft.signals import Inbox

if TYPE_CHECKING:
    from sft.training import Ended


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
        print(f"{ended.out}: this run is finished ({ended.step} of {ended.total_steps} steps); nothing to train")
    if ended.stalled is not None:
        print(f"{ended.out}: stopped early: {ended.stalled}")
    elif ended.step < ended.total_steps:
        print(f"{ended.out}: stopped after step {ended.step} of {ended.total_steps} as asked; run again to go on")
        return
    saved = choose_checkpoint(config, ended)
    export(saved, Path(config.model.path), ended.out / "export")
    if config.train.ema_decay is not None:
        export(saved, Path(config.model.path), ended.out / "export-ema", ema=True)


def choose_checkpoint(config: RunConfig, ended: "Ended") -> Path:
    """The checkpoint to export: the last one; of a run that may stop early the one with the lowest held-out loss."""
    from sft.checkpoint import read_meta, step_folder, step_of
    from sft.retention import best_checkpoint

    folder, stalled = ended.out / "checkpoints", ended.stalled
    if config.train.early_stop.patience is None:
        return step_folder(folder, ended.step)
    best = best_checkpoint(folder)
    loss = read_meta(best)["heldout_loss"]
    if stalled is not None and (loss is None or loss > stalled.best_loss):
        print(
            f"WARNING: {folder} has no checkpoint of step {stalled.best_step}; the best there is, of step "
            f"{step_of(best)}, is exported. checkpoint.keep_best, and an eval.every that is a multiple of "
            "checkpoint.every, keep the best one"
        )
    return best


def export(saved: Path, base: Path, folder: Path, *, ema: bool = False) -> None:
    """Export the weights of a finished run, or their moving average, once, and say where they are."""
    from sft.checkpoint import step_of
    from sft.hf_folder import export_checkpoint, set_aside, verify_export
    from sft.metrics import record_event

    out, step = folder.parent, step_of(saved)
    try:
        if aside := set_aside(folder, step):
            print(f"{folder} was of another step: moved to {aside}")
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
