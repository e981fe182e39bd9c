"""`sft doctor` over two hosts through launch/multi_node.sh: healthy ones, and four faults of one host at once.

Run: pytest tests/launch/test_doctor_hosts.py
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.errors import EXIT_BAD_INPUT
from tests import tiny
from tests.launch import jobs
from tests.launch.hosts import Host
from tests.launch.jobs import pair  # noqa: F401

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

LIMIT_S = 240.0
SLOW_MBIT_PER_S = 40
OPTIONS = ("--doctor.network_mib", "1", "--json", "found.json")


@pytest.fixture(scope="module")
def examined(tmp_path_factory, pair, base_model, prepared, strategy) -> Iterator[SimpleNamespace]:  # noqa: F811
    """What was found on the same hosts before and after the faults were planted."""
    folder = tmp_path_factory.mktemp("doctor")
    data = shutil.copytree(prepared, folder / "data")
    job = jobs.make_job(folder / "job", base_model, data, strategy)
    site = job.folder / "site"
    site.mkdir()
    job.out.mkdir()
    shell = jobs.launching_shell(job.folder, JOB="doctor", PYTHONPATH=f"{site}:{tiny.REPO}")
    healthy, found_healthy = examine(job, pair, shell, *OPTIONS)
    shard = sorted((data / "train").glob("*.arrow"))[0]
    plant(pair[1], folder, site, shard, job.out)
    planted, found_planted = examine(job, pair, shell, *OPTIONS, "--doctor.overlap", "false")
    left = jobs.left_on(*pair)
    yield SimpleNamespace(**locals())
    jobs.clear(*pair)


def examine(job: jobs.Job, pair: tuple[Host, Host], shell: dict[str, str], *options: str):  # noqa: F811
    """(how the launcher ended, the findings)."""
    ended = job.start(pair[0], *options, environment=shell).wait(LIMIT_S)
    written = job.folder / "found.json"
    assert written.is_file(), ended.said
    found = json.loads(written.read_text())
    written.unlink()
    return ended, found


def plant(hostb: Host, folder: Path, site: Path, shard: Path, out: Path) -> None:
    """On one host alone: another transformers, a flipped byte in a shard, a small disk at `out`, and a slow link."""
    metadata = folder / "other-site" / "transformers-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    hostb.mount_over(metadata.parent.parent, site)
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / "flipped").write_bytes(whole)
    hostb.mount_over(folder / "flipped", shard)
    hostb.mount_small_disk(out, 1)
    hostb.run("bash", "-c", f"head -c 900K /dev/zero >{folder}/filler && cp {folder}/filler {out}/lock")
    hostb.slow_down(SLOW_MBIT_PER_S)


def failed(found: dict[str, Any], *words: str) -> dict[str, Any]:
    """The finding that failed and holds all the words."""
    fails = [finding for finding in found["findings"] if finding["status"] == "fail"]
    fitting = [finding for finding in fails if all(word in json.dumps(finding) for word in words)]
    assert fitting, (words, fails)
    assert fitting[0]["remedy"]
    return fitting[0]


def test_healthy_hosts_fail_nowhere(examined):
    found = examined.found_healthy
    assert [finding for finding in found["findings"] if finding["status"] == "fail"] == []
    assert (examined.healthy.code, found["exit_code"], found["complete"]) == (0, 0, True), examined.healthy.said
    assert found["header"]["hosts"] == ["hosta", "hostb"]
    assert "Traceback" not in examined.healthy.said


@pytest.mark.parametrize("part", ["clock", "between hosts", "overlap", "files", "write speed"])
def test_what_needs_two_hosts_was_looked_at(examined, part):
    looked = [finding for finding in examined.found_healthy["findings"] if part in finding["check"]]
    assert looked
    assert all(finding["status"] in ("pass", "warn") for finding in looked), looked


def test_faults_end_with_2_and_hide_none_of_the_others(examined):
    assert examined.planted.code == EXIT_BAD_INPUT, examined.planted.said
    assert examined.found_planted["complete"] is True
    assert "Traceback" not in examined.planted.said
    assert examined.left == []


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ("versions", ["transformers", "9.9.9"]),
        ("files", [".arrow"]),
        ("disk", ["disk"]),
        ("links between hosts", ["hostb -> hosta"]),
    ],
)
def test_each_fault_names_the_host(examined, check, words):
    finding = failed(examined.found_planted, check, *words)
    assert "hostb" in finding["where"], finding


def test_only_what_was_planted_fails(examined):
    fails = [finding for finding in examined.found_planted["findings"] if finding["status"] == "fail"]
    assert all("hostb" in finding["where"] + finding["found"] for finding in fails), fails
