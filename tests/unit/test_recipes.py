"""Recipes: they are complete run files, and name what exists. Run: pytest tests/unit/test_recipes.py"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.config import RunConfig
from sft.prep_options import PrepConfig
from sft.settings import load

ROOT = Path(__file__).parent.parent.parent
RUN_RECIPES = [path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if "prep" not in path.name]
PREP_RECIPES = sorted((ROOT / "launch" / "recipes").glob("prep_*.yaml"))


def command_lines(path: Path) -> list[str]:
    header = path.read_text().split("\nmodel:")[0].split("\nsources:")[0]
    return [
        line.lstrip("# ").strip()
        for line in header.splitlines()
        if re.match(r"#\s+(.*=\S+ )*(sft|launch/|sbatch )", line)
    ]


@pytest.mark.parametrize("recipe", RUN_RECIPES, ids=lambda path: path.stem)
def test_run_recipe(recipe):
    config = load(RunConfig, ["--config", str(recipe)], prog="sft train")
    assert (ROOT / config.deepspeed).is_file()
    assert complete(yaml.safe_load(recipe.read_text()), config.model_dump(mode="json"))
    match = re.search(r"(\d+) ranks x micro_batch (\d+) x accumulation (\d+) = (\d+) rows", recipe.read_text())
    assert match, "the header holds the batch arithmetic"
    ranks, micro_batch, accumulation, rows = map(int, match.groups())
    assert ranks * micro_batch * accumulation == rows == config.batch.rows_per_step
    assert micro_batch == config.batch.micro_batch
    if gpus := re.search(r"_(\d+)x80gb$", recipe.stem):
        assert int(gpus[1]) == ranks
        assert "NOT YET RUN ON THIS HARDWARE" in recipe.read_text()


@pytest.mark.parametrize("recipe", PREP_RECIPES, ids=lambda path: path.stem)
def test_prep_recipe(recipe):
    config = load(PrepConfig, ["--config", str(recipe)], prog="sft prep")
    assert complete(yaml.safe_load(recipe.read_text()), config.model_dump(mode="json"))
    trained = [load(RunConfig, ["--config", str(path)], prog="sft train").data.train for path in RUN_RECIPES]
    assert f"{config.out}/train" in trained


def complete(written: Any, resolved: Any) -> bool:
    """Whether a recipe writes out every option, so that it reads as the whole truth about a run."""
    if isinstance(resolved, dict):
        return set(written) == set(resolved) and all(complete(written[key], resolved[key]) for key in resolved)
    if isinstance(resolved, list):
        return len(written) == len(resolved) and all(map(complete, written, resolved))
    return True


@pytest.mark.parametrize("recipe", [*RUN_RECIPES, *PREP_RECIPES], ids=lambda path: path.stem)
def test_launch_lines_in_a_recipe_name_what_exists(recipe):
    lines = command_lines(recipe)
    assert any(str(recipe.relative_to(ROOT)) in line for line in lines)
    named = [name for line in lines for name in re.findall(r"(?:launch|ds_configs)/\S+", line)]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_kind_of_recipe_was_found():
    """Guards the parametrized tests against an empty folder."""
    assert {path.stem for path in RUN_RECIPES} >= {"llama3.1-8b_8x80gb", "llama2-13b_16x80gb", "demo_cpu"}
    assert PREP_RECIPES
