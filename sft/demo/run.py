"""`sft demo`: the whole pipeline on a closed world that it makes itself, on CPU ranks, in a few minutes.

    world ─► tokenizer ─► base model (read the corpus) ─► fine-tuned on Alpaca rows ─► drift report

The models are real and tiny; the scores measure memory of the invented corpus, nothing else (see sft.demo.world).
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.template import alpaca_prompt
from sft.config import DemoConfig
from sft.demo import world
from sft.errors import UserError
from sft.settings import load

SEED = 0
MARKER = "demo"
"""File that marks a folder as one that an earlier demonstration made, and that may be replaced."""


def main(argv: Sequence[str]) -> None:
    """Make the world, train the base, fine-tune it, and report what it forgot."""
    import data_prep.build
    import sft.eval.drift
    from sft.cli import train

    config = load(DemoConfig, argv, prog="sft demo")
    out = _fresh_folder(Path(config.out))
    console = Console(highlight=False)
    started = time.monotonic()

    def chapter(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  [dim]({time.monotonic() - started:.0f} s)[/dim]")

    chapter("1. A closed world: facts, questions about them, and a task that the base does not know")
    world.write_world(out / "world", SEED)
    world.train_tokenizer(out / "world" / "corpus.jsonl", out / "base-init")
    _write_random_model(out / "base-init")

    chapter("2. The base model reads the corpus")
    corpus = f"[{{path: {out / 'world' / 'corpus.jsonl'}, format: text}}]"
    data_prep.build.main(
        _flags(sources=corpus, tokenizer=out / "base-init", seq_len=world.SEQ_LEN, out=out / "corpus-packs")
    )
    train(_training(out / "base-init", out / "corpus-packs", out / "base-run", world.BASE_TRAINING, config.ranks))

    chapter("3. Fine-tuning under ZeRO-3 on Alpaca rows: spell a word with dashes")
    base, tuned = out / "base-run" / "export", out / "tuned-run" / "export"
    rows = out / "world" / "alpaca.json"
    data_prep.build.main(_flags(sources=rows, tokenizer=base, seq_len=world.SEQ_LEN, out=out / "alpaca-packs"))
    train(_training(base, out / "alpaca-packs", out / "tuned-run", world.TUNING, config.ranks))

    chapter("4. One answer, before and after")
    row = world.held_out_row()
    prompt = alpaca_prompt(row["instruction"], row["input"])
    console.print(f"asked     {row['instruction']} {row['input']}", markup=False)
    for name, folder in (("base", base), ("tuned", tuned)):
        console.print(f"{name:<9} {_answer(folder, prompt)!r}", markup=False)
    console.print(f"expected  {row['output']!r}", markup=False)

    chapter("5. What did it forget?")
    evals = _flags(base=base, tuned=tuned, data=out / "world" / "evals", out=out / "drift", tasks="mmlu,hellaswag")
    sft.eval.drift.main(evals)
    console.print(f"\ndone in {time.monotonic() - started:.0f} s; everything is in {out}", markup=False)


def _fresh_folder(out: Path) -> Path:
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--out {out}: exists and was not made by a demonstration; choose another")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("made by sft demo; replaced by the next one\n")
    return out


def _write_random_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.tokenizer import load_tokenizer

    torch.manual_seed(SEED)
    config = LlamaConfig(**world.base_model_config(load_tokenizer(folder).vocab_size))
    LlamaForCausalLM(config).save_pretrained(folder)


def _training(model: Path, data: Path, out: Path, settings: dict[str, object], ranks: int) -> list[str]:
    """Flags of one training run; fp32 so that every CPU gives like numbers."""
    fixed = {
        "model.path": model,
        "data.train": data / "train",
        "out": out,
        "model.precision": "fp32",
        "track.wandb": "off",
    }
    return [*_flags(**{**fixed, **settings}), "--ranks", str(ranks)]


def _flags(**options: object) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def _answer(folder: Path, prompt: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from sft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ids = torch.tensor([[*tokenizer.bos, *tokenizer.encode(prompt)]])
    with torch.inference_mode():
        reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return tokenizer.hf.decode(reply[0, ids.shape[1] :], skip_special_tokens=True)
