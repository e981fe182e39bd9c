"""All that a drift report asks of one model: its scores, its held-out loss, its answers and its noise floor.

Each is kept in the side's folder with what it depends on: a second report, with another gate or one more model, loads
no model that has answered already.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.eval import earlier
from sft.eval.answers import Prompt, answer, encode_prompts
from sft.eval.gain import heldout_loss, open_heldout
from sft.eval.noise import measure_noise
from sft.eval.options import DriftConfig
from sft.eval.ranks import Ranks
from sft.eval.results import Scored, write_atomically
from sft.eval.run import Prepared, read_finished, score, tell
from sft.eval.weights import open_model

EXTRAS = "extras.json"


@dataclass(frozen=True)
class Examined:
    """What is known of one side."""

    scored: Scored
    heldout_loss: float | None
    answers: list[str] | None
    noise: dict[str, dict[str, Any]] | None


def read_earlier(folder: Path, tasks: Sequence[str], ranks: Ranks) -> Examined:
    """A side that was scored before, by `sft eval` or lm_eval. Collective.

    Raises:
        UserError: its files are damaged or lack a task.
    """
    return Examined(ranks.on_first(lambda: earlier.read_scored(folder, tasks)), None, None, None)


def check_extras(prepared: Prepared, options: DriftConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts and held-out shards that a model cannot take before hours are spent on its scores.

    Raises:
        UserError: as `examine` for these two.
    """
    _keys(prepared, options, prompts, noise=False)
    encode_prompts(prepared.config, prepared.tokenizer, prompts, options.answers)


def examine(
    prepared: Prepared, options: DriftConfig, prompts: Sequence[Prompt], ranks: Ranks, out: Path, *, noise: bool
) -> Examined:
    """Ask a model what an earlier run has not asked it already. Collective.

    Args:
        prepared: the model's requests.
        options: of the report.
        prompts: what to answer.
        ranks: who takes part.
        out: folder of this side.
        noise: also measure the noise floor.

    Raises:
        UserError: the model, the held-out shards or `out` cannot be used.
    """
    keys = _keys(prepared, options, prompts, noise)
    scored = ranks.on_first(lambda: read_finished(out, prepared))
    found: dict[str, Any] = ranks.on_first(lambda: _read(out / EXTRAS, keys)) if scored is not None else {}
    missing = keys.keys() - found.keys()
    if scored is not None and not missing:
        if ranks.rank == 0:
            tell([f"{prepared.folder}: {out} holds its scores already"])
        return _examined(scored, found)
    if scored is None:
        ranks.on_first(lambda: (out / EXTRAS).unlink(missing_ok=True))  # of scores that somebody removed
    with open_model(prepared.folder, prepared.dtype, prepared.header["placement"], ranks) as model:
        scored = scored or score(prepared, model, options, ranks, out)
        if "heldout_loss" in missing:
            found["heldout_loss"] = heldout_loss(
                model,
                str(options.heldout),
                ranks,
                prepared.tokenizer,
                tokens_per_batch=options.tokens_per_batch,
                lockstep=prepared.is_partitioned,
            )
        if "answers" in missing:
            found["answers"] = _answer(prepared, model, prompts, options, ranks)
        if "noise" in missing:
            found["noise"] = measure_noise(prepared, model, options, ranks, scored, options.noise_items)
    ranks.on_first(lambda: _write(out / EXTRAS, keys, found))
    return _examined(scored, found)


def _answer(prepared: Prepared, model: Any, prompts: Sequence[Prompt], options: DriftConfig, ranks: Ranks) -> list[str]:
    """On all ranks; what the first rank refuses is refused on all."""
    asked = prepared.tokenizer, prompts, options.answers, ranks
    if prepared.is_partitioned:
        return answer(model, *asked, lockstep=True)
    replies: list[str] = ranks.on_first(lambda: answer(model, *asked))
    return replies


def _examined(scored: Scored, found: dict[str, Any]) -> Examined:
    return Examined(scored, found.get("heldout_loss"), found.get("answers"), found.get("noise"))


def _keys(prepared: Prepared, options: DriftConfig, prompts: Sequence[Prompt], noise: bool) -> dict[str, Any]:
    """What is wanted besides scores, each with what it depends on."""
    keys: dict[str, Any] = {}
    if options.heldout is not None:
        shards = open_heldout(options.heldout, prepared.tokenizer, prepared.config)
        keys["heldout_loss"] = shards.manifest["content_key"]
    if prompts:
        keys["answers"] = [options.answers.model_dump(), [asdict(prompt) for prompt in prompts]]
    if noise and options.noise_items:
        keys["noise"] = options.noise_items
    return {name: [prepared.header["weights_sha256"], key] for name, key in keys.items()}


def _read(file: Path, keys: dict[str, Any]) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: kept[name]["value"] for name, key in keys.items() if name in kept and kept[name]["of"] == key}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _write(file: Path, keys: dict[str, Any], found: dict[str, Any]) -> None:
    kept = {name: {"of": key, "value": found[name]} for name, key in keys.items()}
    with suppress(OSError, ValueError, TypeError):  # what only an earlier report asked for is still true of the scores
        kept = json.loads(file.read_text(encoding="utf-8")) | kept
    try:
        write_atomically(file, json.dumps(kept, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}; choose another --out") from None
