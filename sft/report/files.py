"""What a run has written, read so that nothing in it can stop the report: lines cut short, fields that are missing."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from sft.settings import YAML_ERRORS, redact

COLUMNS = (
    "loss",
    "grad_norm",
    "lr",
    "applied",
    "epoch",
    "tokens",
    "label_tokens",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "step_time_s",
    "save_stall_s",
    "data_stall_s",
    "peak_mem_gib",
    "peak_host_mem_gib",
    "heldout_loss",
    "eta_s",
)
"""Fields of metrics.jsonl that the page uses; docs/training.md says what they mean."""
LARGEST = 3.5e38
"""Beyond all that fp32 can hold."""


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by column. Every array has one entry per step; NaN where a line has no number."""

    step: np.ndarray
    """int64, ascending; where a step has several lines the last one counts."""
    columns: dict[str, np.ndarray]
    """float64, all of COLUMNS."""
    loss_by_source: dict[str, np.ndarray]
    share_by_source: dict[str, np.ndarray]

    def known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a column where it has a value."""
        values = self.columns[name]
        there = np.isfinite(values)
        return self.step[there], values[there]


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    kind: str
    step: int
    time_s: float | None
    """Seconds since 1970."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl: what the model answered after `step` optimizer steps."""

    step: int
    prompt: str
    answer: str
    is_finished: bool
    """False where the answer was cut at the longest length allowed."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder below checkpoints/, by its meta.json."""

    step: int
    heldout_loss: float | None
    num_bytes: int
    ranks: int | None
    is_complete: bool


@dataclass(frozen=True)
class RunFiles:
    """All that the page is made of."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    """config.yaml unchecked, for an older version may have made it; {} where it cannot be read."""
    metrics: Metrics
    events: list[Event]
    samples: list[Sample]
    checkpoints: list[Checkpoint]

    def setting(self, *path: str) -> Any:
        """A value of config.yaml, None where it is missing."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        OSError: a file is there and cannot be read.
    """
    config_file = folder / "config.yaml"
    text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    return RunFiles(
        folder,
        redact(text),
        _parse_config(text),
        read_metrics(folder / "metrics.jsonl"),
        [event for line in _lines(folder / "events.jsonl") if (event := _event(line))],
        [sample for line in _lines(folder / "samples.jsonl") if (sample := _sample(line))],
        _checkpoints(folder / "checkpoints"),
    )


def read_metrics(path: Path) -> Metrics:
    """metrics.jsonl by column; empty where there is none."""
    steps: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    by_source: dict[str, dict[str, list[tuple[int, float]]]] = {"loss_by_source": {}, "token_share_by_source": {}}
    for line in _lines(path):
        step = _step(line)
        if step is None:
            continue
        for name, values in columns.items():
            values.append(_number(line.get(name)))
        for name, sources in by_source.items():
            found = line.get(name)
            for source, value in found.items() if isinstance(found, dict) else ():
                sources.setdefault(source, []).append((len(steps), _number(value)))
        steps.append(step)
    order = _last_of_each(np.array(steps, dtype=np.int64))
    losses, shares = (
        {source: _spread(cells, len(steps))[order] for source, cells in sources.items()}
        for sources in by_source.values()
    )
    arrays = {name: np.array(values, dtype=np.float64)[order] for name, values in columns.items()}
    return Metrics(np.array(steps, dtype=np.int64)[order], arrays, losses, shares)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file, none where there is no file; what a crash cut short is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(orjson.JSONDecodeError):
                value = orjson.loads(line)
                if isinstance(value, dict):
                    yield value


def _last_of_each(steps: np.ndarray) -> np.ndarray:
    """Places of the last line of every step, by step."""
    order = np.argsort(steps, kind="stable")
    is_last = np.append(np.diff(steps[order]) > 0, True)[: len(order)]
    return order[is_last]


def _spread(cells: list[tuple[int, float]], length: int) -> np.ndarray:
    values = np.full(length, np.nan)
    values[[place for place, _ in cells]] = [value for _, value in cells]
    return values


def _event(line: dict[str, Any]) -> Event | None:
    kind, time_s = line.get("event"), _number(line.get("time"))
    if not isinstance(kind, str):
        return None
    facts = {key: value for key, value in line.items() if key not in ("event", "step", "time")}
    is_time = 0 <= time_s < 1e11  # what a calendar holds
    return Event(kind, _step(line) or 0, time_s if is_time else None, facts)


def _sample(line: dict[str, Any]) -> Sample | None:
    step, prompt, answer = _step(line), line.get("prompt"), line.get("answer")
    if step is None or not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    return Sample(step, prompt, answer, line.get("finished") is not False)


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """By step. Other folders, and those that are not yet or no longer checkpoints, have other names."""
    found = []
    for path in sorted(folder.glob("step-*/meta.json")):
        number = path.parent.name.removeprefix("step-")
        with suppress(OSError, ValueError):
            meta = json.loads(path.read_bytes())
            if not number.isdecimal() or not isinstance(meta, dict):
                continue
            loss, ranks, files = _number(meta.get("heldout_loss")), meta.get("world_size"), meta.get("files")
            entries = files.values() if isinstance(files, dict) else ()
            sizes = [_number(entry.get("bytes")) for entry in entries if isinstance(entry, dict)]
            found.append(
                Checkpoint(
                    int(number),
                    loss if math.isfinite(loss) else None,
                    int(sum(size for size in sizes if math.isfinite(size))),
                    ranks if isinstance(ranks, int) else None,
                    (path.parent / "COMPLETE").is_file(),
                )
            )
    return found


def _parse_config(text: str) -> dict[str, Any]:
    with suppress(*YAML_ERRORS):
        value = yaml.safe_load(text)
        if isinstance(value, dict):
            return value
    return {}


def _step(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


def _number(value: Any) -> float:
    """NaN for anything that no run can have measured: differences of larger numbers would overflow."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else math.nan
