"""What a checkpoint costs training: stall, time until it is on the disk, time to load, beside two peers, in one run.

    GPU   python benchmarks/checkpoint.py             a 1B Llama on one GPU, bf16
    CPU   python benchmarks/checkpoint.py             an 83M Llama on two ranks, fp32

All sides train the same engine (ZeRO-3, the shipped zero3.json) with the same step, and go on training while a save is
under way. The peers: DeepSpeed's own engine.save_checkpoint, and torch.distributed.checkpoint.async_save of the same
flat tensors, staged beside training. Each side runs in processes of its own. Files go below --folder: choose the disk
that checkpoints will live on. How fast that disk is follows from writing as many bytes plainly (write, fsync).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks.train import launch, write_packs  # noqa: E402
from sft.pretrained import quiet_libraries  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1000),
    "83m": (768, 2048, 10, 12, 4, 16000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
}
SIDES = {"ours": "sft", "deepspeed": "DeepSpeed", "dcp": "torch async_save"}


def main() -> None:
    """Print one table: ours and the peers'."""
    gpu = torch.cuda.is_available()
    quiet_libraries()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # for transformers, which imports deepspeed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b" if gpu else "83m", choices=SHAPES)
    parser.add_argument("--sides", default=",".join(SIDES), help="of " + ", ".join(SIDES))
    parser.add_argument("--ranks", type=int, default=1 if gpu else 2)
    parser.add_argument("--saves", type=int, default=5, help="saves, and loads, of each side")
    parser.add_argument("--plain-steps", type=int, default=3, help="steps without a save between two saves")
    parser.add_argument("--rows-per-step", type=int, default=16 if gpu else 2)
    parser.add_argument("--seq-len", type=int, default=4096 if gpu else 256)
    parser.add_argument("--folder", default=".", help="where checkpoints are written, under a temporary name")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else f'{os.cpu_count()} CPU cores, fp32'}")
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as name:
        folder = Path(name)
        make_inputs(options, folder)
        figures = {side: run_side(side, options, folder, gpu) for side in options.sides.split(",")}
    show(options, figures)


def make_inputs(options: argparse.Namespace, folder: Path) -> None:
    """A random model of the shape, and packs of synthetic documents for some steps; epochs repeat them."""
    hidden, intermediate, layers, heads, groups, vocab = SHAPES[options.model]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=options.seq_len,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    write_packs(folder / "packs", folder / "model", vocab, argparse.Namespace(**vars(options), steps=4))


def run_side(side: str, options: argparse.Namespace, folder: Path, gpu: bool) -> dict:
    """Figures of one side, from processes of its own."""
    facts = {
        "side": side, "saves": options.saves, "plain_steps": options.plain_steps,
        "result": str(folder / f"{side}.json"),
        "options": {
            "model.path": str(folder / "model"), "data.train": str(folder / "packs"), "out": str(folder / side),
            "batch.rows_per_step": options.rows_per_step, "batch.micro_batch": 1, "train.max_steps": 10**7,
            "model.precision": "bf16" if gpu else "fp32", "checkpoint.keep_last": 1, "track.wandb": "off",
        },
    }  # fmt: skip
    (folder / side / "checkpoints").mkdir(parents=True)
    launch(options.ranks, ["--module", "benchmarks.checkpoint_worker", json.dumps(facts)])
    for file in sorted((folder / side).rglob("*"), reverse=True):  # the next side needs the room
        file.rmdir() if file.is_dir() else file.unlink()
    return json.loads((folder / f"{side}.json").read_text())


def show(options: argparse.Namespace, figures: dict[str, dict]) -> None:
    """One column for each side, medians; the first save, which takes memory for the copy, apart."""
    plain_s = statistics.median(seconds for side in figures.values() for seconds in side["plain_write_s"])
    state = next(iter(figures.values()))["state_bytes"]
    print(f"{options.model} on {options.ranks} ranks: {state / 2**30:.2f} GiB of state, {options.saves} saves a side")
    if "ours" in figures and not figures["ours"]["copies"]:
        print("sft found no host memory for a copy: it wrote straight from the live state")
    print(f"plain write and fsync of as many bytes: {plain_s:.2f} s, {state / plain_s / 1e9:.2f} GB/s\n")
    rows = {
        "files, GiB": lambda told: statistics.median(told["gib"]),
        "step without a save, s": lambda told: statistics.median(told["plain_step_s"]),
        "step with a save under way, s": lambda told: statistics.median(told["saving_step_s"]),
        "stall of the first save, s": lambda told: told["stall_s"][0],
        "stall of a later save, s": lambda told: statistics.median(told["stall_s"][1:] or told["stall_s"]),
        "training lost by a save, s": lambda told: statistics.median(told["lost_s"][1:] or told["lost_s"]),
        "on the disk after, s": lambda told: statistics.median(told["durable_s"]),
        "GB/s until then": lambda told: state / statistics.median(told["durable_s"]) / 1e9,
        "load: digests, s": lambda told: statistics.median(told["check_s"]),
        "load: state, s": lambda told: statistics.median(told["load_s"]),
    }
    print(" " * 32 + "".join(f"{SIDES[side]:>18}" for side in figures))
    for title, value in rows.items():
        print(f"{title:<32}" + "".join(f"{value(told):>18.3f}" for told in figures.values()))


if __name__ == "__main__":
    main()
