"""Prepared shards opened for a model: their ids must be its tokenizer's, and their documents fit into its context."""

from typing import Any

from data_prep.shards import Shards, open_shards
from sft.errors import UserError
from sft.model import context_length
from sft.tokenizer import Tokenizer


def open_model_shards(
    option: str, folder: str, tokenizer: Tokenizer, model_config: dict[str, Any], model_path: str
) -> Shards:
    """Open shards that the model of `model_path` is to read.

    Args:
        option: what named the folder, for messages.
        folder: train/ or heldout/ of a preparation.
        tokenizer: the model's.
        model_config: the model's config.json.
        model_path: the model's folder, for messages.

    Raises:
        UserError: the shards are missing or torn, of another tokenizer, or too long for the model.
    """
    shards = open_shards(folder)
    made_with = shards.manifest["tokenizer"]
    if made_with["digest"] != tokenizer.digest and not same_ids(made_with, tokenizer):
        raise UserError(
            f"{option} {folder}: was prepared with another tokenizer ({made_with['path']}) than {model_path} has; "
            f"prepare it again with --tokenizer {model_path}"
        )
    if made_with["vocab_size"] > model_config["vocab_size"]:
        raise UserError(
            f"{option} {folder}: ids reach {made_with['vocab_size'] - 1}, but {model_path} has "
            f"{model_config['vocab_size']} embedding rows; use the model's own tokenizer"
        )
    _check_context(option, model_config, model_path, max(shards.manifest["seq_len"], 1))
    return shards


def same_ids(made_with: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer with other file bytes is still the same one: equal ids for the manifest's probe strings.

    Args:
        made_with: the manifest's section `tokenizer`.
        tokenizer: the one that the ids must be of.
    """
    if (made_with["vocab_size"], made_with["bos_id"], made_with["eos_id"]) != (
        tokenizer.vocab_size,
        tokenizer.bos[0] if tokenizer.bos else None,
        tokenizer.eos_id,
    ):
        return False
    return all(tokenizer.encode(probe["text"]) == probe["ids"] for probe in made_with["probe"])


def _check_context(option: str, config: dict[str, Any], folder: str, seq_len: int) -> None:
    """Refuse packs whose documents may be longer than what the model attends to."""
    limit = context_length(config)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"{option}: packs of {seq_len} tokens, but {folder} attends to {limit}; prepare with --seq_len {limit}"
        )
