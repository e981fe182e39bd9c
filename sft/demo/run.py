"""`sft demo`: the whole pipeline on a closed world that it makes itself, on CPU ranks, in a few minutes.

    world ─► tokenizer ─► base model (reads the corpus) ─► fine-tuned on Alpaca rows ─► drift report

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

from data_prep.template import alpaca_prompt
from sft.config import DemoConfig
from sft.demo import world
from sft.errors import UserError
from sft.pretrained import load_causal_lm, quiet_libraries
from sft.settings import load
from sft.tokenizer import load_tokenizer

SEED = 0
MARKER = "made-by-sft-demo"
"""File of a folder that an earlier demonstration made, and that may be replaced."""
MAX_ANSWER_TOKENS = 40


def main(argv: Sequence[str]) -> None:
    """Make the world, train the base, fine-tune it, and report what it forgot."""
    config = load(DemoConfig, argv, prog="sft demo")
    out = _fresh_folder(Path(config.out))
    console = Console(highlight=False, soft_wrap=True)
    started_s = time.monotonic()

    def chapter(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - started_s:.0f} s[/dim]")

    chapter("1. A closed world: facts, questions about them, and a task that the base does not know")
    world.write_world(out / "world", SEED)
    world.train_tokenizer(out / "world" / "corpus.jsonl", out / "base-init")
    _write_random_model(out / "base-init")

    chapter("2. A tiny base model reads the corpus")
    corpus = json.dumps([{"path": f"{out}/world/corpus.jsonl", "format": "text"}])
    _prepare(corpus, out / "base-init", out / "corpus-packs")
    reading = _settings(world.BASE_ROWS_PER_STEP, world.BASE_STEPS, world.BASE_LR, world.BASE_WARMUP_STEPS)
    _train(out / "base-init", out / "corpus-packs", out / "base-run", reading, config.ranks)

    chapter("3. Fine-tuning under ZeRO-3: say what kind of thing a word names")
    base, tuned = out / "base-run" / "export", out / "tuned-run" / "export"
    rows = json.dumps([{"path": f"{out}/world/alpaca.json"}])
    _prepare(rows, base, out / "alpaca-packs")
    naming = _settings(world.TUNE_ROWS_PER_STEP, world.TUNE_STEPS, world.TUNE_LR, world.TUNE_WARMUP_STEPS)
    _train(base, out / "alpaca-packs", out / "tuned-run", naming, config.ranks)

    chapter("4. One answer, before and after")
    row = world.held_out_row()
    console.print(f"asked     {row['instruction']} {row['input']}", markup=False)
    for name, folder in (("base", base), ("tuned", tuned)):
        console.print(f"{name:<9} {_answer(folder, alpaca_prompt(row['instruction'], row['input']))}", markup=False)
    console.print(f"expected  {row['output']}", markup=False)

    chapter("5. What did it forget?")
    _sft(
        "drift", {"base": base, "tuned": tuned, "data": out / "world" / "evals", "dtype": "fp32", "out": out / "drift"}
    )
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


def _prepare(sources: str, tokenizer: Path, out: Path) -> None:
    _sft("prep", {"sources": sources, "tokenizer": tokenizer, "seq_len": world.SEQ_LEN, "out": out})


def _settings(rows_per_step: int, steps: int, lr: float, warmup: int) -> dict[str, Any]:
    return {"batch.rows_per_step": rows_per_step, "train.max_steps": steps, "optim.lr": lr, "schedule.warmup": warmup}


def _train(model: Path, packs: Path, out: Path, settings: Mapping[str, Any], ranks: int) -> None:
    """fp32, so that every CPU gives like numbers; nothing recomputed and one forward per step, for speed."""
    model_flags = {"model.path": model, "model.precision": "fp32", "model.activation_checkpointing": "none"}
    batch_flags = {"data.train": packs / "train", "batch.micro_batch": settings["batch.rows_per_step"] // ranks}
    _sft("train", {**model_flags, **batch_flags, **settings, "track.wandb": "off", "out": out, "ranks": ranks})


def _sft(command: str, options: Mapping[str, Any]) -> None:
    """Print and run one `sft` command; a failure ends the demonstration with its exit code."""
    arguments = [command, *[text for name, value in options.items() for text in (f"--{name}", str(value))]]
    sys.stdout.write(f"$ sft {shlex.join(arguments)}\n")
    sys.stdout.flush()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "sft.cli", *arguments], env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _answer(folder: Path, prompt: str) -> str:
    """The model's greedy answer to `prompt`, special tokens left out."""
    import torch

    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, dtype=torch.float32, attention="sdpa")
    ids_1T = torch.tensor([[*tokenizer.bos, *tokenizer.encode(prompt)]])
    with torch.inference_mode():
        reply_1T = model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False
        )
    return str(tokenizer.hf.decode(reply_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)).replace("\n", " / ")
