"""The demonstration as a whole: the base knows; without replay the tuned model forgets, with replay it does not.

Run: pytest tests/e2e/test_demo.py
"""

import html
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


def report(demo, name="drift"):
    return json.loads((demo[1] / name / "drift.json").read_text())


def test_the_base_answers_clearly_above_chance(demo):
    for task in ("mmlu", "hellaswag"):
        facts = report(demo)["tasks"][task]
        assert facts["n"] == 220
        assert facts["base"] > 0.6, "chance is 0.25"


def test_without_replay_forgetting_is_real_and_partial_and_stops_at_the_gate(demo):
    for task in ("mmlu", "hellaswag"):
        facts = report(demo)["tasks"][task]
        assert facts["verdict"].startswith("degraded")
        assert facts["mcnemar_p"] < 0.05
        assert facts["tuned"] > 0.3, "not everything is gone"
    assert report(demo)["gate"]["passed"] is False
    assert "exit code 3: a pipeline would stop here" in demo[0]


def test_with_replay_the_gate_is_passed(demo):
    found = report(demo, "drift-replay")
    assert found["gate"]["passed"] is True
    assert found["gate"]["max_drop"] == 0.05
    for task in ("mmlu", "hellaswag"):
        assert not found["tasks"][task]["verdict"].startswith("degraded beyond")
        assert found["tasks"][task]["lower_one_sided"] > -0.05
    assert demo[0].index("exit code 3: ") < demo[0].index("exit code 0: a pipeline would go on")


def test_both_have_learned_the_task_and_one_table_shows_all_three_models(demo):
    base, replay, plain = report(demo, "drift-replay")["models"]
    assert base["heldout_loss"] > 3
    for tuned in (replay, plain):
        assert tuned["heldout_loss"] < 1
        assert tuned["tasks"].keys() == base["tasks"].keys() == {"mmlu", "hellaswag"}
    assert replay["tasks"]["hellaswag"]["value"] > plain["tasks"]["hellaswag"]["value"]
    assert plain["tasks"]["hellaswag"]["verdict"].startswith("degraded")
    assert report(demo)["models"][1]["heldout_loss"] == plain["heldout_loss"]


def test_the_answers_show_it(demo):
    answers = dict(
        line.split(maxsplit=1)
        for line in demo[0].splitlines()
        if line.startswith(("base ", "tuned ", "replay ", "expected "))
    )
    assert answers["tuned"].strip() == answers["replay"].strip() == answers["expected"].strip()
    assert answers["base"].strip() != answers["expected"].strip()


def test_the_page_of_the_training_shows_its_samples(demo):
    run = demo[1] / "replay-run"
    samples = tiny.read_jsonl(run / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 80, 160, 240]
    page = (run / "report.html").read_text()
    assert html.escape(samples[-1]["answer"]) in page
    assert samples[0]["answer"] != samples[-1]["answer"]
    assert str(run / "report.html") in demo[0]


def test_it_ends_with_the_answers_and_names_its_reports(demo):
    lines = [line for line in demo[0].splitlines() if line.strip()]
    assert lines[-1].startswith("all done in")
    reports = [line for line in lines if line.startswith("report: ")]
    assert [line.split()[1] for line in reports] == [
        f"{demo[1]}/{name}/drift.html" for name in ("drift", "drift-replay")
    ]


def test_it_can_run_again_but_replaces_nothing_else(demo, tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = tiny.run([sys.executable, "-m", "sft.cli", "demo", "--out", str(tmp_path)])
    assert done.returncode == 2
    assert "was not made by a demonstration" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
