"""`sft doctor` on two CPU ranks with a real run, healthy and with planted faults. Run: pytest tests/dist/test_doctor.py

What was launched is asked by several tests, and all but the healthy launch come from one process: imports take seconds.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.dist.training import SETTINGS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

HOST = os.uname().nodename


def flags(model: Path, data: Path, strategy: Path, out: Path, *, overlap: bool) -> list[str]:
    settings = {**SETTINGS, "model.path": model, "data.train": data / "train", "deepspeed": strategy, "out": out}
    settings |= {"doctor.network_mib": 1, "doctor.overlap": overlap}  # each launch trains for a while otherwise
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, base_model, prepared, strategy):
    """The command as a user gives it: (what it said, the JSON, the run's folder)."""
    folder = tmp_path_factory.mktemp("healthy")
    options = flags(base_model, prepared, strategy, folder / "run", overlap=True)
    command = [sys.executable, "-m", "sft.cli", "doctor", "--ranks", "2", "--json", str(folder / "found.json")]
    done = tiny.run([*command, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((folder / "found.json").read_text()), folder / "run"


def test_a_healthy_run_fails_nowhere(healthy):
    done, content, _ = healthy
    assert (content["complete"], content["exit_code"], content["stopped"]) == (True, 0, None)
    assert [finding for finding in content["findings"] if finding["status"] == "fail"] == []
    assert content["header"]["world_size"] == 2
    assert content["header"]["hosts"] == [HOST]
    assert content["header"]["out"].endswith("run")
    assert "0 fail" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_every_part_has_looked(healthy):
    found = {finding["check"]: finding["status"] for finding in healthy[1]["findings"]}
    assert found["ranks"] == "pass"
    assert found["clock"] == "skip", "one host"
    for part in (
        "versions",
        "files",
        "save path",
        "bandwidth",
        "overlap",
        "model folder",
        "disk",
        "write speed",
        "/dev/shm",
        "compute",
    ):
        assert [check for check in found if part in check], (part, sorted(found))
    progress = re.findall(r"(?m)^\[ *[\d.]+ s\] (.*)$", healthy[0].stderr)
    assert progress == ["software", "machine", "disk", "inputs", "clock", "process group", "network", "overlap"]


def test_every_warning_says_what_to_do(healthy):
    for finding in healthy[1]["findings"]:
        assert bool(finding["remedy"]) == (finding["status"] in ("warn", "fail")), finding


def test_nothing_is_left_where_the_run_will_be(healthy):
    run = healthy[2]
    assert not run.exists() or list(run.iterdir()) == []


@pytest.fixture(scope="module")
def launches(tmp_path_factory, base_model, prepared, strategy):
    """How the ranks of each launch ended, from one process: name -> (ranks, the JSON), and the damaged shard's name.

    planted: another package on rank 1, a flipped byte in a shard, and no model folder.
    """
    folder = tmp_path_factory.mktemp("launches")
    metadata = folder / "site" / "transformers-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    data = shutil.copytree(prepared, folder / "data")
    shard = sorted((data / "train").glob("*.arrow"))[0]
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    plan = {
        "planted": (
            flags(folder / "no-model", data, strategy, folder / "run", overlap=False),
            [{}, {"site": str(folder / "site")}],
        ),
        "raise": ([], [{"fault": "wait"}, {"fault": "raise"}]),
        "kill": ([], [{"fault": "wait"}, {"fault": "kill"}]),
        "rank 0 stopped": ([], [{"fault": "stop"}, {"fault": "wait"}]),
        "rank 1 late": (
            ["--doctor.limit_s", "10"],
            [{"fault": "wait"}, {"fault": "sleep"}, {"fault": "wait", "local_rank": "0"}],
        ),
    }
    asked = {
        name: {"argv": [*argv, "--json", str(folder / f"{name}.json")], "ranks": ranks}
        for name, (argv, ranks) in plan.items()
    }
    (folder / "plan.json").write_text(json.dumps(asked))
    worker = [sys.executable, "-m", "tests.dist.doctor_worker", str(folder / "plan.json"), str(folder / "ended.json")]
    done = tiny.run(worker, environment={**tiny.rank_environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"})
    assert done.returncode == 0, done.stdout + done.stderr
    ended = json.loads((folder / "ended.json").read_text())
    found = {name: json.loads(path.read_text()) for name in plan if (path := folder / f"{name}.json").exists()}
    ranks = {name: [SimpleNamespace(**rank) for rank in ended[name]] for name in plan}
    return SimpleNamespace(ranks=ranks, found=found, shard=shard.name)


@pytest.fixture(scope="module")
def planted(launches):
    """(ranks, the JSON, the damaged shard)."""
    return launches.ranks["planted"], launches.found["planted"], launches.shard


def failed(content: dict, *words: str) -> dict:
    """The finding that failed and holds all the words."""
    fails = [finding for finding in content["findings"] if finding["status"] == "fail"]
    found = [finding for finding in fails if all(word in json.dumps(finding) for word in words)]
    assert found, (words, fails)
    assert found[0]["remedy"]
    return found[0]


def test_both_ranks_end_with_2_and_no_traceback(planted):
    assert [rank.code for rank in planted[0]] == [2, 2]
    for rank in planted[0]:
        assert "Traceback" not in rank.stderr, rank.stderr
    assert planted[0][1].stdout == "", "rank 0 speaks for all"


def test_another_version_names_the_rank_and_its_host(planted):
    finding = failed(planted[1], "transformers", "9.9.9")
    assert f"rank 1 on {HOST}" in finding["where"] + finding["found"]


def test_a_flipped_byte_names_the_file(planted):
    finding = failed(planted[1], planted[2])
    assert HOST in finding["where"] + finding["found"]


def test_a_missing_model_hides_none_of_the_others(planted):
    failed(planted[1], "no-model")
    assert len([finding for finding in planted[1]["findings"] if finding["status"] == "fail"]) >= 3
    assert planted[1]["complete"] is True


def test_the_table_shows_what_failed_and_what_to_do(planted):
    text = planted[0][0].stdout
    assert "→" in text
    assert "9.9.9" in text
    fails = sum(finding["status"] == "fail" for finding in planted[1]["findings"])
    assert text.splitlines()[-1].startswith(f"{fails} fail, ")


@pytest.mark.parametrize(
    ("fault", "codes", "reason"),
    [("raise", (5, 5), "rank 1 on .* ended in .*network: OSError: planted"), ("kill", (5, -9), "rank 1 on .* gone")],
)
def test_a_check_that_breaks_off_on_one_rank_ends_the_other_with_the_table(fault, codes, reason, launches):
    """Rank 0 waits in a collective that nobody will join."""
    ranks, content = launches.ranks[fault], launches.found[fault]
    assert tuple(rank.code for rank in ranks) == codes, ranks
    assert re.search(reason, ranks[0].stderr), ranks[0].stderr
    assert (content["complete"], content["findings"][-1]["status"]) == (False, "fail")
    assert re.search(reason, content["stopped"])
    assert {"ranks", "clock"} <= {finding["check"] for finding in content["findings"]}
    assert "1 fail" in ranks[0].stdout


def test_a_rank_0_that_is_stopped_in_a_check_of_its_own_ends_the_other(launches):
    """Its store answers no more, and nothing in Python interrupts a question to it."""
    zero, one = launches.ranks["rank 0 stopped"]
    assert (zero.code, one.code) == (None, 5), one
    assert re.search(f"stopped: .*rank 0 on {HOST} .*stopped by a signal, does not answer", one.stderr), one.stderr
    assert "Traceback" not in one.stderr


def test_a_rank_that_is_late_is_named_by_all(launches):
    """Rank 2 is the first of its host, and so speaks for it."""
    zero, _, other = launches.ranks["rank 1 late"]
    reason = f"rank 1 on {HOST} did not finish 'machine' within 10 s"
    assert (zero.code, other.code) == (5, 5)
    assert reason in zero.stderr
    assert reason in other.stderr, "not only that rank 0 left"
    assert reason in launches.found["rank 1 late"]["stopped"]
    assert "doctor.limit_s" in zero.stdout
