"""What a run records: metrics.jsonl and events.jsonl always, the terminal, and trackers on rank 0."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft.config import RunConfig, TrackSection
from sft.errors import GateFailed, GuardStop, Preempted, RankLost, UserError
from sft.settings import redact

PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bf16 peak of one GPU in FLOP/s, from the vendors' data sheets; the SXM variant where there are several."""

ENDINGS: dict[type[BaseException], str] = {
    Preempted: "preempt",
    GateFailed: "gate_failed",
    GuardStop: "guard_stop",
    RankLost: "rank_lost",
}
"""Events of the endings that are no mistake and no crash; those are the event `error`."""
END_EVENTS = {*ENDINGS.values(), "error", "finish", "early_stop", "stop", "export", "unseen_end"}

SECONDS_BETWEEN_LINES = 2.0
"""Without a terminal, at most one step is printed in this time; metrics.jsonl has them all."""


def flops_per_token(
    config: dict[str, Any], num_parameters: int, attention_length: float, label_fraction: float = 1.0
) -> float:
    """Training FLOPs of one token, forward and backward, without recomputation.

    6 N + 6 L A T: N parameters that multiply (an input embedding only looks up, unless it is tied to the head; the head
    runs on supervised positions only, so it counts by their fraction, 1.0 in the published convention),
    L layers, A = heads x head size, T = mean squared document length over mean document length: attention is causal
    and stays inside documents, so the length of the pack would overstate it. Convention of PaLM (Chowdhery et al.
    2022, appendix B), with the attention term halved for causality.
    """
    heads = config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    table = config["vocab_size"] * config["hidden_size"]
    idle = (0 if config.get("tie_word_embeddings") else table) + table * (1 - label_fraction)
    return 6 * (num_parameters - idle) + 6 * config["num_hidden_layers"] * width * attention_length


def peak_flops(device: torch.device) -> float | None:
    """Peak of this rank's device, or None where it is not known (CPUs, other GPUs): MFU is then null."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_BF16_FLOPS.items() if model in name.upper()), None)


class Recorder:
    """Files, terminal and trackers of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, config: RunConfig, out: Path, is_writer: bool, total_steps: int) -> None:
        self._out = out
        self._is_writer = is_writer
        self._console = Console(stderr=False, soft_wrap=True, highlight=False)
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._progress = _progress_bar(self._console) if is_writer and sys.stdout.isatty() else None
        self._total_steps = total_steps
        self._said_s = float("-inf")
        self.step = 0
        """Of what is recorded without one: the last step that was taken."""
        self._config = config
        self._before: dict[str, Any] | None = None

    def __enter__(self) -> "Recorder":
        self._before = next(reversed(_read(self._out / "events.jsonl")), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, RankLost):  # of a lost rank the watchdog has told
            self.event(ENDINGS.get(type(error), "error"), self.step, reason=_first_line(error))
        if self._progress:
            self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def start(self) -> None:
        """There is something to train: tell of an end that nobody saw, start the progress bar and the trackers."""
        if not self._is_writer:
            return
        if self._before and self._before.get("event") not in END_EVENTS:
            last = f"after event {self._before.get('event')} nothing was recorded: killed, or the host was lost"
            self.event("unseen_end", self._before.get("step", 0), reason=last)
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task("train", total=self._total_steps, status="")
        self._start_trackers(self._config.track)

    def say(self, line: str) -> None:
        """One line for people."""
        if self._is_writer:
            self._console.print(line, markup=False)

    def warn(self, kind: str, line: str, step: int = 0, **facts: Any) -> None:
        """A line that nobody should miss, and its event."""
        if self._is_writer:
            self._console.print(f"WARNING: {line}", style="bold red", markup=False)
        self.event(kind, step, **{"reason": line, **facts})

    def last_words(self, reason: str) -> None:
        """The event of a lost rank; by whichever rank the watchdog has chosen, for rank 0 may be the lost one."""
        record_event(self._out, "rank_lost", self.step, reason=reason)

    def history(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of the steps in metrics.jsonl, NaN where they were not finite.

        Without the steps that were passed over; empty on ranks other than 0.
        """
        lines = _read(self._out / "metrics.jsonl") if self._is_writer else []
        return [
            (line["step"], _number(line.get("loss")), _number(line.get("grad_norm")))
            for line in lines
            if "loss_by_source" in line and isinstance(line.get("step"), int)
        ]

    def heldout_history(self) -> list[tuple[int, float | None]]:
        """(step, held-out loss) of the steps in metrics.jsonl at which it was measured; empty on other ranks than 0."""
        lines = _read(self._out / "metrics.jsonl") if self._is_writer else []
        return [
            (line["step"], _number(line["heldout_loss"]))
            for line in lines
            if "heldout_loss" in line and isinstance(line.get("step"), int)
        ]

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """One line in events.jsonl: start, resume, save, evaluate, skip, finish, ... with its facts."""
        if self._is_writer:
            record_event(self._out, kind, step, **facts)
            if kind == "evaluate":
                self.say(f"step {step}: held-out loss {facts['heldout_loss']:.4f}")
            elif kind == "save":
                self.say(f"step {step}: saved, {facts['gib']:,.2f} GiB in {facts['save_time_s']:.1f} s")

    def metrics(self, values: dict[str, Any]) -> None:
        """One line in metrics.jsonl per optimizer step, the progress bar or one plain line, and the trackers."""
        step = self.step = values["step"]
        if not self._is_writer:
            return
        _append(self._out / "metrics.jsonl", values)
        if self._progress:
            self._progress.update(self._task, completed=step, status=_short_status(values))
        elif step in (1, self._total_steps) or time.monotonic() - self._said_s >= SECONDS_BETWEEN_LINES:
            self._said_s = time.monotonic()
            self._console.print(f"step {step}/{self._total_steps}  {_status_line(values)}", markup=False)
        numbers = _flat_numbers(values)
        if self._wandb is not None:
            self._wandb.log(numbers)  # over the metric "step": after a rollback, steps come a second time
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resume will run again, so that each step has one line."""
        self.step = step
        path = self._out / "metrics.jsonl"
        if self._is_writer and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if _step_of(line) <= step]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(line + "\n" for line in lines))
            os.replace(temporary, path)

    def _start_trackers(self, track: TrackSection) -> None:
        if track.wandb != "off":
            import wandb

            self._wandb = wandb.init(
                project=track.project,
                name=self._out.name,
                dir=str(self._out),
                mode=track.wandb,
                config=redact(self._config.model_dump(mode="json")),
                settings=wandb.Settings(silent=True),
            )
            self._wandb.define_metric("*", step_metric="step")
        if track.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._out / "tensorboard"))


def record_event(out: Path, kind: str, step: int, **facts: Any) -> None:
    """One line in <out>/events.jsonl; none where the run has no folder yet."""
    if out.is_dir():
        _append(out / "events.jsonl", {"time": round(time.time(), 3), "event": kind, "step": step, **facts})


def _append(path: Path, value: dict[str, Any]) -> None:
    line = json.dumps(_finite(value), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:  # a crash or a full disk may have cut the last line short
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def _read(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file, none where there is no file; lines that a crash cut short are left out."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            objects.append(json.loads(line))
    return [value for value in objects if isinstance(value, dict)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return (
        text if isinstance(error, UserError | Preempted | GateFailed | GuardStop) else f"{type(error).__name__}: {text}"
    )


def _flat_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """What trackers draw; {"loss_by_source": {"a": 1.0}} becomes {"loss_by_source/a": 1.0}."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def _step_of(line: str) -> float:
    """Step of a line of metrics.jsonl; beyond all steps for a line that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _status_line(values: dict[str, Any]) -> str:
    if values["loss"] is None:
        return "passed over"
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}", f"grad norm {values['grad_norm']:.3f}"]
    parts += [f"{values['tokens_per_s']:,.0f} tokens/s"]
    if values["mfu"] is not None:
        parts += [f"MFU {values['mfu']:.1%}"]
    return "  ".join(parts)


def _short_status(values: dict[str, Any]) -> str:
    """What fits beside the bar in 80 columns; metrics.jsonl has the rest."""
    loss = "passed over" if values["loss"] is None else f"loss {values['loss']:.4f}"
    return f"{loss}  {values['tokens_per_s']:,.0f} tokens/s"


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
