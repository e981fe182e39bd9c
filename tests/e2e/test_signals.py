"""`sft train` is asked to stop, and goes on when it is started again. Run: pytest tests/e2e/test_signals.py"""

import subprocess
import sys

import pytest

from sft.checkpoint import newest_complete, read_meta
from sft.errors import EXIT_PREEMPTED
from tests import tiny
from tests.dist import forked
from tests.dist.stand_in import processes_in, wait_until
from tests.dist.training import SETTINGS, metrics

pytestmark = [pytest.mark.e2e, pytest.mark.dist]

STEPS = 24


def has_stepped(run):
    return (run / "metrics.jsonl").is_file() and len(metrics(run)) >= 2


def test_stopped_by_a_signal_it_goes_on(tmp_path, base_model, prepared, strategy):
    """With the same flags; left alone, it would save at its end only. test_pipeline resumes by the command."""
    run = tmp_path / "run"
    settings = {**SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategy,
                "train.max_steps": STEPS, "checkpoint.every": 1000, "out": run}  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sft.cli", "train", "--ranks", "2", *flags]
    first = subprocess.Popen(
        command, cwd=tmp_path, env=tiny.rank_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: has_stepped(run))
    first.terminate()
    said = first.communicate(timeout=60)[1]
    assert first.returncode == EXIT_PREEMPTED, said
    assert "SIGTERM: saving, then stopping" in said
    assert said.count("stopped as asked: ") == 1
    assert "Traceback" not in said
    assert processes_in(tmp_path) == []
    done = [line["step"] for line in metrics(run)]
    assert done == list(range(1, len(done) + 1))
    assert len(done) < STEPS
    assert read_meta(newest_complete(run / "checkpoints"))["step"] == len(done)
    assert tiny.read_jsonl(run / "events.jsonl")[-1]["event"] == "preempt"

    again = forked.run_ranks(2, "sft.train", *flags)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert [event["event"] for event in tiny.read_jsonl(run / "events.jsonl")[-2:]] == ["finish", "export"]
