"""The safetensors files of a model folder that transformers would load. Free of torch."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sft.errors import UserError


def num_parameters(model: Path) -> int:
    """Elements of all tensors of a model folder, read from the headers of the files that transformers would load.

    Raises:
        UserError: a file is missing, or is no whole safetensors file.
    """
    return sum(_num_elements(path) for path in weight_files(model))


def weight_files(model: Path, option: str = "model.path") -> list[Path]:
    """In transformers' order of preference; others (Mistral's consolidated.safetensors) hold the same weights again.

    Args:
        option: what named the folder, for messages.

    Raises:
        UserError: the index cannot be read.
    """
    index = model / "model.safetensors.index.json"
    if (single := model / "model.safetensors").is_file() or not index.is_file():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [model / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {index}: is no index of safetensors files: {error!r}; copy it again") from None


def _num_elements(path: Path) -> int:
    if not path.is_file():
        raise UserError(f"model.path {path}: no such file; copy the model folder again")
    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"model.path {path}: is no whole safetensors file ({error}); copy it again") from None
