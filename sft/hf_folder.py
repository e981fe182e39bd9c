"""Weights of a run become a Hugging Face model folder: streamed, reloaded, compared tensor by tensor, then published.

One safetensors file of the folder is held in memory at a time. The folder is built under a temporary name and
renamed when transformers has loaded it back with every tensor equal to its source's, bit for bit.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sft import __version__
from sft.checkpoint import read_meta
from sft.errors import UserError
from sft.pretrained import quiet_libraries
from sft.progress import track
from sft.tokenizer import TOKENIZER_FILES, folder_errors, load_tokenizer
from sft.weight_sources import Source, from_checkpoint

PARTIAL = ".partial"
PROVENANCE = "export.json"
"""File of an exported folder that says what its weights are of."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export_checkpoint(
    checkpoint: Path, base: Path, out: Path, dtype: str = "auto", max_shard_gb: float = 5.0, *, ema: bool = False
) -> None:
    """Write `checkpoint` as a model folder `out`, with the base model's config and tokenizer beside the weights.

    Args:
        base: the model folder that training started from.
        dtype: bf16, fp32, or auto = the dtype that the model was computed in.
        max_shard_gb: largest weights file in 10^9 bytes.
        ema: the moving average of the weights instead of the weights.

    Raises:
        UserError: `out` exists, the checkpoint is incomplete or has no average, or the folder does not load back equal.
    """
    check_absent(out)
    export(from_checkpoint(checkpoint, ema=ema), read_meta(checkpoint), base, out, dtype, max_shard_gb)


def export(source: Source, meta: dict[str, Any], base: Path, out: Path, dtype: str, max_shard_gb: float) -> None:
    """Write weights of a run as a model folder; `meta` is that of the newest checkpoint they are of."""
    torch_dtype = DTYPES[meta["dtype"] if dtype == "auto" else dtype]
    write_folder(
        source, out, torch_dtype, max_shard_gb, lambda to: _write_small_files(base, to, torch_dtype, meta["identity"])
    )


def check_absent(out: Path) -> None:
    """Refuse to write into a folder that is there.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"export {out}: exists; remove it or choose another --out")


def write_folder(
    source: Source, out: Path, dtype: torch.dtype, max_shard_gb: float, write_small_files: Callable[[Path], None]
) -> None:
    """Build a model folder under a temporary name, compare what transformers loads of it with `source`, publish it.

    Args:
        write_small_files: writes config and tokenizer to the folder that it is given.

    Raises:
        UserError: it does not load back equal.
    """
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_small_files(partial)
    _write_weights(source, partial, dtype, int(max_shard_gb * 1e9))
    _write_json(partial / PROVENANCE, {**source.made_of, "dtype": _dtype_name(dtype), "versions": _versions()})
    _verify(source, partial, dtype)
    os.replace(partial, out)


def prove_export(base: Path, identity: dict[str, Any]) -> None:
    """Write and load back all of an export but its weights: what cannot be saved shows before the first step.

    Raises:
        UserError: the base model's config, generation config or tokenizer cannot be carried over; says why.
    """
    with tempfile.TemporaryDirectory() as folder, _one_line("model", base):
        _write_small_files(base, Path(folder), torch.bfloat16, identity)
        _load_small_files(Path(folder))


def set_aside(folder: Path, step: int) -> Path | None:
    """Rename an export of another step than `step`, which a run has gone on from; returns its new place, if it was one.

    What does not say of which step it is, or whose new name is taken, stays.
    """
    try:
        (made_of,) = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["checkpoints"]
        aside = folder.with_name(f"{folder.name}-step-{made_of['step']:08d}")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if made_of["step"] == step or aside.exists():
        return None
    os.replace(folder, aside)
    return aside


def verify_export(checkpoint: Path, folder: Path, *, ema: bool = False) -> None:
    """Compare a folder that was exported earlier with the checkpoint it should be of, in the folder's own dtype.

    Args:
        ema: it should be of the moving average of the weights.

    Raises:
        UserError: it is of another checkpoint, or damaged.
    """
    source = from_checkpoint(checkpoint, ema=ema)
    try:
        dtype = DTYPES[json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"export {folder}: has no config.json of an export; remove the folder") from None
    _verify(source, folder, dtype)


def _verify(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Load `folder` with transformers and compare every parameter with the source.

    Raises:
        UserError: a tensor is missing, unexpected or different, or tokenizer or generation config do not load.
    """
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    with _one_line("export", folder):
        _load_small_files(folder)
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"export {folder}: does not load back: {reason}; remove the folder") from error
    model, info = loading
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"export {folder}: does not load back: {len(wrong)} keys wrong, first {wrong[0]}")
    shapes = source.shapes
    loaded = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in shapes}
    loaded |= dict(model.named_parameters())
    if differing := sorted(loaded.keys() ^ shapes.keys()):
        raise UserError(f"export {folder}: parameters are not those of {source.name}, first {differing[0]}")
    for name, tensor in _tensors(source, list(shapes), dtype):
        if tensor.isnan().any():
            raise UserError(f"export {folder}: {name} of {source.name} holds NaN: this is no model; remove the folder")
        if loaded[name].dtype != tensor.dtype or not torch.equal(loaded[name].detach(), tensor):
            raise UserError(f"export {folder}: {name} loads back different from {source.name}; remove the folder")


def _write_weights(source: Source, out: Path, dtype: torch.dtype, max_bytes: int) -> None:
    plan = _plan_files(source.shapes, dtype.itemsize, max_bytes)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(
        track(plan, f"writing {out.name.removesuffix(PARTIAL)}", visible=len(plan) > 1), start=1
    ):
        file = f"model-{index:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else "model.safetensors"
        try:
            save_file(dict(_tensors(source, names, dtype)), out / file, metadata={"format": "pt"})
        except SafetensorError as error:  # not an OSError, whatever the disk said
            raise UserError(f"export {out / file}: {error}; free disk space, or choose another --out") from error
        weight_map.update(dict.fromkeys(names, file))
    if len(plan) > 1:
        total = sum(math.prod(shape) for shape in source.shapes.values()) * dtype.itemsize
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_files(shapes: Mapping[str, list[int]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Parameter names per file, in order; a parameter larger than the limit gets a file of its own."""
    plan: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if plan[-1] and size + num_bytes > max_bytes:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += num_bytes
    return plan


def _tensors(source: Source, names: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        tensor = source.read(name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_small_files(base: Path, out: Path, dtype: torch.dtype, identity: dict[str, Any]) -> None:
    write_config(base, out, dtype)
    copy_tokenizer(base, out)
    if template := identity["chat_template"]:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_generation_config(base, out, identity["stop_id"])


def _load_small_files(folder: Path) -> None:
    """Load all but the weights with transformers."""
    from transformers import AutoConfig, GenerationConfig

    AutoConfig.from_pretrained(folder, local_files_only=True)
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder, local_files_only=True).validate()
    load_tokenizer(folder)


@contextmanager
def _one_line(what: str, folder: Path) -> Iterator[None]:
    """What nonsense in the small files of `folder` runs into, as a UserError that names the folder."""
    try:
        yield
    except folder_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} {folder}: its config.json, generation_config.json or tokenizer cannot be exported: {reason}"
        ) from error


def write_config(base: Path, out: Path, dtype: torch.dtype) -> None:
    """config.json of `base`, with the dtype of the new weights."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the old name of the same key
    config["dtype"] = _dtype_name(dtype)
    _write_json(out / "config.json", config)


def copy_tokenizer(base: Path, out: Path) -> None:
    """Tokenizer and chat template, byte for byte."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def _write_generation_config(base: Path, out: Path, stop_id: int) -> None:
    """The base's settings, with the stop token that training supervised first, so that generate() ends there.

    A chat template may end a turn with another token (<|im_end|>) than the tokenizer's EOS, which ends a text.

    Edited as JSON: transformers refuses to save a config that mixes sampling values with do_sample = false,
    as Llama-2's does, and a long run would be lost at its last line.
    """
    path = base / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokenizer = load_tokenizer(base)
    before = settings.get("eos_token_id")
    others = before if isinstance(before, list) else [] if before is None else [before]
    stops = list(dict.fromkeys([stop_id, tokenizer.eos_id, *others]))
    settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    settings.setdefault("bos_token_id", tokenizer.hf.bos_token_id)
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = tokenizer.eos_id
    if not settings.get("do_sample"):
        for name in ("temperature", "top_p", "top_k"):
            settings.pop(name, None)
    _write_json(out / "generation_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    import transformers

    return {"sft": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
