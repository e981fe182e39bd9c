"""The straight line between the weights of two models (WiSE-FT, Wortsman et al. 2022), streamed tensor by tensor."""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft.errors import UserError
from sft.hf_folder import DTYPES, PROVENANCE, copy_tokenizer, write_config, write_folder
from sft.pretrained import quiet_libraries
from sft.tokenizer import folder_errors, load_tokenizer
from sft.weight_files import weight_files
from sft.weight_sources import Source

GIB = 2**30
MUST_AGREE = (
    "model_type",
    "tie_word_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
)
"""Settings of config.json that say what is computed with tensors of the same shapes."""
TO_TRAINED = "give the folder that training started from as --base and its export as --tuned"


@dataclass(frozen=True)
class Model:
    """A model folder whose weights are read one by one."""

    option: str
    """What named it: --base."""
    folder: Path
    config: Any
    """transformers' config."""
    shapes: Mapping[str, list[int]]
    """Of every parameter and persistent buffer of the architecture, tied ones once."""
    files: Mapping[str, Any]
    """Open safetensors file, memory-mapped, by the name of each tensor."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor in the dtype that was saved."""
        tensor: torch.Tensor = self.files[name].get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Pair:
    """Two models that can be interpolated."""

    base: Model
    tuned: Model
    dtype: torch.dtype
    """Of what is written."""


def open_pair(base: Path, tuned: Path, dtype: str) -> Pair:
    """Open both models and compare them. Nothing is written.

    Args:
        dtype: bf16, fp32, or auto = the tuned model's.

    Raises:
        UserError: one is no whole model, both are the same folder, or they differ in architecture, shapes or
            vocabulary; names the tensor or the values.
    """
    if base.resolve() == tuned.resolve():
        raise UserError(f"--tuned {tuned}: is the folder of --base, too; {TO_TRAINED}")
    models = _open_model("--base", base), _open_model("--tuned", tuned)
    _check_settings(*models)
    _check_shapes(*models)
    _check_vocabularies(base, tuned)
    return Pair(*models, _choose_dtype(models[1], dtype))


def check_room(pair: Pair, out: Path, count: int) -> None:
    """Refuse what the disk cannot take.

    Raises:
        UserError: names what `count` models need and what is free.
    """
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    numel = sum(math.prod(shape) for shape in pair.tuned.shapes.values())
    need, free = count * numel * pair.dtype.itemsize, shutil.disk_usage(existing).free
    if need > free:
        raise UserError(
            f"--out {out}: {count} merged models of {numel * pair.dtype.itemsize / GIB:,.1f} GiB need "
            f"{need / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free; give fewer alphas, or choose another --out"
        )


def write_merged(pair: Pair, alpha: float, out: Path, max_shard_gb: float) -> None:
    """Write (1 - alpha) base + alpha tuned as a model folder `out`, with the tuned model's config and tokenizer.

    Raises:
        UserError: it does not load back equal.
    """
    source = Source(
        f"{1 - alpha:.6g} x {pair.base.folder} + {alpha:.6g} x {pair.tuned.folder}",
        pair.tuned.shapes,
        lambda name: interpolate(pair.base.read(name), pair.tuned.read(name), alpha),
        {"what": "merge", "alpha": alpha, "base": _made_of(pair.base), "tuned": _made_of(pair.tuned)},
    )
    write_folder(source, out, pair.dtype, max_shard_gb, partial(_write_small_files, pair))


def interpolate(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) base + alpha tuned in fp32, exact where both are equal and where alpha is 0 or 1.

    What is no floating-point tensor is the tuned model's.
    """
    if alpha == 1 or not tuned.is_floating_point():
        return tuned
    return base if alpha == 0 else torch.lerp(base.float(), tuned.float(), alpha)


def _open_model(option: str, folder: Path) -> Model:
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {folder}: holds no config.json; give the folder of a model")
    config, shapes, tied = _architecture(option, folder)
    files = {}
    for path in weight_files(folder, option):
        if not path.is_file():
            raise UserError(f"{option} {path}: no such file; copy the model folder again")
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{option} {path}: is no whole safetensors file ({error}); copy it again") from None
        files.update(dict.fromkeys(file.keys(), file))
    model = Model(option, folder, config, shapes, files)
    _check_whole(model, tied)
    return model


def _architecture(option: str, folder: Path) -> tuple[Any, dict[str, list[int]], dict[str, str]]:
    """(config, shapes of all tensors, the first name of every tensor that has several) by config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    errors: tuple[type[Exception], ...] = (*folder_errors(), RuntimeError)
    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except errors as error:
        raise UserError(f"{option} {folder}: cannot be built: {' '.join(str(error).split())[:300]}") from error
    first: dict[int, str] = {}
    shapes, tied = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
        else:
            shapes[name] = list(tensor.shape)
    return config, shapes, tied


def _check_whole(model: Model, tied: Mapping[str, str]) -> None:
    """The files hold what config.json says: no less, no more, in its shapes.

    A second copy of a tied tensor, and the rotary frequencies of old conversions, are passed over.
    """
    where = f"{model.option} {model.folder}"
    for name, shape in model.shapes.items():
        if name not in model.files:
            raise UserError(f"{where}: its weights lack {name}, which its config.json asks for; copy it again")
        if (stored := list(model.files[name].get_slice(name).get_shape())) != shape:
            raise UserError(f"{where}: {name} is {stored} in the weights and {shape} by config.json; copy it again")
    for name in sorted(model.files.keys() - model.shapes.keys()):
        if name in tied and torch.equal(model.read(name), model.read(tied[name])):
            continue
        if name in tied:
            raise UserError(
                f"{where}: {name} is not {tied[name]}, though config.json ties them; set tie_word_embeddings to false"
            )
        if not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{where}: its weights hold {name}, which its config.json leaves out; mend config.json")


def _check_settings(base: Model, tuned: Model) -> None:
    one, other = base.config.to_dict(), tuned.config.to_dict()
    for key in MUST_AGREE:
        if one.get(key) != other.get(key):
            raise UserError(
                f"--tuned {tuned.folder}: {key} is {other.get(key)} by its config.json, and {one.get(key)} by that of "
                f"--base {base.folder}; {TO_TRAINED}"
            )


def _check_shapes(base: Model, tuned: Model) -> None:
    for name in [*tuned.shapes, *base.shapes]:
        one, other = base.shapes.get(name, "missing"), tuned.shapes.get(name, "missing")
        if one != other:
            raise UserError(
                f"--tuned {tuned.folder}: {name} is {other}, and {one} in --base {base.folder}; {TO_TRAINED}"
            )


def _check_vocabularies(base: Path, tuned: Path) -> None:
    """Every token of the base has its id in the tuned model; that may have named further ids, as chat models do."""
    ids, others = (load_tokenizer(folder).backend.get_vocab(with_added_tokens=True) for folder in (base, tuned))
    if moved := sorted((index, token) for token, index in ids.items() if others.get(token) != index):
        index, token = moved[0]
        raise UserError(
            f"--tuned {tuned}: its tokenizer has id {others.get(token)} for {token!r}, and that of --base {base} "
            f"{index}: different vocabularies; {TO_TRAINED}"
        )


def _choose_dtype(tuned: Model, wanted: str) -> torch.dtype:
    """auto: what config.json names, and without that what the weights are, as transformers reads it."""
    if wanted != "auto":
        return DTYPES[wanted]
    if tuned.config.dtype is not None:
        dtype: torch.dtype = tuned.config.dtype
        return dtype
    return next(tensor.dtype for name in tuned.shapes if (tensor := tuned.read(name)).is_floating_point())


def _write_small_files(pair: Pair, out: Path) -> None:
    write_config(pair.tuned.folder, out, pair.dtype)
    copy_tokenizer(pair.tuned.folder, out)
    with suppress(FileNotFoundError):
        shutil.copyfile(pair.tuned.folder / "generation_config.json", out / "generation_config.json")


def _made_of(model: Model) -> dict[str, Any]:
    """Name of the folder, and what it is made of in turn where it says so."""
    of = None
    with suppress(OSError, ValueError):
        of = json.loads((model.folder / PROVENANCE).read_text(encoding="utf-8"))
    return {"folder": model.folder.resolve().name, "of": of}
