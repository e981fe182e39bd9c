"""`sft doctor` on two CPU ranks with a real run, healthy and with planted faults. Run: pytest tests/dist/test_doctor.py

Every module-scoped launch is asked by several tests: a rank imports for seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.dist.training import SETTINGS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

HOST = os.uname().nodename


def flags(model: Path, data: Path, strategy: Path, out: Path, *, overlap: bool) -> list[str]:
    settings = {**SETTINGS, "model.path": model, "data.train": data / "train", "deepspeed": strategy, "out": out}
    settings |= {"doctor.network_mib": 1, "doctor.overlap": overlap}  # each launch trains for a while otherwise
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def start(module: str, *options: object, second: dict[str, str] | None = None) -> list[subprocess.CompletedProcess]:
    """Two ranks of a module to their end; `second`: what rank 1 alone has in its environment."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, options)],
            env={**tiny.rank_environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(({}, second or {}))
    ]
    try:
        told = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, *texts) for rank, texts in zip(ranks, told, strict=True)
    ]


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
def planted(tmp_path_factory, base_model, prepared, strategy):
    """Another package on rank 1, a flipped byte in a shard, and no model folder: (ranks, the JSON, the shard)."""
    folder = tmp_path_factory.mktemp("planted")
    metadata = folder / "site" / "transformers-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    data = shutil.copytree(prepared, folder / "data")
    shard = sorted((data / "train").glob("*.arrow"))[0]
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    options = flags(folder / "no-model", data, strategy, folder / "run", overlap=False)
    second = {"PYTHONPATH": tiny.python_path(folder / "site", tiny.REPO / "tests" / "offline", tiny.REPO)}
    ranks = start("sft.doctor", *options, "--json", folder / "found.json", second=second)
    return ranks, json.loads((folder / "found.json").read_text()), shard.name


def failed(content: dict, *words: str) -> dict:
    """The finding that failed and holds all the words."""
    fails = [finding for finding in content["findings"] if finding["status"] == "fail"]
    found = [finding for finding in fails if all(word in json.dumps(finding) for word in words)]
    assert found, (words, fails)
    assert found[0]["remedy"]
    return found[0]


def test_both_ranks_end_with_2_and_no_traceback(planted):
    assert [rank.returncode for rank in planted[0]] == [2, 2]
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
def test_a_check_that_breaks_off_on_one_rank_ends_the_other_with_the_table(fault, codes, reason, tmp_path):
    """Rank 0 waits in a collective that nobody will join."""
    ranks = start("tests.dist.doctor_worker", "--json", tmp_path / "found.json", second={"PLANTED": fault})
    assert tuple(rank.returncode for rank in ranks) == codes, ranks
    assert re.search(reason, ranks[0].stderr), ranks[0].stderr
    content = json.loads((tmp_path / "found.json").read_text())
    assert (content["complete"], content["findings"][-1]["status"]) == (False, "fail")
    assert re.search(reason, content["stopped"])
    assert {"ranks", "clock"} <= {finding["check"] for finding in content["findings"]}
    assert "1 fail" in ranks[0].stdout
