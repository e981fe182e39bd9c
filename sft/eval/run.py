"""From options and a model folder to records: what `sft eval` and `sft drift` share."""

import gc
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sft
from sft.errors import UserError
from sft.eval import score
from sft.eval.options import ScoreOptions
from sft.eval.ranks import Ranks, join_ranks
from sft.eval.requests import Request, build_requests, count_truncated, digest_requests
from sft.eval.results import Record, make_records
from sft.eval.tasks import data, hellaswag, mmlu
from sft.eval.tasks.item import NUM_CHOICES, Item, digest_items
from sft.pretrained import choose_dtype
from sft.tokenizer import Tokenizer, load_tokenizer

PARITY_WITH = "lm_eval 0.4.13"


@dataclass(frozen=True)
class Prepared:
    """A model's requests, before its weights are read."""

    folder: str
    tokenizer: Tokenizer
    max_length: int
    items: dict[str, list[Item]]
    requests: dict[str, list[Request]]


@dataclass(frozen=True)
class Scored:
    """Records of every task, and what they depend on."""

    header: dict[str, Any]
    records: dict[str, list[Record]]


def load_items(options: ScoreOptions) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """Items of every task, and for each a line that says which files they came from.

    Raises:
        UserError: data are missing, malformed, or too few for the shots.
    """
    items: dict[str, list[Item]] = {}
    sources: dict[str, str] = {}
    for task in dict.fromkeys(options.tasks):
        if task == "mmlu":
            subjects, source = data.load_mmlu(Path(options.data))
            built = [mmlu.build_items(subject, options.shots.mmlu, options.limit) for subject in subjects]
            items[task] = [item for group in built for item in group]
        else:
            shots = options.shots.hellaswag
            validation, train, source = data.load_hellaswag(Path(options.data), need_train=shots > 0)
            items[task] = hellaswag.build_items(validation, train, shots, options.limit)
        sources[task] = source
    return items, sources


def prepare(folder: str, items: dict[str, list[Item]]) -> Prepared:
    """Tokenise the items for a model.

    Raises:
        UserError: config or tokenizer are missing, or the tokenizer cannot be scored.
    """
    config = score.read_config(folder)  # first: the tokenizer's loader reads it too, and would be blamed for it
    tokenizer = load_tokenizer(folder)
    max_length = score.read_max_length(config, tokenizer.hf)
    requests = {task: build_requests(group, tokenizer, max_length) for task, group in items.items()}
    return Prepared(folder, tokenizer, max_length, items, requests)


def describe_truncation(prepared: Prepared) -> list[str]:
    """A line for every task some of whose items are longer than the model's context."""
    counts = {task: count_truncated(requests, prepared.max_length) for task, requests in prepared.requests.items()}
    return [
        f"{task}: {count} of {len(prepared.items[task])} items are longer than the model's "
        f"{prepared.max_length} tokens and lose their beginning"
        for task, count in counts.items()
        if count
    ]


def score_prepared(prepared: Prepared, options: ScoreOptions, ranks: Ranks, sources: dict[str, str]) -> Scored:
    """Load the weights, score all requests, free the weights. `sources` (by task) go into the header.

    Raises:
        UserError: the weights cannot be loaded, or give scores that are not finite.
    """
    dtype = choose_dtype(options.dtype, ranks.device)
    model = score.load_model(prepared.folder, dtype, ranks.device)
    records = {}
    for task, requests in prepared.requests.items():
        scores = score.score_requests(
            model,
            requests,
            max_length=prepared.max_length,
            tokens_per_batch=options.tokens_per_batch,
            ranks=ranks,
            label=f"{task}: {prepared.folder}",
        )
        records[task] = make_records(prepared.items[task], scores.reshape(-1, NUM_CHOICES))
    del model
    gc.collect()  # a drift run loads the next model into the same memory
    return Scored(_header(prepared, options, ranks, dtype, sources), records)


def score_model(model_dir: str, options: ScoreOptions) -> dict[str, list[Record]]:
    """Records of every task for one model, computed by this process alone or with the launcher's other ranks.

    Raises:
        UserError: data, model or tokenizer cannot be used.
    """
    items, sources = load_items(options)
    with join_ranks() as ranks:
        return score_prepared(prepare(model_dir, items), options, ranks, sources).records


def check_comparable(base: Prepared, tuned: Prepared) -> None:
    """Refuse to compare two models that would be asked different things.

    Raises:
        UserError: items, context length or token ids differ.
    """
    if base.max_length != tuned.max_length:
        raise UserError(
            f"max_position_embeddings: {base.folder} has {base.max_length}, {tuned.folder} has {tuned.max_length}; "
            "long items would be cut at different places: make config.json equal"
        )
    for task, items in base.items.items():
        if digest_items(items) != digest_items(tuned.items[task]):
            raise UserError(f"{task}: the two models were given different items; use the same data, shots and limit")
        if digest_requests(base.requests[task]) != digest_requests(tuned.requests[task]):
            where = _first_difference(items, base.requests[task], tuned.requests[task])
            raise UserError(
                f"{task}: the tokenizers of {base.folder} and {tuned.folder} give different ids, first at {where}; "
                "was BOS lost, or a token added, when the tuned model was saved? Use the base model's tokenizer files"
            )


def _first_difference(items: Sequence[Item], base: Sequence[Request], tuned: Sequence[Request]) -> str:
    for number, (before, after) in enumerate(zip(base, tuned, strict=True)):
        ids_before, ids_after = [*before.ctx_ids, *before.cont_ids], [*after.ctx_ids, *after.cont_ids]
        if ids_before != ids_after or len(before.cont_ids) != len(after.cont_ids):
            shown = " against ".join(str([int(token) for token in ids[:4]]) for ids in (ids_before, ids_after))
            return f"{items[number // NUM_CHOICES].name} (ids begin {shown})"
    return "no item"


def _header(
    prepared: Prepared, options: ScoreOptions, ranks: Ranks, dtype: torch.dtype, sources: dict[str, str]
) -> dict[str, Any]:
    """What the scores depend on; per task under "tasks"."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "model": prepared.folder,
        "weights_sha256": _digest_weights(prepared.folder) if ranks.rank == 0 else "",
        "tokenizer_sha256": prepared.tokenizer.digest,
        "bos": list(prepared.tokenizer.bos),
        "data": options.data,
        "max_length": prepared.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
        "ranks": ranks.world,
        "attention": score.ATTENTION,
        "tokens_per_batch": options.tokens_per_batch,
        "limit": options.limit,
        "parity_with": PARITY_WITH,
        "versions": {"sft": sft.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "tasks": {
            task: {
                "source": sources[task],
                "shots": getattr(options.shots, task),
                "fewshot_seed": hellaswag.FEWSHOT_SEED if task == "hellaswag" else None,
                "items_sha256": digest_items(items),
                "requests_sha256": digest_requests(prepared.requests[task]),
                "truncated_items": count_truncated(prepared.requests[task], prepared.max_length),
            }
            for task, items in prepared.items.items()
        },
    }


def _digest_weights(folder: str) -> str:
    """sha256 over the names and bytes of all safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
