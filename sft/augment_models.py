"""Rewriting text with local encoder-decoder models: T5-style paraphrase, Marian-style translation there and back."""

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.augment_options import AugmentConfig
from sft.augment_rows import (
    EMPTY,
    INVALID_UNICODE,
    SEVERAL_LINES,
    TOO_LONG,
    UNFINISHED,
    UNKNOWN_CHARACTERS,
    Dropped,
    Row,
    Variant,
)
from sft.errors import UserError
from sft.pretrained import choose_dtype, quiet_libraries
from sft.tokenizer import folder_errors

DIGESTED = {".json", ".safetensors", ".model", ".spm", ".txt"}
"""Suffixes of the files that decide what a model folder computes."""
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Seq2Seq:
    """A loaded encoder-decoder model with its tokenizer."""

    tokenizer: Any
    """transformers.PreTrainedTokenizerBase"""
    model: Any
    """transformers.PreTrainedModel with `generate`, in eval mode."""
    max_input_tokens: int
    """Longest input that the model was made for, end token included."""
    max_new_tokens: int
    """Longest output that its positions allow."""
    eos_ids: tuple[int, ...]


def load_seq2seq(folder: str, device: torch.device) -> Seq2Seq:
    """Model and tokenizer from a local folder, bf16 where a GPU multiplies it natively, else fp32.

    Raises:
        UserError: no such folder, no encoder-decoder model, no safetensors weights, weights missing, torn or of other
            shapes, or a tokenizer that cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    if not Path(folder).is_dir():
        raise UserError(f"--models {folder}: no such folder; give the folder of a downloaded model")
    local = {"local_files_only": True, "trust_remote_code": False}
    dtype = choose_dtype("auto", device) if device.type == "cuda" else torch.float32
    broken: tuple[type[Exception], ...] = (RuntimeError, SafetensorError, *folder_errors())
    quiet_libraries()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        _check_kind(folder, AutoConfig.from_pretrained(folder, **local))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # encoding never uses it
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below by name; transformers would print a table
            output_loading_info=True,
            **local,
        )
        _check_tokenizer(folder, tokenizer, loaded[0])
    except torch.OutOfMemoryError:
        raise  # the machine's fault, not the folder's
    except broken as error:
        raise UserError(f"--models {folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if wrong := sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"]):
        raise UserError(f"--models {folder}: its weights lack {wrong[0]} in the shape that config.json asks for")
    # Marian folders set it, and a text that was cut would look whole; `generate` takes a None in its argument for unset
    model.generation_config.update(forced_eos_token_id=None, max_length=None)
    return _limits(tokenizer, model.to(device).eval())


def _check_kind(folder: str, config: Any) -> None:
    if not config.is_encoder_decoder:
        raise UserError(
            f"--models {folder}: is a {config.model_type} model, not an encoder-decoder; give a model like T5 or Marian"
        )
    if not list(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"--models {folder}: holds no *.safetensors weights; convert other formats to safetensors first"
        )


def _check_tokenizer(folder: str, tokenizer: Any, model: Any) -> None:
    """One with more ids than the model has embeddings is another model's; T5's without its file knows no word."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.added_tokens_decoder) + 1:
        raise UserError(
            f"--models {folder}: its tokenizer knows no words; is its spiece.model or tokenizer.json there?"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    largest = max(vocabulary.values())
    if tokenizer.pad_token_id is None or largest >= embeddings:
        raise UserError(
            f"--models {folder}: its tokenizer has ids up to {largest} and padding {tokenizer.pad_token_id}, the model "
            f"{embeddings} embeddings; are all files of the folder of one model?"
        )


def _limits(tokenizer: Any, model: Any) -> Seq2Seq:
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED  # T5 has relative ones
    eos = model.generation_config.eos_token_id
    return Seq2Seq(
        tokenizer=tokenizer,
        model=model,
        max_input_tokens=min(positions, tokenizer.model_max_length),
        max_new_tokens=positions - 1,  # the decoder's start token takes one
        eos_ids=tuple(eos) if isinstance(eos, list) else (tokenizer.eos_token_id if eos is None else eos,),
    )


def folder_digest(folder: str) -> str:
    """sha256 over the names and bytes of a model folder's files.

    Raises:
        UserError: no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--models {folder}: no such folder; give the folder of a downloaded model")
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(folder).iterdir() if path.suffix in DIGESTED and path.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def rewrite_rows(models: Sequence[Seq2Seq], rows: Sequence[Row], config: AugmentConfig) -> list[list[Variant]]:
    """For each row `config.variants` rewritings of its fields; blank fields stay, and are in no variant."""
    found: list[list[Variant]] = [[{} for _ in range(config.variants)] for _ in rows]
    for field in config.fields:
        filled = [index for index, row in enumerate(rows) if row[field].strip()]
        for index, texts in zip(filled, _rewrite([rows[i][field] for i in filled], models, config), strict=True):
            found[index] = [_join(variant, field, text) for variant, text in zip(found[index], texts, strict=True)]
    return found


def _join(variant: Variant, field: str, text: str | Dropped) -> Variant:
    if isinstance(variant, Dropped) or isinstance(text, Dropped):
        return variant if isinstance(variant, Dropped) else text if isinstance(text, Dropped) else variant
    return {**variant, field: text}


def _rewrite(texts: Sequence[str], models: Sequence[Seq2Seq], config: AugmentConfig) -> list[list[str | Dropped]]:
    """The first model makes the variants; a second takes each of them once and translates it back."""
    prefix = config.prefix if config.prefix is not None else "paraphrase: " if config.method == "paraphrase" else ""
    checked = [_check_text(text) or prefix + text for text in texts]
    variants = generate(models[0], checked, config.variants, config)
    for model in models[1:]:
        back = iter(generate(model, [text for row in variants for text in row], 1, config))
        variants = [[next(back)[0] for _ in row] for row in variants]
    return variants


def _check_text(text: str) -> Dropped | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Dropped(INVALID_UNICODE)
    return Dropped(SEVERAL_LINES) if len(text.strip().splitlines()) > 1 else None


@torch.inference_mode()
def generate(
    seq2seq: Seq2Seq, texts: Sequence[str | Dropped], variants: int, config: AugmentConfig
) -> list[list[str | Dropped]]:
    """`variants` outputs for each text, in order; what cannot be read or does not end is Dropped, never cut.

    Raises:
        UserError: the batch does not fit into the GPU's memory.
    """
    inputs = [text if isinstance(text, Dropped) else _encode(seq2seq, text) for text in texts]
    readable = [ids for ids in inputs if not isinstance(ids, Dropped)]
    outputs = iter(_outputs(seq2seq, readable, variants, config) if readable else [])
    return [
        [ids] * variants if isinstance(ids, Dropped) else [next(outputs) for _ in range(variants)] for ids in inputs
    ]


def _encode(seq2seq: Seq2Seq, text: str) -> list[int] | Dropped:
    ids: list[int] = seq2seq.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) > seq2seq.max_input_tokens:
        return Dropped(TOO_LONG)
    return Dropped(UNKNOWN_CHARACTERS) if seq2seq.tokenizer.unk_token_id in ids else ids


def _outputs(
    seq2seq: Seq2Seq, inputs: Sequence[list[int]], variants: int, config: AugmentConfig
) -> list[str | Dropped]:
    settings = copy.deepcopy(seq2seq.model.generation_config)
    settings.update(
        do_sample=config.temperature > 0,
        temperature=config.temperature or None,
        top_p=config.top_p if config.temperature else None,
        top_k=0 if config.temperature else None,  # transformers would take 50
        num_beams=config.beams,
        num_return_sequences=variants,
        max_new_tokens=min(config.max_new_tokens, seq2seq.max_new_tokens),
    )
    batch = seq2seq.tokenizer.pad({"input_ids": list(inputs)}, return_tensors="pt").to(seq2seq.model.device)
    try:
        sequences = seq2seq.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {config.batch_size}: does not fit into the GPU's memory with {variants} variants of up to "
            f"{config.max_new_tokens} tokens; lower it"
        ) from None
    return [_decode(seq2seq, ids) for ids in sequences[:, 1:].tolist()]


def _decode(seq2seq: Seq2Seq, ids: list[int]) -> str | Dropped:
    end = next((at for at, token in enumerate(ids) if token in seq2seq.eos_ids), None)
    if end is None:
        return Dropped(UNFINISHED)
    if seq2seq.tokenizer.unk_token_id in ids[:end]:
        return Dropped(UNKNOWN_CHARACTERS)
    text = seq2seq.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return text or Dropped(EMPTY)
