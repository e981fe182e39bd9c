"""An invented run's files, of any length: two sources, spikes, rollbacks, restarts, skipped steps, probes, samples."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.drift_report import EVIL

BEGAN_S = 1_760_000_000.0
STEP_S = 1.5
CONFIG = """\
model: {path: models/llama-2-7b}
data: {train: data/alpaca/train, heldout: data/alpaca/heldout}
batch: {rows_per_step: 128}
train: {max_steps: %d, epochs: 3}
optim: {lr: 2.0e-05, grad_clip: 1.0}
guard: {hang_after_s: 900.0}
eval: {probe: {max_drop: 0.05}}
out: "<script>alert('config')</script>"
"""


def invented(folder: Path, steps: int = 20_000, every: int = 500, seed: int = 0) -> Path:
    """A finished run of `steps` steps, with a save, held-out loss, probe and samples every `every` steps."""
    random = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG % steps)
    events: list[dict[str, Any]] = [event("start", 0, 0.0, world_size=8, identity={"data_key": "ab" * 32})]
    samples = [sample(0, prompt) for prompt in PROMPTS]
    lines = [metrics_line(step, steps, random) for step in range(1, steps + 1)]
    for step in incidents(steps, "spike"):
        lines[step - 1]["loss"] *= 6
        reason = f"step {step}: loss {lines[step - 1]['loss']:.4g} is above 2.1; the median of the last steps is 1.3"
        events.append(event("spike", step, step * STEP_S, loss=lines[step - 1]["loss"], usual=1.3, reason=reason))
    for step in incidents(steps, "skip"):
        lines[step - 1] |= {"loss": None, "grad_norm": None, "applied": False, "tokens_per_s": None}
        reason = "loss is not finite"
        events.append(event("skip", step, step * STEP_S, reason=reason, doc_ids=list(range(300))))
    for step in incidents(steps, "rollback"):
        reason = f"back to checkpoints/step-{step:08d}; steps {step + 40} and {step + 41} are passed over <b>"
        events.append(event("rollback", step, step * STEP_S, reason=reason))
    for step in incidents(steps, "resume"):
        killed = "after event save nothing was recorded: killed, or the host was lost"
        events.append(event("unseen_end", step, step * STEP_S, reason=killed))
        events.append(event("resume", step, step * STEP_S + 600, world_size=8, checkpoint=f"step-{step:08d}"))
    for step in range(every, steps + 1, every):
        done = step / steps
        heldout = round(1.25 - 0.2 * math.sqrt(done) + 0.12 * max(0.0, done - 0.7), 4)
        lines[step - 1] |= {"heldout_loss": heldout, "save_stall_s": 1.0 + random.rand()}
        shift = {"metric": "acc", "n": 200, "base": 0.46, "value": 0.46 - 0.03 * done, "delta": -0.03 * done}
        shift["interval"] = [shift["delta"] - 0.04, shift["delta"] + 0.04]
        other = {**shift, "delta": 0.02 * done, "value": 0.5, "interval": [0.02 * done - 0.05, 0.02 * done + 0.03]}
        at_s = step * STEP_S
        events.append(event("evaluate", step, at_s, heldout_loss=heldout))
        events.append(event("probe", step, at_s, seconds=12.0, tasks={"mmlu": shift, "hellaswag": other}))
        events.append(event("save", step, at_s, save_time_s=31.5, stall_s=1.1, gib=75.3))
        samples += [sample(step, prompt) for prompt in PROMPTS]
    events.sort(key=lambda line: line["time"])
    events.append(event("finish", steps, steps * STEP_S + 100))
    for name, objects in (("metrics", lines), ("events", events), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in objects))
    for step in (steps - every, steps):
        checkpoint(folder, step, 1.1 + step / steps / 100)
    return folder


def incidents(steps: int, kind: str) -> list[int]:
    """When something goes wrong; nothing does in short runs."""
    parts = {"spike": (0.11, 0.52, 0.83), "skip": (0.2, 0.21, 0.64), "rollback": (0.5,), "resume": (0.3, 0.72)}
    return [round(steps * part) for part in parts[kind]] if steps >= 100 else []


def metrics_line(step: int, steps: int, random: np.random.RandomState) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    done = step / steps
    loss = 1.05 + 1.2 * math.exp(-12 * done) + 0.12 * random.randn() * (1 - 0.4 * done)
    lr = 2e-5 * min(1.0, done / 0.03) * (0.55 + 0.45 * math.cos(math.pi * done))
    speed = 60_000 + 1_500 * random.randn() - 20_000 * (step == 1)
    return {
        "step": step, "epoch": round(3 * done, 4), "loss": loss, "lr": lr, "applied": True,
        "grad_norm": math.exp(-0.4 + 0.3 * random.randn()), "tokens": 90_000 + step % 7, "label_tokens": 40_000,
        "tokens_per_s": speed, "mfu": speed / 130_000, "step_time_s": STEP_S, "save_stall_s": 0.0,
        "peak_mem_gib": 61.25, "loss_by_source": {"alpaca": loss, "replay": 0.8 * loss + 0.3},
        "token_share_by_source": {"alpaca": 0.8, "replay": 0.2},
    }  # fmt: skip


def event(kind: str, step: int, after_s: float, **facts: Any) -> dict[str, Any]:
    """One line of events.jsonl."""
    return {"time": BEGAN_S + after_s, "event": kind, "step": step, **facts}


PROMPTS = [
    "Give three tips for staying healthy.",
    f"Explain why this is not run: {EVIL}",
    "Write a haiku about gradient descent.",
]


def sample(step: int, prompt: str) -> dict[str, Any]:
    """One line of samples.jsonl."""
    tale = "the the the the tips tips" if step == 0 else "1. Sleep enough.\n2. Eat vegetables.\n3. Walk every day."
    answer = f"{tale} (as of step {step}) {EVIL if step else ''}"
    return {"step": step, "prompt": prompt, "answer": answer, "finished": step > 0, "tokens": 20}


def checkpoint(folder: Path, step: int, heldout_loss: float | None) -> None:
    """A checkpoint's meta.json and marker."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    files = {"rank-00000-of-00008.safetensors": {"bytes": 10 * 2**30}}
    meta = {"step": step, "heldout_loss": heldout_loss, "world_size": 8, "files": files}
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "COMPLETE").write_text("{}")
