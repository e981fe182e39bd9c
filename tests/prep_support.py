"""What the tests of data_prep share: tiny tokenizers made on the spot, rows, and a way to run the job."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import build
from data_prep.example import Example, Turn
from data_prep.shards import Shards, open_shards
from data_prep.template import render_alpaca
from sft.errors import run_command
from tests.tiny import FIRST_BYTE, SHARED

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data and tokenizers are not beside this checkout"
)

WORDS = ["below", "is", "an", "instruction", "that", "describes", "a", "task", "write", "response", "the", "request"]


def sentencepiece_tokenizer(folder: Path) -> Path:
    """A SentencePiece BPE model like Llama-2's: dummy prefix, byte fallback, no normalisation."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"{a} {b} {b}{a}" for a in WORDS for b in WORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_bpe_tokenizer(folder: Path) -> Path:
    """A byte-level BPE with GPT-2's pre-tokenizer and no BOS, trained here; <|end|> is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f"{a} {b}\n\n  {b}{a}, don't 123" for a in WORDS for b in WORDS], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def answer(prompt: str, response: str) -> Example:
    """A prompt and its supervised response, with a stop token behind it."""
    return Example((prompt + response,), (((len(prompt), len(prompt + response)),),), True)


def shared_examples() -> list[Example]:
    """Every row of the shared Alpaca files that has an output, rendered."""
    examples = []
    for path in sorted((SHARED / "data").glob("*.json")):
        for row in json.loads(path.read_bytes()):
            if row["output"].strip():
                asked = Turn("user", row["instruction"], row["input"])
                examples.append(render_alpaca([asked, Turn("assistant", row["output"], supervised=True)]))
    return examples


def byte_ids(text: str) -> list[int]:
    return [byte + FIRST_BYTE for byte in text.encode()]


def alpaca_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct rows of very unequal length, with and without input."""
    random = np.random.default_rng(seed)
    return [
        {
            "instruction": f"Task {number}",
            "input": "context " * int(random.integers(0, 3)),
            "output": f"answer {number} " + "é🙂x"[number % 3] * int(random.integers(1, 200)),
        }
        for number in range(count)
    ]


def write_json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(**options: Any) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def prepare(out: Path, **options: Any) -> Shards:
    """Run the job in this process and open its training split."""
    build.main(flags(**{"seq_len": 1024, "workers": 1, **options, "out": out}))
    return open_shards(out / "train")


def refused(capsys: pytest.CaptureFixture[str], main: Any, argv: Sequence[str]) -> str:
    """Run a command that must end with exit code 2 and one line; returns the line."""
    capsys.readouterr()
    assert run_command(main, argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def documents(shards: Shards) -> list[tuple[int, list[int], list[int]]]:
    """(doc id, ids, labels) of every document in every pack, cut apart by seq_lens."""
    found = []
    for index in range(len(shards)):
        pack = shards.pack(index)
        starts = np.cumsum(pack.seq_lens) - pack.seq_lens
        for doc_id, start, length in zip(pack.doc_ids.tolist(), starts.tolist(), pack.seq_lens.tolist(), strict=True):
            cut = slice(start, start + length)
            found.append((doc_id, pack.input_ids[cut].tolist(), pack.labels[cut].tolist()))
    return found


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
