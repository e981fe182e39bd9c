"""`sft demo`: the whole pipeline on a closed world that it makes itself, on CPU ranks, in a few minutes.

    world ─► tokenizer ─► base model (reads the corpus) ─┬─► fine-tuned on Alpaca rows ─────────────┬─► drift reports
                                                         └─► on these rows and the corpus again ────┘

Every step is the command that a user would type, and it is printed. The models are real and tiny; the scores
measure memory of the invented corpus, nothing else (see sft.demo.world).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config import DemoConfig
from sft.demo import world
from sft.errors import EXIT_GATE_FAILED, UserError
from sft.pretrained import quiet_libraries
from sft.settings import load
from sft.tokenizer import load_tokenizer

SEED = 0
NOISE_ITEMS = 32
"""Of each task, asked twice: fp32 on CPUs moves none of them."""
MARKER = "made-by-sft-demo"
"""File of a folder that an earlier demonstration made, and that may be replaced."""


def main(argv: Sequence[str]) -> None:
    """Make the world, train the base, fine-tune it with and without replay, and report what each forgot."""
    config = load(DemoConfig, argv, prog="sft demo")
    out = _fresh_folder(Path(config.out))
    console = Console(highlight=False, soft_wrap=True)
    started_s = time.monotonic()

    def chapter(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - started_s:.0f} s[/dim]")

    chapter("1. A closed world: facts, questions about them, and a task that the base does not know")
    world.write_world(out / "world", SEED)
    (out / "questions.txt").write_text(world.held_out_row()["instruction"] + "\n", encoding="utf-8")
    world.train_tokenizer(out / "world" / "corpus.jsonl", out / "base-init")
    _write_random_model(out / "base-init")

    chapter("2. A tiny base model reads the corpus")
    corpus = {"path": f"{out}/world/corpus.jsonl", "format": "text"}
    _prepare([corpus], out / "base-init", out / "corpus-packs")
    reading = _settings(world.BASE_ROWS_PER_STEP, world.BASE_STEPS, world.BASE_LR, world.BASE_WARMUP_STEPS)
    # a base comes from elsewhere; ZeRO-2, which gathers no weights, takes half the time for it
    _train(out / "base-init", out / "corpus-packs", out / "base-run", {**reading, "deepspeed": "zero2"}, config.ranks)

    chapter("3. Fine-tuning under ZeRO-3: say what kind of thing a word names")
    base, tuned, replayed = (out / f"{name}-run" / "export" for name in ("base", "tuned", "replay"))
    rows = {"path": f"{out}/world/alpaca.json"}
    _prepare([rows], base, out / "alpaca-packs", heldout=world.HELDOUT)
    naming = _settings(world.TUNE_ROWS_PER_STEP, world.TUNE_STEPS, world.TUNE_LR, world.TUNE_WARMUP_STEPS)
    _train(base, out / "alpaca-packs", out / "tuned-run", naming, config.ranks)

    chapter("4. What did it forget? The gate allows five points")
    console.print(_gate_in_words(_drift(out, base, [tuned], out / "drift")), markup=False)

    chapter("5. The same fine-tuning, with the corpus replayed beside it")
    rehearsal = {**corpus, "role": "replay", "ratio": world.REPLAY_RATIO}
    _prepare([rows, rehearsal], base, out / "replay-packs", heldout=world.HELDOUT)
    watched = {"data.heldout": out / "replay-packs" / "heldout", "eval.every": world.REPLAY_STEPS // 6}
    asked = {"prompts": out / "questions.txt", "every": world.REPLAY_STEPS // 3, "max_new_tokens": 16}
    watched |= {f"eval.samples.{name}": value for name, value in asked.items()}
    longer = naming | {"train.max_steps": world.REPLAY_STEPS} | watched
    _train(base, out / "replay-packs", out / "replay-run", longer, config.ranks)
    _sft("report", {"run": out / "replay-run"})

    chapter("6. What did that one forget?")
    console.print(_gate_in_words(_drift(out, base, [replayed, tuned], out / "drift-replay")), markup=False)

    chapter("7. One question that no fine-tuning row asks in these words")
    console.print("\n".join(_answers(out)), markup=False)
    console.print(f"\nall done in {time.monotonic() - started_s:.0f} s; everything is in {out}", markup=False)


def _fresh_folder(out: Path) -> Path:
    if out.is_file():
        raise UserError(f"--out {out}: is a file; choose a folder")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--out {out}: exists and was not made by a demonstration; choose another")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    return out


def _write_random_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_libraries()
    torch.manual_seed(SEED)
    config = LlamaConfig(**world.base_model_config(load_tokenizer(folder).vocab_size))
    LlamaForCausalLM(config).save_pretrained(folder)


def _prepare(sources: Sequence[Mapping[str, Any]], tokenizer: Path, out: Path, heldout: float = 0.0) -> None:
    options = {"sources": json.dumps(sources), "tokenizer": tokenizer, "seq_len": world.SEQ_LEN, "out": out}
    _sft("prep", options | ({"heldout": heldout} if heldout else {}))


def _settings(rows_per_step: int, steps: int, lr: float, warmup: int) -> dict[str, Any]:
    return {"batch.rows_per_step": rows_per_step, "train.max_steps": steps, "optim.lr": lr, "schedule.warmup": warmup}


def _train(model: Path, packs: Path, out: Path, settings: Mapping[str, Any], ranks: int) -> None:
    """fp32, so that every CPU gives like numbers; nothing recomputed and one forward per step, for speed."""
    model_flags = {"model.path": model, "model.precision": "fp32", "model.activation_checkpointing": "none"}
    batch_flags = {"data.train": packs / "train", "batch.micro_batch": settings["batch.rows_per_step"] // ranks}
    _sft("train", {**model_flags, **batch_flags, **settings, "track.wandb": "off", "out": out, "ranks": ranks})


def _drift(out: Path, base: Path, tuned: Sequence[Path], report: Path) -> int:
    """Compare the models with the base; the gate is on the first. Returns the exit code, 0 or 3."""
    asked = {
        "base": base,
        "tuned": ",".join(map(str, tuned)),
        "data": out / "world" / "evals",
        "heldout": out / "alpaca-packs" / "heldout",
        "answers.prompts": out / "questions.txt",
        "noise_items": NOISE_ITEMS,
    }
    return _sft("drift", {**asked, "dtype": "fp32", "gate.max_drop": world.MAX_DROP, "out": report}, EXIT_GATE_FAILED)


def _gate_in_words(code: int) -> str:
    if code == EXIT_GATE_FAILED:
        return f"exit code {code}: a pipeline would stop here and keep the base; the demonstration goes on"
    return f"exit code {code}: a pipeline would go on with this model"


def _sft(command: str, options: Mapping[str, Any], allowed: int = 0) -> int:
    """Print and run one `sft` command; an exit code that is neither 0 nor `allowed` ends the demonstration with it."""
    arguments = [command, *[text for name, value in options.items() for text in (f"--{name}", str(value))]]
    sys.stdout.write(f"$ sft {shlex.join(arguments)}\n")
    sys.stdout.flush()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "sft.cli", *arguments], env=environment, check=False)
    if done.returncode not in (0, allowed):
        raise SystemExit(done.returncode)
    return done.returncode


def _answers(out: Path) -> list[str]:
    """What the three models answered to the first question, from the two reports."""
    plain, replay = (
        json.loads((out / name / "drift.json").read_text(encoding="utf-8"))["answers"][0]
        for name in ("drift", "drift-replay")
    )
    said = {"asked": plain["prompt"], "base": plain["base"], "tuned": plain["tuned"], "replay": replay["tuned"]}
    said["expected"] = world.held_out_row()["output"]
    return [f"{who:<9} {' / '.join(text.splitlines())}" for who, text in said.items()]
