"""Training throughput beside a peer, in one run: tokens/s, MFU and peak memory on packed documents.

    GPU   python benchmarks/train.py                  1B and 3B Llama shapes, 4096-token packs, one GPU
    CPU   python benchmarks/train.py                  a 20M Llama, 1024-token packs, two ranks
    own data                                          --data runs/alpaca-4k/train --tokenizer path/to/model

The peer is TRL's SFTTrainer where it is installed (pip install trl): the same packs, the same model, the same global
batch, AdamW, activation checkpointing and completion-only loss. On CPU both run under DeepSpeed ZeRO-3 with the shipped
zero3.json. Each side runs in processes of its own; the figure is the median over steps after the first two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from data_prep.pack import pack  # noqa: E402
from data_prep.shard_writer import Documents, write_shards  # noqa: E402
from data_prep.shards import open_shards  # noqa: E402
from sft.ports import free_port  # noqa: E402
from sft.pretrained import quiet_libraries  # noqa: E402
from sft.tokenizer import load_tokenizer  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "20m": (256, 688, 6, 8, 4, 32000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
}
WARMUP_STEPS = 2


def main() -> None:
    """Print one table: ours, the peer's, the ratio."""
    gpu = torch.cuda.is_available()
    quiet_libraries()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # for transformers, which imports deepspeed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,3b" if gpu else "20m", help="of " + ", ".join(SHAPES))
    parser.add_argument("--seq-len", type=int, default=4096 if gpu else 1024)
    parser.add_argument("--rows-per-step", type=int, default=16 if gpu else 4)
    parser.add_argument("--micro-batch", type=int, default=2 if gpu else 1)
    parser.add_argument("--steps", type=int, default=12 if gpu else 6)
    parser.add_argument("--ranks", type=int, default=1 if gpu else 2)
    parser.add_argument("--data", help="shard folder written by sft prep (default: documents of Alpaca-like lengths)")
    parser.add_argument("--tokenizer", help="tokenizer folder that --data was made with")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else f'{os.cpu_count()} CPU cores, fp32'}")
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(name, options, Path(folder), gpu)


def compare(name: str, options: argparse.Namespace, folder: Path, gpu: bool) -> None:
    """Run both sides on one model and print their figures."""
    model, data = make_inputs(name, options, folder)
    ours = run_ours(model, data, folder / "ours", options, gpu)
    show(f"{name} sft", ours)
    if find_spec("trl") is None:
        print("trl is not installed: no peer to compare with")
        return
    theirs = run_trl(model, data, folder / "trl.json", options, gpu)
    show(f"{name} trl", theirs)
    print(f"{name} ratio {ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}x")


def make_inputs(name: str, options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """A random model of the shape, and packs: the user's, or synthetic documents."""
    hidden, intermediate, layers, heads, groups, vocab = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=options.seq_len,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=name != "20m", dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    if options.data:
        for file in Path(options.tokenizer).glob("*token*"):
            (folder / "model" / file.name).write_bytes(file.read_bytes())
        return folder / "model", Path(options.data)
    make_tokenizer(folder / "model")
    write_packs(folder / "packs", folder / "model", vocab, options)
    return folder / "model", folder / "packs"


def write_packs(out: Path, tokenizer_folder: Path, vocab: int, options: argparse.Namespace) -> None:
    """Documents of log-normal length (median 120 tokens, 60 % supervised, as in Alpaca), enough for every step."""
    random = np.random.RandomState(0)
    wanted = options.steps * options.rows_per_step * options.seq_len
    lengths = np.clip(random.lognormal(np.log(120), 0.7, wanted // 100), 16, options.seq_len).astype(np.int32)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), wanted)) + 1]
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    documents = Documents(
        ids=random.randint(3, vocab, int(lengths.sum())).astype(np.int32), starts=starts, lengths=lengths,
        runs=np.stack([(lengths * 0.4).astype(np.int32), lengths], axis=1), first_run=np.arange(len(lengths)),
        num_runs=np.ones(len(lengths), np.int32), doc_ids=np.arange(len(lengths)),
        source_ids=np.zeros(len(lengths), np.int16),
    )  # fmt: skip
    tokenizer = load_tokenizer(tokenizer_folder)
    facts = {
        "path": "synthetic",
        "digest": tokenizer.digest,
        "vocab_size": vocab,
        "bos_id": 1,
        "eos_id": 2,
        "stop_id": 2,
        "probe": [],
    }
    write_shards(
        out,
        documents,
        pack(lengths, options.seq_len),
        {
            "content_key": "benchmark",
            "seq_len": options.seq_len,
            "template": [],
            "sources": [{"name": "synthetic"}],
            "tokenizer": facts,
        },
    )


def run_ours(model: Path, data: Path, out: Path, options: argparse.Namespace, gpu: bool) -> dict[str, float | None]:
    """Our trainer, through the deepspeed launcher, as a user runs it."""
    flags = {
        "model.path": model, "data.train": data, "out": out, "batch.rows_per_step": options.rows_per_step,
        "batch.micro_batch": options.micro_batch, "train.max_steps": options.steps, "track.wandb": "off",
        "model.precision": "bf16" if gpu else "fp32", "checkpoint.every": 10**6, "train.stop_after": options.steps - 1,
    }  # fmt: skip
    launch(
        options.ranks,
        ["--module", "sft.train", *[text for key, value in flags.items() for text in (f"--{key}", str(value))]],
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARMUP_STEPS:]
    return {
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
        "mfu": statistics.median(line["mfu"] for line in lines) if lines[0]["mfu"] else None,
        "peak_mem_gib": lines[-1]["peak_mem_gib"],
    }


def run_trl(model: Path, data: Path, out: Path, options: argparse.Namespace, gpu: bool) -> dict[str, float | None]:
    """TRL's SFTTrainer in a process per rank, started by the same launcher."""
    facts = {
        "model": str(model), "data": str(data), "out": str(out), "gpu": gpu, "steps": options.steps - 1,
        "micro_batch": options.micro_batch, "strategy": str(REPO / "ds_configs" / "zero3.json"),
        "accumulation": options.rows_per_step // options.micro_batch // options.ranks,
    }  # fmt: skip
    launch(options.ranks, [str(REPO / "benchmarks" / "train_trl.py"), json.dumps(facts)])
    steps = json.loads(out.read_text())
    times = steps["step_time_s"][WARMUP_STEPS:]
    tokens = open_shards(data).num_tokens.mean() * options.rows_per_step
    return {"tokens_per_s": tokens / statistics.median(times), "mfu": None, "peak_mem_gib": steps["peak_mem_gib"]}


def launch(ranks: int, command: list[str]) -> None:
    """Run under the deepspeed launcher; output only on failure."""
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_port",
        free_port(),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def show(title: str, figures: dict[str, float | None]) -> None:
    """One line of figures."""
    parts = [f"{title:<8} {figures['tokens_per_s']:>10,.0f} tokens/s"]
    parts += [f"MFU {figures['mfu']:.1%}"] if figures["mfu"] else []
    parts += [f"peak {figures['peak_mem_gib']:.1f} GiB"] if figures["peak_mem_gib"] else []
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
