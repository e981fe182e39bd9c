"""Exit codes and last words of commands and ranks. Run: pytest tests/unit/test_endings.py"""

import subprocess
import sys

import pytest

from sft.errors import GateFailed, GuardStop, Preempted, RankLost, UserError, run_command
from tests import tiny

RANK = """
import sys, time
from pathlib import Path
from sft.errors import {endings}

def main(argv):
    for line in range(100):
        print("line", line)
        time.sleep(0.01)
    print("a warning", file=sys.stderr)
    Path(argv[0]).write_text("to the end")

{start}
"""


@pytest.mark.parametrize(
    ("kind", "code", "word"),
    [
        (UserError, 2, "error"),
        (GateFailed, 3, "gate failed"),
        (GuardStop, 4, "stopped"),
        (RankLost, 5, "stopped"),
        (Preempted, 75, "stopped as asked"),
    ],
)
def test_expected_endings_are_one_line(kind, code, word, capsys):
    def main(_argv):
        raise kind("what, where, what to do")

    assert run_command(main, []) == code
    assert capsys.readouterr().err == f"{word}: what, where, what to do\n"


def test_what_all_ranks_agreed_on_is_said_by_rank_0_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for kind, said in ((Preempted, ""), (GuardStop, ""), (UserError, "error: x\n")):
        assert run_command(lambda _argv, kind=kind: (_ for _ in ()).throw(kind("x")), []) != 0
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("endings", "start", "goes_on"),
    [
        ("run_rank", "run_rank(main)", True),
        ("run_command", "sys.exit(run_command(main))", False),  # control: a command has nothing to say to nobody
    ],
)
def test_a_reader_that_leaves_does_not_end_a_rank(tmp_path, endings, start, goes_on):
    (tmp_path / "rank.py").write_text(RANK.format(endings=endings, start=start))
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-u", str(tmp_path / "rank.py"), str(done)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=tiny.rank_environment(),
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert done.exists() == goes_on
