"""Small stand-ins that tests share: a tokenizer, a model, shards, strategy files, and real ranks on CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sft.ports import free_port

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

# tiny models stay gathered under the default thresholds, which hides collective mismatches
RELEASE_AT_ONCE = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


BOS, EOS, FIRST_BYTE = 1, 2, 3


def make_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> Path:
    """Ids are byte + 3 (after <unk>, <s>, </s>), so that expected ids can be written by hand; merges come after."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *_byte_tokens(), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_tokens() -> list[str]:
    """The printable stand-ins of ByteLevel, in byte order."""
    from tokenizers import pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    table = {byte: chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)}
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet()), "tokenizers changed its byte alphabet"
    return [table[byte] for byte in range(256)]


def make_model(folder: Path, seed: int = 0, **overrides: object) -> Path:
    """A random Llama of about 40k parameters with the byte tokenizer, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough that attention matters and a leak between documents shows
        **overrides,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return make_tokenizer(folder)


def make_alpaca(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """Alpaca rows with outputs of very unequal length."""
    random = np.random.RandomState(seed)
    words = ["red", "green", "blue", "one", "two", "three"]
    data = [
        {
            "instruction": f"Say item {index}",
            "input": "twice" if index % 3 == 0 else "",
            "output": " ".join(random.choice(words, size=1 + index % 7 * 3)),
        }
        for index in range(rows)
    ]
    path.write_text(json.dumps(data))
    return path


def make_strategy(path: Path, stage: int = 3, **zero: object) -> Path:
    """A strategy file that releases parameters at once, so that every rank must re-gather them."""
    settings = {
        "stage": stage,
        "overlap_comm": False,
        "memory_efficient_linear": False,
        "reduce_bucket_size": 1000,
        **zero,
    }
    if stage == 3:
        settings |= RELEASE_AT_ONCE
    strategy = {
        "zero_optimization": settings,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    path.write_text(json.dumps(strategy))
    return path


def python_path(*first: Path) -> str:
    """PYTHONPATH with these folders in front of what it holds."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def rank_environment() -> dict[str, str]:
    """Environment of test processes: CPU, one thread, offline."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": python_path(REPO / "tests" / "offline", REPO),
    }


def run(command: list[str], timeout_s: int = 240, environment: dict[str, str] | None = None, **options: object):
    """Run a command to its end and return its output; a hang is an error."""
    environment = environment or rank_environment()
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
    )


def run_module(ranks: int, module: str, *arguments: str, timeout_s: int = 240):
    """Start `ranks` real processes over gloo through DeepSpeed's own launcher."""
    return run([*_launcher(ranks), "--module", module, *arguments], timeout_s)


def run_module_on_gpu(ranks: int, module: str, *arguments: str, timeout_s: int = 240):
    """The same on GPUs, over NCCL."""
    return run([*_launcher(ranks), "--module", module, *arguments], timeout_s, gpu_environment())


def gpu_environment() -> dict[str, str]:
    """Environment of test processes that compute on GPUs: offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(REPO)}
    environment.pop("DS_ACCELERATOR", None)
    return environment


def _launcher(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", free_port()]


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_evals(folder: Path, subjects: tuple[str, ...] = ("anatomy", "virology"), items: int = 4) -> Path:
    """Invented MMLU and HellaSwag items in the hub's layout."""
    for subject in subjects:
        target = folder / "cais" / "mmlu" / subject
        target.mkdir(parents=True)
        for split, count in (("dev", 5), ("test", items)):
            rows = [
                {
                    "question": f"What is {subject} {split} {index}?",
                    "subject": subject,
                    "choices": [f"w{index}", "x", f"y {index}", "z"],
                    "answer": index % 4,
                }
                for index in range(count)
            ]
            _write_jsonl(target / f"{split}.jsonl", rows)
    target = folder / "Rowan" / "hellaswag"
    target.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [
            {
                "ind": index,
                "activity_label": "Baking",
                "ctx_a": f"The {split} baker {index} mixes dough.",
                "ctx_b": "then he",
                "ctx": "",
                "endings": [f"bakes {index}.", "swims away.", "sleeps.", f"reads page {index}."],
                "label": str(index % 4),
                "source_id": f"s{index}",
                "split": split,
                "split_type": "indomain",
            }
            for index in range(items)
        ]
        _write_jsonl(target / f"{split}.jsonl", rows)
    return folder


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
