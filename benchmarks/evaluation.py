"""Scoring MMLU and HellaSwag beside lm_eval's HF backend, in one run, on the same items and the same model.

    python benchmarks/evaluation.py --data evals/hub --tokenizer path/to/tokenizer
    python benchmarks/evaluation.py --data evals/hub --model path/to/model --tasks mmlu-5 --limit 50

Whole command against whole command: `sft eval` and `lm_eval run --model hf`, each in a process of its own, in turns.
"start" is the time until the first forward: imports, data, prompts, token ids, weights. --data is a folder as on the
hub (cais/mmlu, Rowan/hellaswag, each a README.md with `configs:`), which lm_eval finds because it runs there. Without
--model a random Llama is made. Both compute in fp32 with as many threads on as many cores.

Ours is shown with an empty cache of token ids, which is what the ratios take, and with a full one, as the second model
of a comparison finds it. lm_eval keeps its data sets from an earlier run, and its fastest batch size counts. Figures
are medians over --repeats runs; CPU seconds say more than wall time where the machine is shared. It needs lm_eval (pip
install lm_eval).
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from sft.eval.earlier import read_scored  # noqa: E402
from sft.eval.results import HEADLINE  # noqa: E402
from sft.pretrained import quiet_libraries  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "20m": (256, 688, 6, 8, 4),
    "110m": (768, 2048, 6, 12, 4),
}
TASKS = {"mmlu-5": ("mmlu", 5), "hellaswag-0": ("hellaswag", 0), "hellaswag-10": ("hellaswag", 10)}
COLD, WARM = "sft eval", "sft eval, ids kept"


@dataclass(frozen=True)
class Run:
    """One whole command."""

    out: Path
    wall_s: float
    cpu_s: float
    """Of all its threads, in user mode and in the kernel."""
    start_s: float
    """Until the first forward."""
    tokens: int
    """Computed, without padding."""
    padded_tokens: int | None
    """With padding; not known of ours."""


def main() -> None:
    """Print one table per task: ours, lm_eval's at every batch size, ratios, and whether they decide the same."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # for transformers, which imports deepspeed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cais/mmlu and Rowan/hellaswag as on the hub")
    parser.add_argument("--model", help="folder of the model (default: a random Llama)")
    parser.add_argument("--tokenizer", help="folder of the random Llama's tokenizer")
    parser.add_argument("--shape", default="20m", choices=SHAPES, help="of the random Llama")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--limit", type=int, help="items of every MMLU subject and of HellaSwag")
    parser.add_argument("--batch-sizes", default="1,8,32", help="lm_eval's, whose default is 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if find_spec("lm_eval") is None:
        sys.exit("lm_eval is not installed: no peer to compare with (pip install lm_eval)")
    if not options.model and not options.tokenizer:
        parser.error("give --model, or --tokenizer for a random one")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    print(f"{options.threads} threads, fp32, median of {options.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model).resolve() if options.model else make_model(options, folder / "model")
        for task in options.tasks.split(","):
            (folder / task).mkdir()
            compare(task, model, options, folder / task)


def make_model(options: argparse.Namespace, folder: Path) -> Path:
    """A random Llama in fp32, with its tokenizer as transformers saves it: both sides read the same tokenizer.json."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quiet_libraries()
    hidden, intermediate, layers, heads, groups = SHAPES[options.shape]
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"random Llama, hidden {hidden}, {layers} layers, vocabulary {len(tokenizer):,}")
    return folder


def compare(task: str, model: Path, options: argparse.Namespace, folder: Path) -> None:
    """Both sides on one task, in turns."""
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    theirs = [f"lm_eval, batch {size}" for size in sizes]
    runs: dict[str, list[Run]] = {title: [] for title in (COLD, WARM, *theirs)}
    run_lm_eval(task, model, options, folder, sizes[-1], "data", limit=1)  # leaves its data sets in its cache
    for turn in range(options.repeats):
        for title in (COLD, WARM):
            cache = folder / f"cache-{turn}"  # empty for the first, filled for the second
            runs[title].append(run_ours(task, model, options, folder, cache, f"{title}-{turn}"))
        for title, size in zip(theirs, sizes, strict=True):
            out = f"{title}-{turn}"
            runs[title].append(run_lm_eval(task, model, options, folder, size, out, limit=options.limit))
    show(task, runs, min(theirs, key=lambda title: median(runs[title], "wall_s")))


def show(task: str, runs: dict[str, list[Run]], fastest: str) -> None:
    """The table of one task."""
    print(f"\n{task}\n{'':<20}{'wall s':>9}{'start s':>9}{'rest s':>9}{'CPU s':>9}{'tokens':>13}{'with padding':>14}")
    for title, group in runs.items():
        wall_s, start_s, cpu_s = (median(group, name) for name in ("wall_s", "start_s", "cpu_s"))
        padded = group[0].padded_tokens
        shown = f"{padded:>14,}" if padded is not None else ""
        seconds = "".join(f"{value:>9.1f}" for value in (wall_s, start_s, wall_s - start_s, cpu_s))
        print(f"{title:<20}{seconds}{group[0].tokens:>13,}{shown}")
    ours, kept, theirs = runs[COLD], runs[WARM], runs[fastest]
    wall, warm, cpu = (
        median(theirs, "wall_s") / median(ours, "wall_s"),
        median(theirs, "wall_s") / median(kept, "wall_s"),
        median(theirs, "cpu_s") / median(ours, "cpu_s"),
    )
    rest = (median(theirs, "wall_s") - median(theirs, "start_s")) / (median(ours, "wall_s") - median(ours, "start_s"))
    print(
        f"against {fastest}: {wall:.1f}x for the whole command ({warm:.1f}x with ids kept), {rest:.1f}x without start, "
        f"{cpu:.1f}x in CPU time, {theirs[0].tokens / ours[0].tokens:.2f}x fewer tokens"
    )
    print(describe_agreement(TASKS[task][0], ours[0].out, theirs[0].out), flush=True)


def describe_agreement(task: str, ours: Path, theirs: Path) -> str:
    """How many items both decide alike, under the task's headline metric, and how far the scores are apart."""
    one, other = (
        {(record.subject, record.doc_id): record for record in read_scored(out, [task]).records[task]}
        for out in (ours, theirs)
    )
    if one.keys() != other.keys():
        return f"NOT THE SAME ITEMS: {len(one.keys() ^ other.keys())} are in one of the results only"
    attribute = "pred" if HEADLINE[task] == "acc" else "pred_norm"
    same = sum(getattr(one[key], attribute) == getattr(other[key], attribute) for key in one)
    furthest = max(float(np.abs(np.subtract(one[key].lls, other[key].lls)).max()) for key in one)
    return f"decisions: {same:,} of {len(one):,} items identical; log-likelihoods differ by {furthest:.1e} at most"


def median(runs: list[Run], name: str) -> float:
    """Of one figure over the repeats."""
    return statistics.median(getattr(run, name) for run in runs)


def run_ours(task: str, model: Path, options: argparse.Namespace, folder: Path, cache: Path, name: str) -> Run:
    """`sft eval`, as a user calls it."""
    kind, shots = TASKS[task]
    flags = {
        "model": model, "data": Path(options.data).resolve(), "tasks": kind, f"shots.{kind}": shots, "dtype": "fp32",
        "out": folder / name,
    }  # fmt: skip
    if options.limit:
        flags["limit"] = options.limit
    command = ["sft", "eval", *[text for key, value in flags.items() for text in (f"--{key}", str(value))]]
    found = run("ours", command, options, folder, {"XDG_CACHE_HOME": str(cache)})
    results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
    return Run(folder / name, **found, tokens=results["tasks"][kind]["tokens"], padded_tokens=None)


def run_lm_eval(
    task: str, model: Path, options: argparse.Namespace, folder: Path, size: int, name: str, *, limit: int | None
) -> Run:
    """`lm_eval run --model hf`, with its samples, as ours writes its own."""
    kind, shots = TASKS[task]
    flags = {
        "model": "hf", "model_args": f"pretrained={model},dtype=float32", "device": "cpu", "num_fewshot": shots,
        "tasks": "hellaswag" if kind == "hellaswag" else ",".join(f"mmlu_{name}" for name in subjects(options.data)),
        "batch_size": size, "output_path": folder / name,
    }  # fmt: skip
    if limit:
        flags["limit"] = limit
    command = ["lm_eval", "run", "--log_samples"]
    command += [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    found = run("lm_eval", command, options, folder, {"HF_HOME": str(folder / "huggingface")})
    return Run(folder / name, **found)


def subjects(data: str) -> list[str]:
    """MMLU's subjects in the folder: what its README.md configures."""
    readme = Path(data) / "cais" / "mmlu" / "README.md"
    return re.findall(r"config_name: (\S+)", readme.read_text(encoding="utf-8"))


def run(side: str, command: list[str], options: argparse.Namespace, folder: Path, own: dict[str, str]) -> dict:
    """Seconds of a whole command, and what its process noted; leaves with its messages where it fails."""
    result = folder / "result.json"
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", **own,
    }  # fmt: skip
    used_s, started_s = children_cpu_s(), time.time()
    facts = {
        "side": side,
        "command": command,
        "folder": str(Path(options.data).resolve()),
        "result": str(result),
        "started_s": started_s,
    }
    worker = [sys.executable, str(REPO / "benchmarks" / "evaluation_worker.py"), json.dumps(facts)]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, check=False)
    wall_s = time.time() - started_s
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"wall_s": wall_s, "cpu_s": children_cpu_s() - used_s, **found}


def children_cpu_s() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
