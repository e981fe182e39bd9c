"""Imports point one way. Offenders are named by file and line; the rules themselves are tested on invented sources."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sft", "data_prep")

GROUND_FLOOR = {"sft.errors", "sft.config", "sft.prep_options", "sft.settings", "sft.tokenizer"}
"""What data_prep may use of sft."""
SHARED = {"data_prep.chat", "data_prep.shards", "data_prep.template"}
"""What sft may use of data_prep."""
READS_ROWS = {("sft.augment", "data_prep.readers"), ("sft.blame", "data_prep.readers")}
"""Commands of sft that also work on rows: one writes variants of them by models, one finds those of a step again."""
TORCH_FREE = (
    "data_prep",
    *sorted(GROUND_FLOOR),
    "sft.order",
    "sft.schedule",
    "sft.early_stop",
    "sft.eval.stats",
    "sft.eval.power",
    "sft.eval.shift",
    "sft.eval.compare",
    "sft.eval.tasks",
    "sft.html_page",
    "sft.report",
)
TORCH = {"torch", "deepspeed", "accelerate"}
DEEPSPEED_USERS = {"sft.engine", "sft.optim"}
"""The assembler of engines; and AdamW on the host, which is DeepSpeed's where the states are offloaded beside a GPU."""
ENTRIES = {
    "sft.cli",
    "sft.launch",
    "sft.train",
    "sft.augment",
    "sft.blame",
    "sft.export",
    "sft.merge",
    "sft.demo.run",
    "sft.doctor.run",
    "sft.signal_ranks",
    "sft.report.run",
    "sft.stage",
    "sft.plan",
    "sft.eval.evaluate",
    "sft.eval.drift",
    "data_prep.build",
    "data_prep.show",
    "data_prep.verify",
}
"""Started by the console script (by name) or by their package's __main__, and imported by nobody else."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(source: str, importer: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in the source; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = importer.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base
        elif is_import_call(node):
            yield node.lineno, str(node.args[0].value)


def is_import_call(node: ast.AST) -> bool:
    """importlib.import_module("name") or __import__("name")."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    return ast.unparse(node.func).endswith(("import_module", "__import__"))


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def broken_rule(importer: str, imported: str) -> str | None:
    """The rule that this import breaks, or None."""
    top = imported.partition(".")[0]
    inside = importer.partition(".")[0]
    if top in TORCH and is_within(importer, TORCH_FREE):
        return "is torch-free"
    if top == "deepspeed" and importer not in DEEPSPEED_USERS:
        return "builds no engine: deepspeed belongs to sft.engine"
    if inside == "data_prep" and top == "sft" and imported not in GROUND_FLOOR:
        return f"may use of sft only {', '.join(sorted(GROUND_FLOOR))}"
    if inside == "sft" and top == "data_prep" and imported not in SHARED and (importer, imported) not in READS_ROWS:
        return f"may use of data_prep only {', '.join(sorted(SHARED))}"
    if imported in ENTRIES and importer.rpartition(".")[::2] != (imported.rpartition(".")[0], "__main__"):
        return "imports an entry; move what is shared into a module of its own"
    return None


def offenders(sources: dict[str, str]) -> list[str]:
    """`file:line: module imports module: rule` for every import that breaks a rule."""
    known = set(sources) | set(SOURCES)
    return [
        f"{SOURCES.get(importer, importer)}:{line}: {importer} imports {imported}: {rule}"
        for importer, source in sources.items()
        for line, imported in imported_modules(source, importer, known)
        if (rule := broken_rule(importer, imported))
    ]


def test_import_rule():
    found = offenders({name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()})
    assert found == [], "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("importer", "source", "part"),
    [
        ("data_prep.pack", "import torch", "torch-free"),
        ("data_prep.pack", "def late():\n    import torch.nn as nn", "torch-free"),
        ("data_prep.pack", "from torch import nn", "torch-free"),
        ("data_prep.pack", "import importlib\nimportlib.import_module('torch')", "torch-free"),
        ("sft.settings", "import torch", "torch-free"),
        ("sft.eval.tasks.mmlu", "import torch", "torch-free"),
        ("data_prep.pack", "from sft.loss import LossHead", "may use of sft only"),
        ("data_prep.pack", "from sft import loss", "may use of sft only"),
        ("data_prep.pack", "from sft import config, order", "may use of sft only"),
        ("sft.inputs", "from data_prep.pack import pack", "may use of data_prep only"),
        ("sft.inputs", "from data_prep import shards, build", "may use of data_prep only"),
        ("sft.eval.score", "import data_prep.encode", "may use of data_prep only"),
        ("sft.augment", "from data_prep.formats import parse_row", "may use of data_prep only"),
        ("sft.blame", "from data_prep.formats import parse_row", "may use of data_prep only"),
        ("sft.blame_texts", "from data_prep.readers import read_blocks", "may use of data_prep only"),
        ("sft.inputs", "from data_prep.readers import read_blocks", "may use of data_prep only"),
        ("sft.loss", "from deepspeed import zero", "builds no engine"),
        ("sft.demo.world", "from sft.train import main", "imports an entry"),
        ("sft.inputs", "from . import train", "imports an entry"),
        ("sft.eval.run", "from ..export import main", "imports an entry"),
        ("data_prep.pack", "from data_prep.build import main", "imports an entry"),
        ("sft.__main__", "from sft.eval.drift import main", "imports an entry"),
    ],
)
def test_the_rule_catches(importer, source, part):
    found = offenders({importer: source})
    assert len(found) == 1, found
    assert part in found[0]
    line = 1 + next(i for i, text in enumerate(source.splitlines()) if not text.startswith(("def", "import importlib")))
    assert f":{line}: {importer} imports " in found[0]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("data_prep.pack", "from sft.errors import UserError\nfrom sft import config, tokenizer\nimport numpy"),
        ("sft.batch", "import torch\nfrom data_prep.shards import Pack\nfrom data_prep import template"),
        ("sft.engine", "import deepspeed"),
        ("data_prep.__main__", "from data_prep.build import main"),
        ("sft.eval.__main__", "from sft.eval.evaluate import main"),
        ("sft.loss", "import torchvision_is_another_package"),
        ("sft.augment", "from data_prep.readers import read_blocks"),
        ("sft.blame", "from data_prep.readers import read_blocks"),
    ],
)
def test_the_rule_allows(importer, source):
    assert offenders({importer: source}) == []


def test_every_module_that_the_rules_name_exists():
    """A rule about a module that was renamed guards nothing."""
    named = GROUND_FLOOR | SHARED | DEEPSPEED_USERS | ENTRIES | set(TORCH_FREE)
    named |= {module for rule in READS_ROWS for module in rule}
    assert named - set(SOURCES) == set()


def test_importing_the_torch_free_part_loads_no_torch():
    """Heavy libraries may be loaded later, where they are needed, but not by the import itself."""
    modules = [name for name in SOURCES if is_within(name, TORCH_FREE) and not name.endswith("__main__")]
    assert loaded_by(*modules) == []
    assert loaded_by("sft.loss") == ["torch"]


def loaded_by(*modules: str) -> list[str]:
    heavy = sorted(TORCH | {"transformers", "datasets"})
    code = f"import sys, {', '.join(modules)}; print(*[name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_files_and_functions_stay_small():
    """Over 400 lines, or over 60 in a function, is a sign of two concerns."""
    large = []
    for path in SOURCES.values():
        source = path.read_text(encoding="utf-8")
        length = len(source.splitlines())
        if length > 400:
            large.append(f"{path}: {length} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                large.append(f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert large == [], "\n" + "\n".join(large)


def test_no_print_outside_entries():
    allowed = ENTRIES | {"sft.errors", "sft.settings"}  # the exit codes' messages; --print-config and --print-schema
    found = [
        f"{path}:{node.lineno}"
        for name, path in SOURCES.items()
        if name not in allowed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []
