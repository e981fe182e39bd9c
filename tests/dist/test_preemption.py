"""A signal to one rank in any phase: every rank leaves with 75 within a step, and the same command goes on from there.

Run: pytest tests/dist/test_preemption.py. All cases run at once; see preempt_worker.
"""

import os
import signal
import time

import pytest

from sft.checkpoint import check_undamaged, newest_complete, read_meta
from sft.errors import EXIT_PREEMPTED, EXIT_RANK_LOST
from tests import tiny
from tests.dist import forked
from tests.dist.preempt_worker import CASES
from tests.dist.training import SETTINGS, metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 4
SAVED = {"start_up": 0, "step": 1, "update": 2, "heldout": 2, "save": 2}
"""Steps that are on the disk after the signal; held-out loss and checkpoint are due after step 2."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, base_model, prepared, strategy):
    """Folder of the cases after their signal, and the flags of the runs."""
    folder = tmp_path_factory.mktemp("preemption")
    settings = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "train.max_steps": STEPS, "checkpoint.every": 2, "eval.every": 2,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    run_cases(folder, "first", flags)
    return folder, flags


def run_cases(folder, turn, flags):
    done = forked.run("tests.dist.preempt_worker", str(folder), turn, *flags, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr


def ends(folder, case, turn="first"):
    return {line["rank"]: line["code"] for line in tiny.read_jsonl(folder / case / turn / "ends.jsonl")}


def events(folder, case, kind):
    return [event for event in tiny.read_jsonl(folder / case / "run" / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("case", SAVED)
def test_every_rank_leaves_with_75_and_says_why(stopped, case):
    folder = stopped[0]
    assert ends(folder, case) == {0: EXIT_PREEMPTED, 1: EXIT_PREEMPTED}
    text = (folder / case / "first" / "rank-0.err").read_text()
    assert f"stopped as asked: rank 1 received {CASES[case][0].name}" in text
    assert "Traceback" not in text + (folder / case / "first" / "rank-1.err").read_text()


@pytest.mark.parametrize("case", [case for case in SAVED if SAVED[case]])
def test_what_was_done_is_saved_within_a_step(stopped, case):
    folder = stopped[0]
    newest = newest_complete(folder / case / "run" / "checkpoints")
    check_undamaged(newest)
    assert read_meta(newest)["step"] == SAVED[case]
    assert [line["step"] for line in metrics(folder / case / "run")] == list(range(1, SAVED[case] + 1))
    (event,) = events(folder, case, "preempt")
    assert event["step"] == SAVED[case]
    assert f"step {SAVED[case]} of {STEPS} is saved" in event["reason"]


def test_nothing_is_saved_before_the_first_step(stopped):
    folder = stopped[0]
    assert newest_complete(folder / "start_up" / "run" / "checkpoints") is None


def test_a_rank_that_is_killed_is_named_and_the_same_command_goes_on(stopped):
    folder = stopped[0]
    assert ends(folder, "killed") == {0: EXIT_RANK_LOST, 1: -signal.SIGKILL}
    (event,) = events(folder, "killed", "rank_lost")
    assert event["reason"].startswith(f"rank 1 on {os.uname().nodename} ")
    assert event["reason"] in (folder / "killed" / "first" / "rank-0.err").read_text()


def test_control_without_a_signal_the_run_ends_well(stopped):
    folder = stopped[0]
    assert ends(folder, "none") == {0: 0, 1: 0}
    assert events(folder, "none", "finish")
    assert not events(folder, "none", "preempt")


def test_each_goes_on_to_the_end_of_the_uninterrupted_run(stopped):
    folder, flags = stopped
    run_cases(folder, "again", flags)
    whole = metrics(folder / "none" / "run")
    for case in (*SAVED, "killed"):
        assert ends(folder, case, "again") == {0: 0, 1: 0}, case
        again = metrics(folder / case / "run")
        assert [line["step"] for line in again] == [1, 2, 3, 4]
        for key in ("loss", "grad_norm", "lr", "label_tokens"):
            assert [line[key] for line in again] == pytest.approx([line[key] for line in whole], rel=1e-6), (case, key)


def test_max_hours_leaves_in_time(tmp_path, base_model, prepared, strategy):
    """The limit counts from the start of the process; a run that is not told of it would take minutes."""
    flags = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "deepspeed": strategy,
        "out": tmp_path / "run", "train.max_steps": 100_000,
    }  # fmt: skip
    began_s, limit_s = time.time(), 40
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = tiny.run_module(1, "sft.train", *arguments, "--max-hours", str(limit_s / 3600))
    assert done.returncode == EXIT_PREEMPTED, done.stdout + done.stderr
    event = tiny.read_jsonl(tmp_path / "run" / "events.jsonl")[-1]
    assert event["event"] == "preempt"
    assert event["time"] - began_s < limit_s
    assert "max_hours is nearly over" in done.stderr
    newest = newest_complete(tmp_path / "run" / "checkpoints")
    assert read_meta(newest)["step"] == len(metrics(tmp_path / "run")) > 0
