"""What a DeepSpeed file may not hold, and what the console script says.

Run: pytest tests/unit/test_strategy_and_cli.py
"""

import json
import sys

import pytest

from sft.cli import dispatch, take_ranks
from sft.engine import OWNED_KEYS, read_strategy
from sft.errors import GateFailed, UserError, run_command
from tests import tiny

GOOD = {"zero_optimization": {"stage": 3}}


def write(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_of_ones_own_is_read(tmp_path):
    assert read_strategy(write(tmp_path, GOOD)) == GOOD


@pytest.mark.parametrize("name", ["zero3", "zero3.json", "ds_configs/zero3.json"])
def test_shipped_names_work_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_strategy(name)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_keys_are_refused(tmp_path, key):
    with pytest.raises(UserError, match=f"remove {key}"):
        read_strategy(write(tmp_path, {**GOOD, key: 1}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "must hold a JSON object"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
        ({"zero_optimization": {"stage": 0}}, "must be 1, 2 or 3"),
        ({"zero_optimization": None}, "must be 1, 2 or 3"),
        ({}, "must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "device 'nvme' is not supported",
        ),
        ({**GOOD, "list": [{"x": "auto"}]}, 'list.0.x is "auto"'),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_strategy(write(tmp_path, content))


def test_an_unknown_strategy_lists_the_shipped_ones():
    with pytest.raises(UserError, match="shipped: zero1, zero2, zero3"):
        read_strategy("nowhere/zero3.json")


def test_ranks_are_taken_out_of_the_options():
    assert take_ranks(["--a", "1", "--ranks", "2", "--b", "3"]) == (2, ["--a", "1", "--b", "3"])
    assert take_ranks(["--a", "1"]) == (None, ["--a", "1"])
    assert take_ranks(["--ranks=2", "--b", "3"]) == (2, ["--b", "3"])
    for bad in (["--ranks"], ["--ranks", "0"], ["--ranks", "two"], ["--ranks="]):
        with pytest.raises(UserError, match="--ranks"):
            take_ranks(bad)


def test_usage_names_every_command(capsys):
    dispatch([])
    usage = capsys.readouterr().out
    names = ("demo", "prep", "prep verify", "show", "train", "export", "eval", "drift")
    assert all(f"  {name} " in usage for name in names)


def raising(error):
    def main(_argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("what"), 2), (GateFailed("lost"), 3), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys):
    assert run_command(raising(error), []) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_crash_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), [])


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(5)", 5, ""),
        ("raise UserError('what, where')", 2, "error: what, where"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_rank_leaves_with_its_own_code_whatever_its_threads_do(ending, code, said):
    """A thread that never ends stands for those of a process group."""
    program = f"""
import threading, time
from sft.errors import UserError, run_rank
def main(argv):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    print("started")
    {ending}
run_rank(main)
"""
    done = tiny.run([sys.executable, "-c", program], timeout_s=30)
    assert done.returncode == code
    assert done.stdout == "started\n"
    assert said in done.stderr
