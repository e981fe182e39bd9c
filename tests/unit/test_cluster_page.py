"""docs/cluster.md: its commands parse, the files and variables that it names exist, its lines are those of the code.

Run: pytest tests/unit/test_cluster_page.py
"""

import re
import shlex
from pathlib import Path

import pytest

from sft.config import RunConfig
from sft.doctor.options import DoctorConfig
from sft.eval.options import DriftConfig
from sft.launch_env import ALLOWED, ALSO, SECRET
from sft.settings import load
from sft.stage import StageConfig
from tests.tiny import REPO

PAGE = (REPO / "docs" / "cluster.md").read_text(encoding="utf-8")
RUN_FILE = "model: {path: m}\ndata: {train: d}\nout: o\n"
OPTIONS = {"doctor": DoctorConfig, "stage": StageConfig, "train": RunConfig, "drift": DriftConfig}
CODE = "\n".join(
    path.read_text(encoding="utf-8") for folder in ("sft", "launch") for path in (REPO / folder).rglob("*.*")
    if path.suffix in (".py", ".sh", ".sbatch")
)  # fmt: skip


def commands() -> list[str]:
    lines = [line.strip().partition("  #")[0].strip() for line in PAGE.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


def of_sft(line: str) -> list[list[str]]:
    """The words of each `sft COMMAND ...` in a line, also of one within quotes or $( )."""
    found = re.findall(r"(?<![\w./])sft (?:doctor|stage|train|drift)[^\"&)]*", line.replace("$overrides", ""))
    return [shlex.split(text)[1:] for text in found]


def rows(heading: str) -> list[list[str]]:
    """Cells of the tables below a heading, without their first two lines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_there_are_commands_to_check():
    assert len(commands()) > 12
    assert sum(len(of_sft(line)) for line in commands()) >= 5


@pytest.mark.parametrize("words", [words for line in commands() for words in of_sft(line)], ids=" ".join)
def test_the_options_of_a_command_are_valid(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN_FILE)
    command, *options = words
    if command == "doctor" and not options:
        return
    with pytest.raises(SystemExit) as left:
        load(OPTIONS[command], [*options, "--print-config"], prog=f"sft {command}")
    assert left.value.code == 0


@pytest.mark.parametrize("path", sorted(set(re.findall(r"launch/[\w./-]+\.\w+", PAGE))))
def test_a_file_that_is_named_exists(path):
    assert (REPO / path).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", PAGE))))
def test_links_exist(target):
    assert (REPO / "docs" / target).exists()


def test_the_allow_list_is_the_codes():
    told = PAGE.split("whose names begin with ")[1].split(" and not\nCUDA_VISIBLE_DEVICES")[0]
    assert set(re.findall(r"[A-Z][A-Z_]+", told)) == {*ALLOWED, *ALSO}
    told = PAGE.split("whose name says ")[1].split(" is therefore")[0]
    assert set(re.findall(r"[A-Z]+", told)) == set(SECRET.pattern.split("|"))


def pieces(line: str) -> list[str]:
    """The fixed words of a line between what varies: names, numbers, the rest of a sentence."""
    varies = r"…|\S*\d\S*|\(.*?\)|\b(SIGTERM|forward|stopped|error|rank|for|is gone|gives|in step|s in step)\b"
    text = re.sub(varies, "\0", line)
    return [piece.strip(" :;,") for piece in text.split("\0") if len(piece.strip(" :;,")) > 3]


FAILURES = [row[0] for row in rows("What failures look like")]


@pytest.mark.parametrize("line", FAILURES)
def test_a_line_of_the_table_of_failures_is_one_of_the_code(line):
    """Each of its fixed pieces stands in a message, or comes from ssh or the system."""
    foreign = ("ssh", "No route to host", "No space left on device")
    own = re.sub(r'["\n]\s*f?"', "", re.sub(r'"\s*\n\s*f?"', "", CODE))
    told = [piece for text in re.findall(r"`([^`]+)`", line) for piece in pieces(text)]
    assert told
    missing = [piece for piece in told if piece not in own and not any(word in piece for word in foreign)]
    assert not missing


def test_control_other_lines_are_not_found():
    assert "the launcher fell asleep" not in CODE
    assert pieces("rank 9 on n2 fell asleep for 60 s") == ["fell asleep"]
