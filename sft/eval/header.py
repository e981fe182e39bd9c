"""What scores depend on: written beside them, compared before anything is resumed, reused or reported."""

import platform
from importlib.metadata import version
from typing import Any

import torch

import sft
from sft.eval.options import ScoreOptions
from sft.eval.ranks import Ranks
from sft.eval.requests import digest_template
from sft.eval.weights import ATTENTION
from sft.pretrained import choose_dtype
from sft.tokenizer import Tokenizer

PARITY_WITH = "lm_eval 0.4.13"
FREE = ("model", "data", "ranks", "placement", "fallback")
"""Entries of a header that scores do not depend on; of a task's part: where its data were, and what came out."""
FREE_OF_TASK = ("source", "near_ties", "tokens")


def describe_setting(folder: str, tokenizer: Tokenizer, options: ScoreOptions, ranks: Ranks) -> dict[str, Any]:
    """Model, tokenizer, settings and machine."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "model": folder,
        "tokenizer_sha256": tokenizer.digest,
        "bos": list(tokenizer.bos),
        "chat": options.chat,
        "chat_template_sha256": digest_template(tokenizer) if options.chat != "none" else None,
        "system_instruction": options.system_instruction,
        "compat": options.compat,
        "engine": options.engine,
        "fallback": None,
        "dtype": str(choose_dtype(options.dtype, ranks.device)).removeprefix("torch."),
        "score_dtype": options.score_dtype,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
        "ranks": ranks.world,
        "attention": ATTENTION,
        "tokens_per_batch": options.tokens_per_batch,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "data": options.data,
        "parity_with": PARITY_WITH,
        "versions": {"sft": sft.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def identity(header: dict[str, Any]) -> dict[str, Any]:
    """The part of a header that must be equal for scores to be the same."""
    kept = {key: value for key, value in header.items() if key not in FREE}
    if header.get("fallback"):
        kept["engine"] = "packed"  # what was asked for
    kept["tasks"] = {
        task: {key: value for key, value in facts.items() if key not in FREE_OF_TASK}
        for task, facts in header["tasks"].items()
    }
    return kept
