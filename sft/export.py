"""Weights of a run to a verified Hugging Face folder: `python -m sft.export --run RUN [--ema] [--average 3]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sft.checkpoint import newest_complete, read_meta
from sft.config import ExportConfig, RunConfig
from sft.errors import UserError, run_command
from sft.hf_folder import check_absent, export
from sft.settings import load
from sft.weight_sources import from_checkpoint, from_mean, last_complete


def main(argv: Sequence[str]) -> None:
    """Export the newest complete checkpoint of a run, or the one that is named; or their average."""
    config = load(ExportConfig, argv, prog="sft export", positional="run")
    if config.ema and config.average is not None:
        raise UserError(
            f"--ema with --average {config.average}: the moving average is a mean over steps already; choose one"
        )
    checkpoint, run = _find(Path(config.run).resolve())
    base = Path(load(RunConfig, ["--config", str(run / "config.yaml")], prog="sft train").model.path)
    if not base.is_dir():
        raise UserError(f"export {run}: its base model folder {base} is gone; config and tokenizer are read from it")
    out = Path(config.out) if config.out else run / default_name(checkpoint, config)
    check_absent(out)
    if config.average is None:
        source = from_checkpoint(checkpoint, ema=config.ema)
    else:
        source = from_mean(last_complete(checkpoint, config.average))
    export(source, read_meta(checkpoint), base, out, config.dtype, config.max_shard_gb)
    print(f"exported {source.name} to {out}: loaded back with transformers, every tensor equal")


def default_name(checkpoint: Path, config: ExportConfig) -> str:
    """export for the end of the run, export-step-… for a checkpoint on the way: never one for the other."""
    meta = read_meta(checkpoint)
    kind = "-ema" if config.ema else "" if config.average is None else f"-average-{config.average}"
    finished = meta["step"] >= meta["identity"]["total_steps"]
    return f"export{kind}" if finished else f"export{kind}-{checkpoint.name}"


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
