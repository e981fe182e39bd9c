"""Flags of `sft eval` and `sft drift` on the invented world of tests/unit/conftest.py, and what they leave."""

import json

from sft.errors import run_command


def eval_flags(world, out, *more, model="base"):
    return ["--model", str(world / model), "--data", str(world / "data"), "--out", str(out), "--dtype", "fp32", *more]


FAST = ["--limit", "9", "--answers.prompts", "none"]


def drift_flags(world, out, *more, base="base", tuned="tuned"):
    flags = ["--base", str(world / base), "--tuned", ",".join(str(world / name) for name in tuned.split(","))]
    return [*flags, "--data", str(world / "data"), "--out", str(out), "--dtype", "fp32", *FAST, *more]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_of(out):
    return json.loads((out / "drift.json").read_text())


def refused(command, flags, capsys, *words):
    """The command ends with code 2 and one line that holds these words."""
    assert run_command(command, flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in words:
        assert word in said
