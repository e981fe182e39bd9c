"""Checkpoint to verified Hugging Face folder: `python -m sft.export --run RUN [--out DIR]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sft.checkpoint import newest_complete, read_meta
from sft.config import ExportConfig, RunConfig
from sft.errors import UserError, run_command
from sft.hf_folder import export_checkpoint
from sft.settings import load


def main(argv: Sequence[str]) -> None:
    """Export the newest complete checkpoint of a run, or the checkpoint that is named."""
    config = load(ExportConfig, argv, prog="sft export", positional="run")
    checkpoint, run = _find(Path(config.run).resolve())
    base = load(RunConfig, ["--config", str(run / "config.yaml")], prog="sft train").model.path
    if not Path(base).is_dir():
        raise UserError(f"export {run}: its base model folder {base} is gone; config and tokenizer are read from it")
    out = Path(config.out) if config.out else run / _default_name(checkpoint)
    export_checkpoint(checkpoint, Path(base), out, config.dtype, config.max_shard_gb)
    print(f"exported {checkpoint} to {out}: loaded back with transformers, every tensor equal")


def _default_name(checkpoint: Path) -> str:
    """export for the end of the run, export-step-… for a checkpoint on the way: never one for the other."""
    meta = read_meta(checkpoint)
    finished = meta["step"] >= meta["identity"]["total_steps"]
    return "export" if finished else f"export-{checkpoint.name}"


def _find(given: Path) -> tuple[Path, Path]:
    """(checkpoint, run folder) for a run folder or a checkpoint folder."""
    if given.name.startswith("step-") and len(given.parents) > 1 and (given.parents[1] / "config.yaml").is_file():
        return given, given.parents[1]
    if not (given / "config.yaml").is_file():
        raise UserError(f"--run {given}: is no run folder (no config.yaml) and no checkpoint of one")
    checkpoint = newest_complete(given / "checkpoints")
    if checkpoint is None:
        raise UserError(f"--run {given}: has no complete checkpoint yet")
    return checkpoint, given


if __name__ == "__main__":
    sys.exit(run_command(main))
