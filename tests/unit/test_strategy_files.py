"""DeepSpeed files: DeepSpeed takes them, the README explains every number, and none holds what the run config owns."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
STRATEGIES = sorted((ROOT / "ds_configs").glob("*.json"))
OWNED_BY_RUN_CONFIG = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "wandb",
    "tensorboard",
    "csv_monitor",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}


def test_every_strategy_was_found() -> None:
    """Guards the parametrized tests against an empty folder."""
    shipped = {"zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all"}
    assert {path.stem for path in STRATEGIES} == shipped


def keys_of(value: Any) -> set[str]:
    return {*value, *(key for item in value.values() for key in keys_of(item))} if isinstance(value, dict) else set()


def explained_keys() -> set[str]:
    """Last parts of the names in the first column of the README's tables."""
    first_cells = re.findall(r"^\| `([^`]+)` \|", (ROOT / "ds_configs" / "README.md").read_text(), re.MULTILINE)
    return {part for cell in first_cells for part in cell.split(".")}


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_strategy_file(path):
    text = path.read_text()
    strategy = json.loads(text, object_pairs_hook=refuse_duplicates)
    assert keys_of(strategy).isdisjoint(OWNED_BY_RUN_CONFIG)
    assert '"auto"' not in text
    assert strategy["data_types"]["grad_accum_dtype"] == "fp32"
    assert strategy["communication_data_type"] == "fp32"
    assert strategy["zero_optimization"]["overlap_comm"] is False
    headings = {"zero_optimization"}
    assert keys_of(strategy) - headings - explained_keys() == set()
    assert f"`{path.name}`" in (ROOT / "ds_configs" / "README.md").read_text()


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


def test_readme_explains_nothing_that_is_gone():
    used = set().union(*(keys_of(json.loads(path.read_text())) for path in STRATEGIES))
    assert {key for key in explained_keys() if not key.endswith("json")} - used - {"zero1", "zero2", "zero3"} <= {
        path.stem for path in STRATEGIES
    }


def test_readme_numbers_are_those_of_the_files():
    """A value in the second column of the README is a value of that key in one of the files."""
    rows = re.findall(r"^\| `([^`]+)` \| (`[^|]+`) \|", (ROOT / "ds_configs" / "README.md").read_text(), re.MULTILINE)
    strategies = [json.loads(path.read_text()) for path in STRATEGIES]
    checked = 0
    for name, cell in rows:
        values = [json.loads(value) for value in re.findall(r"`([^`]+)`", cell)]
        found = [value for strategy in strategies for value in find(strategy, name.split("."))]
        assert found, name
        assert sorted(map(str, set(map(str, found)))) == sorted(map(str, values)), name
        checked += 1
    assert checked >= 15


def find(value: Any, path: list[str]) -> Iterator[Any]:
    """Values under the dotted path, wherever it begins."""
    if not isinstance(value, dict):
        return
    if path[0] in value:
        inner = value[path[0]]
        if len(path) == 1:
            yield inner
        else:
            yield from find(inner, path[1:])
    for item in value.values():
        yield from find(item, path)


@pytest.fixture(scope="module")
def parse_with_deepspeed() -> Callable[[dict[str, Any]], Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    def parse(strategy: dict[str, Any]) -> Any:
        return DeepSpeedConfig({**strategy, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})

    return parse


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_file(path, parse_with_deepspeed):
    strategy = json.loads(path.read_text())
    parsed = parse_with_deepspeed(strategy)
    zero = parsed.zero_config
    assert parsed.grad_accum_dtype == "fp32"
    assert zero.overlap_comm is False
    for key, value in strategy["zero_optimization"].items():
        understood = getattr(zero, key.removeprefix("stage3_"))
        if isinstance(value, dict):
            assert {name: getattr(understood, name) for name in value} == value
        else:
            assert understood == value, key


def test_deepspeed_refuses_a_misspelt_key(parse_with_deepspeed):
    """The test above means something only if an unknown key is an error."""
    strategy = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    strategy["zero_optimization"]["reduce_bucket_sise"] = 1
    with pytest.raises(ValueError, match="reduce_bucket_sise"):
        parse_with_deepspeed(strategy)


def test_engine_owns_the_keys_that_the_files_may_not_hold():
    from sft.engine import OWNED_KEYS

    assert set(OWNED_KEYS) == OWNED_BY_RUN_CONFIG
