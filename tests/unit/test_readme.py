"""The README's commands parse, its links and files exist, its outputs are whole.

Run: pytest tests/unit/test_readme.py
"""

import re
import shlex

import pytest

from sft import config, prep_options
from sft.augment_options import AugmentConfig
from sft.cli import COMMANDS, take_ranks
from sft.doctor.options import DoctorConfig
from sft.errors import UserError
from sft.eval.options import DriftConfig, EvalConfig
from sft.merge import MergeConfig
from sft.plan import PlanConfig, take_plot
from sft.report.run import ReportConfig
from sft.settings import load
from sft.stage import StageConfig
from tests.tiny import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
OPTIONS = {
    "prep": prep_options.PrepConfig,
    "prep verify": prep_options.VerifyConfig,
    "augment": AugmentConfig,
    "show": prep_options.ShowConfig,
    "train": config.RunConfig,
    "doctor": DoctorConfig,
    "stage": StageConfig,
    "plan": PlanConfig,
    "report": ReportConfig,
    "merge": MergeConfig,
    "blame": config.BlameConfig,
    "export": config.ExportConfig,
    "eval": EvalConfig,
    "drift": DriftConfig,
    "demo": config.DemoConfig,
}
POSITIONAL = {"prep verify": "shards", "show": "shards", "export": "run", "blame": "run", "report": "run"}


def shell_lines():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def sft_commands():
    return [line for line in shell_lines() if line.startswith("sft ")]


def parse(line):
    """Exit of `--print-config`: the options are complete and valid."""
    _, *words = shlex.split(line, comments=True)
    taken = 2 if " ".join(words[:2]) in OPTIONS else 1
    command, arguments = " ".join(words[:taken]), words[taken:]
    _, arguments = take_ranks(arguments)
    _, arguments = take_plot(arguments)
    with pytest.raises(SystemExit) as left:
        load(
            OPTIONS[command], [*arguments, "--print-config"], prog=f"sft {command}", positional=POSITIONAL.get(command)
        )
    return left.value.code


def test_there_are_commands_to_check():
    assert len(sft_commands()) >= 6
    assert set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("line", sft_commands())
def test_command_parses(line, capsys):
    assert parse(line) == 0
    assert capsys.readouterr().out


def test_control_a_wrong_command_is_noticed():
    with pytest.raises(UserError, match="did you mean --data.train"):
        parse("sft train --data.trian x")


@pytest.mark.parametrize("line", [line for line in shell_lines() if "launch/" in line])
def test_launch_commands_name_files_that_exist(line):
    named = [word for word in line.split() if word.startswith("launch/")]
    assert len(named) == (1 if line.startswith("sft ") else 2)
    assert all((REPO / name).is_file() for name in named)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_exist(target):
    assert (REPO / target).exists()


def test_make_targets_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_first_screen_holds_the_two_commands():
    first_screen = README.splitlines()[:25]
    assert any("make demo" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


def test_the_file_tree_names_every_module():
    tree = README.split("## What is where")[1]
    for package in ("sft", "data_prep"):
        for module in (REPO / package).glob("[a-z]*.py"):
            assert re.search(rf"\b{module.stem}\b", tree), f"{package}/{module.name} is missing from the tree"


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z]+@", README)
