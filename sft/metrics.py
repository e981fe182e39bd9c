"""What a run records: metrics.jsonl and events.jsonl always, the terminal, and trackers on rank 0."""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from sft.config import RunConfig
from sft.errors import GateFailed, GuardStop, Preempted, RankLost, UserError
from sft.terminal import Terminal, TimeLeft
from sft.trackers import Trackers

PEAK_BF16_FLOPS = {
    "A10": 125e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A800": 312e12,
    "B100": 1750e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H800": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}
"""Dense bf16 peak of one GPU with fp32 sums, in FLOP/s, without sparsity (half of what a sheet gives "with sparsity").

From the data sheets of NVIDIA and AMD (GB200: a 72nd of an NVL72; B100, B200: an 8th of an HGX board), for GeForce from
the whitepapers of GA102, Ada and Blackwell. A name alone means SXM where a GPU is sold in several forms.
"""
VARIANTS = {"D", "LAPTOP", "MIG", "NVL", "PCIE"}
"""Words of a device name that mean another chip speed, or a part of a chip."""

ENDINGS: dict[type[BaseException], str] = {
    Preempted: "preempt",
    GateFailed: "gate_failed",
    GuardStop: "guard_stop",
    RankLost: "rank_lost",
}
"""Events of the endings that are no mistake and no crash; those are the event `error`."""
END_EVENTS = {*ENDINGS.values(), "error", "finish", "early_stop", "stop", "export", "unseen_end"}


def flops_per_token(
    config: dict[str, Any], num_parameters: int, attention_length: float, label_fraction: float = 1.0
) -> float:
    """FLOPs that training needs for one token, forward and backward; what is recomputed does not count.

        6 N + 6 L A T          N, L, A from the model's shape, T from the data

    * N: parameters that multiply, each 2 FLOPs forward and 4 backward. An input embedding only looks up, unless it is
      tied to the head; the head runs on supervised positions only, so it counts by their fraction (`label_fraction`;
      1.0 in the published convention).
    * L layers; A = heads x head size; T = `attention_length`. Scores (Q K^T) and their use (times V) are 2 A FLOPs each
      for every pair of a token and one that it attends to. A token within a document of length l attends to l / 2
      others on average, so 2 A T forward and, with twice that backward, 6 A T.

    MFU of a step = tokens_per_s x flops_per_token / (ranks x peak of one GPU): the share of the hardware's peak that
    does this necessary work. Convention of PaLM (Chowdhery et al. 2022, appendix B), whose attention term is 12 L A T:
    it lets every token attend to all T, which is halved here, as attention is causal. Documents are packed, and
    attention stays within them: T is no pack's length, but `attention_length` of the documents.
    """
    heads = config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    table = config["vocab_size"] * config["hidden_size"]
    idle = (0 if config.get("tie_word_embeddings") else table) + table * (1 - label_fraction)
    return 6 * (num_parameters - idle) + 6 * config["num_hidden_layers"] * width * attention_length


def attention_length(lengths: np.ndarray) -> float:
    """Length of the document that a token lies in, on average over all tokens: T in `flops_per_token`.

    Sum of squares over sum, of document lengths in tokens, [documents]: a document of l tokens has l of them, each in a
    document of length l. In one document it is its length; long documents weigh more than in the mean length.
    """
    lengths = lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def gpu_model(name: str) -> str | None:
    """Key of PEAK_BF16_FLOPS for a device's name, such as "NVIDIA A100-SXM4-80GB"; None: not in the table."""
    words = re.findall(r"[A-Z0-9]+", name.upper())
    plain = " ".join(word for word in words if word not in VARIANTS)
    model = next((model for model in PEAK_BF16_FLOPS if f" {model} " in f" {plain} "), None)
    full = " ".join([model or "", *(word for word in words if word in VARIANTS)])
    return full if full in PEAK_BF16_FLOPS else None


def peak_flops(device: torch.device) -> float | None:
    """Peak of this rank's device, or None where it is not known (CPUs, other GPUs): MFU is then null."""
    model = gpu_model(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return PEAK_BF16_FLOPS[model] if model else None


class Recorder:
    """Files, terminal and trackers of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, config: RunConfig, out: Path, is_writer: bool, total_steps: int) -> None:
        self._out = out
        self._is_writer = is_writer
        self._terminal = Terminal(total_steps) if is_writer else None
        self._time_left = TimeLeft(total_steps)
        self._trackers: Trackers | None = None
        self._heldout: dict[int, float] = {}
        """Held-out losses by step; a rollback forgets those that it goes back before."""
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
        if self._terminal:
            self._terminal.stop()
        if self._trackers:
            self._trackers.finish(0 if kind is None else 1)

    def start(self) -> None:
        """There is something to train: tell of an end that nobody saw, start the trackers and the progress bar.

        Raises:
            UserError: wandb cannot be started.
        """
        if not self._is_writer:
            return
        if self._before and self._before.get("event") not in END_EVENTS:
            last = f"after event {self._before.get('event')} nothing was recorded: killed, or the host was lost"
            self.event("unseen_end", self._before.get("step", 0), reason=last)
        self._trackers = Trackers(self._config, self._out)
        if self._terminal:
            self._terminal.start()

    def say(self, line: str) -> None:
        """One line for people."""
        if self._terminal:
            self._terminal.say(line)

    def warn(self, kind: str, line: str, step: int = 0, **facts: Any) -> None:
        """A line that nobody should miss, and its event."""
        if self._terminal:
            self._terminal.say(f"WARNING: {line}", style="bold red")
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

    def heldout_history(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of the steps in metrics.jsonl at which it was due, NaN for null; empty on other ranks
        than 0."""
        lines = _read(self._out / "metrics.jsonl") if self._is_writer else []
        return [
            (line["step"], _number(line["heldout_loss"]))
            for line in lines
            if "heldout_loss" in line and isinstance(line.get("step"), int)
        ]

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """One line in events.jsonl: start, resume, save, evaluate, skip, finish, ... with its facts."""
        if not self._is_writer:
            return
        record_event(self._out, kind, step, **facts)
        if kind == "evaluate":
            self._say_heldout(step, facts["heldout_loss"])
        elif kind == "save":
            self.say(f"step {step}: saved, {facts['gib']:,.2f} GiB in {facts['save_time_s']:.1f} s")

    def metrics(self, values: dict[str, Any]) -> None:
        """One line in metrics.jsonl per optimizer step, with the time left; the terminal, and the trackers."""
        step = self.step = values["step"]
        if not self._is_writer:
            return
        values = values | {"eta_s": self._time_left.after(step, values["step_time_s"])}
        _append(self._out / "metrics.jsonl", values)
        if self._terminal:
            self._terminal.show(values, min(self._heldout.values(), default=None))
        self.track(step, values)

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Put into the line of `step` what was measured after it had been written."""
        path = self._out / "metrics.jsonl"
        if self._is_writer:
            lines = [line | values if line.get("step") == step else line for line in _read(path)]
            _rewrite(path, [json.dumps(_finite(line), allow_nan=False) for line in lines])
        self.track(step, values)

    def track(self, step: int, values: dict[str, Any]) -> None:
        """Numbers for the trackers alone: those of the base model, which belong to no line of metrics.jsonl."""
        if self._trackers:
            self._trackers.log(step, values)

    def texts(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts for the trackers, such as prompts and the model's answers after `step`."""
        if self._trackers:
            self._trackers.table(step, name, columns, rows)

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resume will run again, so that each step has one line."""
        self.step = step
        path = self._out / "metrics.jsonl"
        if self._is_writer and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if _step_of(line) <= step]
            _rewrite(path, lines)
        kept = _read(path) if self._is_writer else []
        losses = {line["step"]: _number(line.get("heldout_loss")) for line in kept}
        self._heldout = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        if self._trackers:
            self._trackers.forget_after(step)

    def _say_heldout(self, step: int, loss: float) -> None:
        """The held-out loss beside the lowest before it."""
        earlier = {at: value for at, value in self._heldout.items() if at != step}
        if math.isfinite(loss):
            self._heldout[step] = loss
        told = ""
        if earlier:
            best = min(earlier, key=earlier.__getitem__)
            told = " (the lowest so far)" if loss < earlier[best] else f" (lowest: {earlier[best]:.4f} at step {best})"
        self.say(f"step {step}: held-out loss {loss:.4f}{told}")


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


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(line + "\n" for line in lines))
    os.replace(temporary, path)


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
