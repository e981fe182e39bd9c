"""The demonstration as a whole: the base knows, the tuned model has learned the task and forgot.

Run: pytest tests/e2e/test_demo.py
"""

import json
import sys

import pytest

from tests import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output, folder) of `sft demo`."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = tiny.run([sys.executable, "-m", "sft.cli", "demo", "--out", str(out)], timeout_s=840)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, out


def report(demo):
    return json.loads((demo[1] / "drift" / "drift.json").read_text())["tasks"]


def test_the_base_answers_clearly_above_chance(demo):
    for task in ("mmlu", "hellaswag"):
        assert report(demo)[task]["n"] == 220
        assert report(demo)[task]["base"] > 0.6, "chance is 0.25"


def test_forgetting_is_real_and_partial(demo):
    for task in ("mmlu", "hellaswag"):
        facts = report(demo)[task]
        assert facts["verdict"] == "degraded"
        assert facts["mcnemar_p"] < 0.05
        assert facts["tuned"] > 0.3, "not everything is gone"


def test_the_task_is_learned(demo):
    answers = dict(
        line.split(maxsplit=1) for line in demo[0].splitlines() if line.startswith(("base ", "tuned ", "expected "))
    )
    assert answers["tuned"].strip() == answers["expected"].strip()
    assert answers["base"].strip() != answers["expected"].strip()


def test_it_ends_with_the_table_and_the_path_of_its_report(demo):
    lines = [line for line in demo[0].splitlines() if line.strip()]
    assert lines[-1].startswith("all done in")
    assert lines[-2] == f"report: {demo[1]}/drift/drift.md"
    assert any("McNemar" in line or "verdict" in line for line in lines[-9:])


def test_it_can_run_again_but_replaces_nothing_else(demo, tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = tiny.run([sys.executable, "-m", "sft.cli", "demo", "--out", str(tmp_path)])
    assert done.returncode == 2
    assert "was not made by a demonstration" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
