"""Samples during training: fixed prompts, answered greedily by the live engine before the first step and on the way.

No second model, no gathered weights, no cache of keys and values: the unfinished answers lie end to end like documents
of a pack, and each token is one forward of all of them, spread over the ranks, through the path that training takes.
So an answer of n tokens to a prompt of p costs the forward of about n (p + n / 2) tokens, a third of what training on
as many costs or less; and under ZeRO-3 each of the n forwards gathers the weights once. For a handful of prompts every
few hundred steps that is little; for real evaluations export the model.

Everything stands in <out>/samples.jsonl, a line for each prompt and time: {step, prompt, answer, finished, tokens},
step 0 being the base model; finished: a stop token was seen; tokens: of the answer, without it.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft import batch, checkpoint, resume
from sft.sample_prompts import SamplePrompts
from sft.sequence import own_part
from sft.step import Run

FILE = "samples.jsonl"
NOTHING = -1
"""In the place of a token id: no rank computed this prompt."""


def begin(run: Run, newest: Path | None) -> None:
    """Ask the base model; before a checkpoint is loaded: the engine holds the base model only until then. Collective.

    Without a checkpoint the run begins anew, perhaps with another model, and nothing stays of an earlier start.
    """
    forget_after(run, checkpoint.step_of(newest) if newest else -1)
    look(run, 0)


def look(run: Run, step: int, *, is_last: bool = False) -> None:
    """Ask after optimizer step `step`, where it is due and not yet done; it is due after the last. Collective."""
    samples, settings = run.inputs.samples, run.config.eval.samples
    if samples is None or not (step % settings.every == 0 or is_last):
        return
    path = run.out / FILE
    if resume.on_first_rank(lambda: [line["prompt"] for line in _read(path) if line["step"] == step] == samples.shown):
        return
    started_s = time.perf_counter()
    replies = answer(run, samples, step)
    if replies is None:
        return
    lines = [describe(run, samples, number, ids, step) for number, ids in enumerate(replies)]
    resume.on_first_rank(lambda: put(path, step, lines))
    run.recorder.event(
        "samples",
        step,
        prompts=len(lines),
        finished=sum(line["finished"] for line in lines),
        tokens=sum(line["tokens"] for line in lines),
        seconds=round(time.perf_counter() - started_s, 3),
    )
    run.recorder.texts(step, "samples", ["prompt", "answer"], [[line["prompt"], line["answer"]] for line in lines])
    tell(run, lines[0])


def put(path: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """Lines of `step` in the place of those that are there of it.

    Others stay: a start whose file of prompts has changed asks the base model anew, in the middle of the run.
    """
    others = [line for line in _read(path) if line["step"] != step]
    _write(path, sorted([*others, *lines], key=lambda line: line["step"]))


def forget_after(run: Run, step: int) -> None:
    """Drop the answers of steps that will be taken again. Collective."""
    path = run.out / FILE

    def drop() -> None:
        if path.is_file():
            _write(path, [line for line in _read(path) if line["step"] <= step])

    resume.on_first_rank(drop)


def answer(run: Run, samples: SamplePrompts, step: int) -> list[list[int]] | None:
    """New ids of each prompt, the stop token included; the same on every rank, and every rank runs as many forwards.

    After each forward all ranks learn every prompt's next token, so all agree, without another word, on which answers
    go on and on which rank, and on when the last one ends.

    Returns:
        None where the run was asked to stop meanwhile.
    """
    longest, shares, device = run.config.eval.samples.max_new_tokens, run.shares, run.numerics.device
    room = run.inputs.micro_batch * run.inputs.train.manifest["seq_len"]  # what training shows to fit
    replies: list[list[int]] = [[] for _ in samples.ids]
    run.engine.eval()
    with torch.no_grad():
        while going := [n for n, ids in enumerate(replies) if len(ids) < longest and samples.stops.isdisjoint(ids)]:
            if run.stop.agreed():
                return None
            run.watch.mark("samples", step)
            texts = [np.concatenate([samples.ids[n], replies[n]]) for n in going[shares.data_rank :: shares.data_ranks]]
            own = going[shares.data_rank :: shares.data_ranks][: count_fitting(texts, room)]
            asked = batch.build_scored([(ids, [np.zeros(1, np.int64)]) for ids in texts[: len(own)]], device)
            part = own_part(asked, shares)
            next_P = torch.full((len(replies),), NOTHING, dtype=torch.int64, device=device)
            numbers = batch.to_device(np.array(own, dtype=np.int64), device)
            next_P[numbers[part.source_N]] = run.engine(part, ask="next")
            dist.all_reduce(next_P, dist.ReduceOp.MAX)
            for ids, token in zip(replies, next_P.tolist(), strict=True):
                ids.extend([token] if token != NOTHING else [])
    run.engine.train()
    return replies


def count_fitting(texts: Sequence[np.ndarray], room: int) -> int:
    """How many texts, from the first on, lie in `room` tokens; at least one, if there is one."""
    ends = np.cumsum([len(ids) for ids in texts])
    return max(min(1, len(texts)), int((ends <= room).sum()))


def describe(run: Run, samples: SamplePrompts, number: int, ids: Sequence[int], step: int) -> dict[str, Any]:
    """The line of samples.jsonl."""
    finished = bool(ids) and ids[-1] in samples.stops
    kept = ids[:-1] if finished else ids
    return {
        "step": step,
        "prompt": samples.shown[number],
        "answer": run.inputs.tokenizer.decode(kept),
        "finished": finished,
        "tokens": len(kept),
    }


def tell(run: Run, line: dict[str, Any]) -> None:
    """What became of the first prompt, for people: the base model's answer, and the one now."""
    before = resume.on_first_rank(
        lambda: [old for old in _read(run.out / FILE) if old["step"] == 0 and old["prompt"] == line["prompt"]]
    )
    width = shutil.get_terminal_size().columns
    run.recorder.say(cut_line(f"sample: {line['prompt']}", width))
    shown = {"of the base model": before[0]} if before else {}
    if line["step"]:
        shown[f"after step {line['step']}"] = line
    for when, one in shown.items():
        run.recorder.say("  " + cut_line(f"{when}: {one['answer']}", width - 2))


def cut_line(text: str, width: int) -> str:
    """One line of at most `width` characters, without what would move a terminal's cursor."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of samples.jsonl, in order; none where there is no file. What is not such a line is left out."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and {"prompt", "answer"} <= line.keys():
                found.append(line)
    return found


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
