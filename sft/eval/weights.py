"""The model under evaluation: its config, its weights, and where they are put."""

import gc
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from sft.errors import UserError
from sft.eval.ranks import Ranks
from sft.pretrained import load_causal_lm
from sft.tokenizer import Tokenizer, folder_errors

ATTENTION = "sdpa"
DEFAULT_MAX_LENGTH = 2048
UNSET_MAX_LENGTH = int(1e30)
"""What transformers puts for a tokenizer without a limit."""
ROOM_FOR_WEIGHTS = 0.6
"""Part of a GPU's free memory that weights may take; the rest is for logits (2 to 4 GB), keys and activations."""


def read_config(folder: str) -> Any:
    """The transformers config of a model folder.

    Raises:
        UserError: the folder or its config.json is missing, torn, or holds values that no model can have.
    """
    from transformers import AutoConfig

    path = Path(folder)
    try:
        if not path.is_dir():
            raise UserError(
                f"model {folder}: no such folder; give a local folder with config.json, safetensors and tokenizer"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"model {folder}: holds no config.json; is it a Hugging Face model folder?")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except folder_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {folder}/config.json: cannot be used: {reason}; correct or complete it") from error


def read_max_length(config: Any, tokenizer: Tokenizer) -> int:
    """Context length in tokens: the config's, else the tokenizer's, else 2048, as lm_eval decides.

    Raises:
        UserError: the config's is not positive.
    """
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text_config, name, None)) is not None:
            if value < 1:
                raise UserError(f"model {config.name_or_path}/config.json: {name} is {value}; need at least 1 token")
            return int(value)
    limit = tokenizer.hf.model_max_length
    return DEFAULT_MAX_LENGTH if limit is None or limit == UNSET_MAX_LENGTH else int(limit)


def digest_weights(folder: str) -> str:
    """sha256 over the names, sizes and sha256 of config.json and all safetensors files, which are read side by side.

    The same tensors compute something else under another rope_theta.
    """
    files = sorted([*Path(folder).glob("*.safetensors"), Path(folder) / "config.json"])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest_file, files))
    lines = [f"{file.name}\0{file.stat().st_size}\0{digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def count_parameters(folder: str) -> int:
    """Elements of all tensors in the safetensors files, read from their headers."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def choose_placement(wanted: str, folder: str, dtype: torch.dtype, ranks: Ranks) -> str:
    """`auto` resolved: zero3 where several GPUs are at hand and one cannot hold the weights. The same on all ranks."""
    if wanted != "auto" or ranks.world == 1 or ranks.device.type != "cuda":
        return "replicas" if wanted == "auto" or ranks.world == 1 else wanted
    weights = count_parameters(folder) * dtype.itemsize
    free, _ = torch.cuda.mem_get_info(ranks.device)
    too_large = torch.tensor(weights > ROOM_FOR_WEIGHTS * free, dtype=torch.int32, device=ranks.device)
    dist.all_reduce(too_large, op=dist.ReduceOp.MAX)
    return "zero3" if int(too_large) else "replicas"


@contextmanager
def open_model(folder: str, dtype: torch.dtype, placement: str, ranks: Ranks) -> Iterator[Any]:
    """The model in eval mode; its memory is free again afterwards.

    Raises:
        UserError: config or weights are missing, torn, pickled, or do not fit each other.
    """
    read_config(folder)
    gc.collect()  # the model before this one takes the same memory, and its caller may have named it until now
    engine = None
    if placement == "zero3":
        from sft.engine import partition_for_inference

        engine = partition_for_inference(folder, dtype=dtype, attention=ATTENTION)
        model = engine.module
    else:
        model = load_causal_lm(folder, dtype=dtype, attention=ATTENTION).to(ranks.device)
    try:
        yield model.eval()
    finally:
        if engine is not None:
            engine.destroy()
        del model, engine
