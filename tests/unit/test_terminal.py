"""What people see of a run, by hand and in pseudo-terminals. Run: pytest tests/unit/test_terminal.py"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from sft.terminal import TimeLeft, duration, fit
from tests import tiny

LINE = {
    "step": 120, "epoch": 0.24, "loss": 1.2345, "lr": 1.9e-5, "grad_norm": 0.812, "tokens_per_s": 12345.0,
    "tokens_per_s_per_gpu": 6172.5, "mfu": 0.412, "eta_s": 7500.0, "peak_mem_gib": 71.5, "step_time_s": 2.0,
}  # fmt: skip
STUB_RUN = f"""
import sys, time
from sft.terminal import Terminal
terminal = Terminal(1500)
terminal.start()
terminal.say("a line of more than eighty characters, " + "x" * 60 + " which must stay one line in a file")
for step in (120, 121):
    terminal.show({{**{LINE!r}, "step": step}}, 1.1999)
    time.sleep(0.3)
terminal.show({{**{LINE!r}, "step": 122, "loss": None, "lr": None, "grad_norm": None, "tokens_per_s": None,
    "tokens_per_s_per_gpu": None, "mfu": None, "eta_s": None}}, None)
terminal.say("step 122: saved")
terminal.stop()
"""
PLAIN = (
    "step 120/1500  loss 1.2345  lr 1.90e-05  grad norm 0.812  12,345 tokens/s (6,172/GPU)  MFU 41.2%  left 2 h 05 min"
)


def on_terminal(columns, **environment):
    """What the stub run writes to a terminal of that width, as lines without control sequences."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    env = {key: value for key, value in tiny.rank_environment().items() if key not in ("SLURM_JOB_ID", "COLUMNS")}
    env |= {"TERM": "xterm-256color", **environment}
    with subprocess.Popen([sys.executable, "-c", STUB_RUN], stdout=its, stderr=its, stdin=its, env=env) as process:
        os.close(its)
        written = b""
        while piece := _read(ours):
            written += piece
        os.close(ours)
    assert process.returncode == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()).replace("\r", "\n").split("\n")


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other end is closed
        return b""


@pytest.mark.parametrize(
    ("columns", "status"),
    [
        (80, "loss 1.2345  lr 1.90e-05  grad norm 0.812  12,345 tokens/s  MFU 41.2%"),
        (
            120,
            "loss 1.2345  lr 1.90e-05  grad norm 0.812  12,345 tokens/s (6,172/GPU)  MFU 41.2%  "
            "lowest held-out loss 1.1999",
        ),
        (50, "loss 1.2345  12,345 tokens/s  MFU 41.2%"),
    ],
)
def test_the_bar_fits_the_terminal(columns, status):
    lines = on_terminal(columns)
    assert status in [line.rstrip() for line in lines]
    bars = [line for line in lines if line.startswith("step ") and "━" in line]
    assert any(line.rstrip().endswith("left 2 h 05 min") and "120/" in line for line in bars)
    assert max(map(len, bars)) <= columns
    assert "step 122: saved" in [line.rstrip() for line in lines]
    assert "passed over" in [line.rstrip() for line in lines]


def test_plain_lines_under_slurm_and_on_dumb_terminals():
    for environment in ({"SLURM_JOB_ID": "1"}, {"TERM": "dumb"}):
        lines = on_terminal(200, **environment)
        assert PLAIN in lines
        assert not any("━" in line for line in lines)


def test_plain_lines_in_a_pipe():
    done = subprocess.run(
        [sys.executable, "-c", STUB_RUN], capture_output=True, text=True, check=True, env=tiny.rank_environment()
    )
    first, second, *rest = done.stdout.splitlines()
    assert first.endswith("in a file")
    assert second == PLAIN
    assert rest == ["step 122: saved"], "steps within two seconds of a printed one are not printed"


def test_least_figures_whatever_the_width():
    assert fit(LINE, None, 10) == "loss 1.2345  12,345 tokens/s"
    one_rank = LINE | {"tokens_per_s_per_gpu": 12345.0}
    assert "GPU" not in fit(one_rank, None, 200)
    assert "(6,172/rank)" in fit(LINE | {"peak_mem_gib": None}, None, 200)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (99.4, "99 s"), (100, "2 min"), (5960, "99 min"), (7500, "2 h 05 min"),
     (172_740, "47 h 59 min"), (172_800, "2 d 00 h"), (273_700, "3 d 04 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


class Clock:
    """A clock that the test winds."""

    now_s = 100.0

    def __call__(self):
        return self.now_s


def run_steps(spent, total=100):
    """Estimates after steps; each has (its own time, time beside it until its line is written)."""
    clock = Clock()
    left = TimeLeft(total, clock)
    estimates = []
    for step, (own_s, beside_s) in enumerate(spent, start=1):
        clock.now_s += (own_s or 0.0) + beside_s
        estimates.append(left.after(step, own_s))
    return estimates


def test_time_left_is_steps_left_times_a_step():
    assert run_steps([(60.0, 5.0), (2.0, 0.0), (2.0, 0.0)]) == [None, 98 * 2.0, 97 * 2.0]  # the first step warms up


def test_one_slow_step_does_not_move_the_time_left():
    steady = [(2.0, 0.0)] * 10
    assert run_steps([*steady, (500.0, 0.0)])[-1] == 89 * 2.0  # control: the mean step would say 4,522 s


def test_held_out_loss_and_saves_are_spread_over_the_steps():
    estimate = run_steps([(2.0, 0.0)] * 10 + [(2.0, 30.0)])[-1]
    assert estimate == pytest.approx(89 * (2.0 + 30.0 / 10))


def test_passed_over_steps_take_little_and_a_rollback_goes_back():
    assert run_steps([(None, 0.0), (None, 0.0)]) == [None, None]
    clock = Clock()
    left = TimeLeft(10, clock)
    estimates = []
    for step in (1, 2, 3, 2, 3):
        clock.now_s += 1.0
        estimates.append(left.after(step, 1.0))
    assert estimates == [None, 8.0, 7.0, 8.0, 7.0]
