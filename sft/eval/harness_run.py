"""What lm_eval's results_<date>.json says of a run: the facts that its scores depend on."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.eval.tasks.fields import show
from sft.eval.tasks.files import read_object

BOS_CHANGE = (0, 4, 9, 2)
"""From this version on the tokenizer decides whether a text begins with BOS."""


@dataclass(frozen=True)
class HarnessRun:
    """One call of lm_eval."""

    file: Path
    header: dict[str, Any]
    """In the words of `sft eval`'s own header; what lm_eval does not tell is None, digests are ""."""
    shots: dict[str, int]
    """Solved examples by lm_eval's task name."""
    counts: dict[str, int]
    """Scored items by lm_eval's task name; none from versions that do not tell."""


def read_harness_run(file: Path) -> HarnessRun:
    """Read results_<date>.json.

    Raises:
        UserError: it is torn, or a field has another type than lm_eval gives it.
    """
    results = read_object(file)
    config = _typed(results, "config", dict, file) or {}
    samples = _typed(results, "n-samples", dict, file) or {}
    shots = _typed(results, "n-shot", dict, file) or {}
    counts = {name: _typed(_object(samples, name, file), "effective", int, file) for name in samples}
    return HarnessRun(
        file=file,
        header=_header(results, config, file),
        shots={name: count for name in shots if (count := _typed(shots, name, int, file)) is not None},
        counts={name: count for name, count in counts.items() if count is not None},
    )


def _header(results: dict[str, Any], config: dict[str, Any], file: Path) -> dict[str, Any]:
    arguments = _model_arguments(config, file)
    version = _typed(results, "lm_eval_version", str, file)
    dtype = _text(config, "model_dtype", file) or arguments.get("dtype")
    dtype = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    backend = _text(config, "model", file)
    if "model_dtype" in config:  # what its Hugging Face backend tells of itself; called from Python, "model" is a path
        backend = "hf"
    template = _text(results, "chat_template", file)
    return {
        "model": arguments.get("pretrained") or _text(config, "model", file) or str(file.parent),
        "weights_sha256": "",
        "tokenizer_sha256": "",
        "bos": None,
        "data": None,
        "max_length": _typed(results, "max_length", int, file),
        "dtype": dtype,
        "score_dtype": _score_dtype(arguments, dtype) if backend == "hf" else None,
        "engine": "lm_eval" if backend in ("hf", None) else f"lm_eval {backend}",
        "compat": _compat(version, arguments),
        "chat": _chat(results, template, file),
        "system_instruction": _text(results, "system_instruction", file),
        "chat_template_sha256": _text(results, "chat_template_sha", file) if template else None,
        "device": _text(config, "device", file),
        "ranks": None,
        "attention": None,
        "tokens_per_batch": None,
        "batch_size": config.get("batch_size"),
        "placement": None,
        "limit": config.get("limit"),
        "parity_with": f"lm_eval {version or '(version not told)'}",
        "versions": {"lm_eval": version, "transformers": _text(results, "transformers_version", file)},
    }


def _model_arguments(config: dict[str, Any], file: Path) -> dict[str, str]:
    """`--model_args`: a dictionary, in older versions the text itself."""
    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = {key: value for key, _, value in (part.partition("=") for part in given.split(","))}
    if not isinstance(given, dict):
        raise UserError(f"{file}: 'model_args' is {show(given)}; need a JSON object or a text")
    return {key: str(value) for key, value in given.items()}


def _score_dtype(arguments: dict[str, str], dtype: str | None) -> str | None:
    """fp32, native, or None where the arguments are not told, as after a call from Python with a model."""
    given = arguments.get("softmax_dtype", "None").removeprefix("torch.")
    if "float32" in (given, dtype if given == "None" else ""):
        return "fp32"
    if not arguments:
        return None
    return "native" if given == "None" else given


def _compat(version: str | None, arguments: dict[str, str]) -> str | None:
    if version is None:
        return None
    numbers = tuple(map(int, re.findall(r"\d{1,9}", version)[:4]))
    given = arguments.get("add_bos_token")
    name = "lm_eval>=0.4.9.2" if numbers >= BOS_CHANGE else "lm_eval<=0.4.9.1"
    return name if given in (None, "None") else f"{name}, add_bos_token={given}"


def _chat(results: dict[str, Any], template: str | None, file: Path) -> str:
    if not template:
        return "none"
    return "multi_turn" if _typed(results, "fewshot_as_multiturn", bool, file) else "single_turn"


def _text(parent: dict[str, Any], field: str, file: Path) -> str | None:
    """A text, or None where it is missing or empty."""
    return _typed(parent, field, str, file) or None


def _object(parent: dict[str, Any], field: str, file: Path) -> dict[str, Any]:
    return _typed(parent, field, dict, file) or {}


def _typed(parent: dict[str, Any], field: str, kind: type, file: Path) -> Any:
    """A field of this type, or None where it is missing."""
    value = parent.get(field)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise UserError(f"{file}: '{field}' is {show(value)}; lm_eval writes a {kind.__name__}: get the file again")
    return value
