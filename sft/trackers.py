"""The same numbers under the same names in wandb and in TensorBoard; only the rank that records has them."""

import os
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config import RunConfig
from sft.errors import UserError
from sft.settings import redact

WANDB_ID = "wandb-id"
"""File in the run folder: by its id a resumed run goes on with its own curve."""


class Trackers:
    """What the run file asks for under `track`: wandb, TensorBoard, both or none."""

    def __init__(self, config: RunConfig, out: Path) -> None:
        """Start them.

        Raises:
            UserError: wandb cannot be started.
        """
        self._wandb = _start_wandb(config, out) if config.track.wandb != "off" else None
        self._tensorboard = _Board(out / "tensorboard") if config.track.tensorboard else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """The numbers among `values`, flattened, at optimizer step `step`."""
        numbers = flat_numbers(values)
        numbers.pop("step", None)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})  # over a metric: wandb's own step can only grow
        if self._tensorboard is not None:
            writer = self._tensorboard.writer()
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Texts, such as answers of the model: a table in wandb, a page of text in TensorBoard."""
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._wandb.log({"step": step, name: table})
        if self._tensorboard is not None:
            self._tensorboard.writer().add_text(name, _markdown(columns, rows), step)

    def forget_after(self, step: int) -> None:
        """Steps after `step` will be taken again: TensorBoard drops what it has of them.

        wandb cannot take back what was logged: there, such steps have a point of each time.
        """
        if self._tensorboard is not None:
            self._tensorboard.forget_after(step)

    def finish(self, exit_code: int) -> None:
        """Write everything out; 0: the run ended well."""
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
        if self._tensorboard is not None:
            self._tensorboard.close()


class _Board:
    """TensorBoard's event files: a new one from each step that a start or a rollback goes on from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def writer(self) -> Any:
        """A torch SummaryWriter; its file begins with the first value."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        return self._writer

    def forget_after(self, step: int) -> None:
        """TensorBoard hides what earlier files have beyond `step`."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Write the file out."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def flat_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """What trackers draw: {"loss_by_source": {"a": 1.0}} becomes {"loss_by_source/a": 1.0}; no None and no texts."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = int(value) if isinstance(value, bool) else value
    return found


def _start_wandb(config: RunConfig, out: Path) -> Any:
    """A wandb run, which goes on where the run has one.

    Raises:
        UserError: wandb refuses: no network, a wrong key, a broken installation.
    """
    import wandb

    mode = config.track.wandb
    try:
        run = wandb.init(
            project=config.track.project,
            name=out.resolve().name,
            id=_wandb_id(out),
            resume="allow",
            dir=str(out),
            mode="online" if mode == "online" else "offline",
            config=redact(config.model_dump(mode="json")),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"track.wandb {mode}: {reason}; use offline, which writes to {out}/wandb for a later wandb sync, or off"
        ) from error
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(out: Path) -> str:
    """The id in the run folder; a new one at a run's first start."""
    path = out / WANDB_ID
    kept = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not kept:
        kept = uuid.uuid4().hex[:12]
        partial = path.with_name(f"{WANDB_ID}.partial")
        partial.write_text(kept + "\n", encoding="utf-8")
        os.replace(partial, path)
    return kept


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Each text as a block of its own, verbatim: it may hold Markdown that is not meant."""
    blocks = [
        f"**{column}**\n\n{textwrap.indent(text, '    ', lambda _: True)}"
        for row in rows
        for column, text in zip(columns, row, strict=True)
    ]
    return "\n\n".join(blocks)
