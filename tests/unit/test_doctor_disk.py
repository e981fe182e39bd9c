"""Room, speed and one shared folder at --out. Run: pytest tests/unit/test_doctor_disk.py"""

import errno
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sft.config import RunConfig
from sft.doctor import disk
from sft.doctor.finding import Report
from sft.doctor.group import Group
from sft.rendezvous import Meeting, Place
from sft.run_folder import DOCTOR, run_folder

GIB = 2**30
FACTS = {
    "out": "/data/run",
    "folder": "/data",
    "problems": [],
    "room": {"need_gib": 10.0, "free_gib": 100.0, "checkpoint_gib": 5.0, "checkpoints": 2},
    "inodes": 10**6,
    "free": 100 * GIB,
    "checkpoint_bytes": 60 * GIB,
    "write": {"bytes": GIB, "seconds": 1.0, "bytes_per_s": GIB},
}


def config_at(out, base_model, prepared, **more):
    shards = {"train": str(prepared / "train"), "heldout": str(prepared / "heldout")}
    values = {"model": {"path": str(base_model)}, "data": shards, "batch": {"rows_per_step": 4}, "out": str(out)}
    return RunConfig.model_validate({**values, **more})


def cluster(**of_n1):
    """Two hosts of two ranks; those of n1 with other facts."""
    return [Report(rank, f"n{rank // 2}", rank % 2, {**FACTS, **(of_n1 if rank > 1 else {})}) for rank in range(4)]


def by_check(reports):
    return {finding.check: finding for finding in disk.judge(reports)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(disk, "WRITE_BYTES", 2**20)
    monkeypatch.setattr(disk, "CHUNK_BYTES", 2**18)


@pytest.mark.usefixtures("quick")
def test_this_host_passes_and_nothing_stays_behind(tmp_path, base_model, prepared):
    facts = json.loads(json.dumps(disk.collect(config_at(tmp_path / "a" / "run", base_model, prepared))))
    assert facts["folder"] == str(tmp_path)
    assert facts["write"]["bytes"] == 2**20
    assert list(tmp_path.iterdir()) == []
    findings = disk.judge([Report(0, "n0", 0, facts)])
    assert [(finding.check, finding.status) for finding in findings] == [("disk", "pass"), ("write speed", "pass")]
    assert str(tmp_path) in findings[0].found


@pytest.mark.usefixtures("quick")
def test_every_rank_of_a_host_writes(tmp_path, base_model, prepared, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert disk.collect(config_at(tmp_path, base_model, prepared))["write"]["bytes"] == 2**20


@pytest.mark.usefixtures("quick")
def test_a_disk_without_room_fails(tmp_path, base_model, prepared, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    facts = disk.collect(config_at(tmp_path, base_model, prepared))
    finding = disk.judge([Report(0, "n0", 0, facts)])[0]
    assert (finding.check, finding.status) == ("disk", "fail")
    assert str(tmp_path) in finding.found
    assert "checkpoint.keep_last" in finding.remedy


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_no_run_fails_and_files_of_the_doctor_do_not(tmp_path, base_model, prepared):
    (tmp_path / "launch-x7").mkdir()
    (tmp_path / f"{DOCTOR}other-host").write_text("")
    assert run_folder(config_at(tmp_path, base_model, prepared)) == tmp_path, "training does not mind them either"
    assert disk.collect(config_at(tmp_path, base_model, prepared))["problems"] == []
    (tmp_path / "thesis.tex").write_text("")
    (problem,) = disk.collect(config_at(tmp_path, base_model, prepared))["problems"]
    assert "is no run folder" in problem


@pytest.mark.usefixtures("quick")
def test_missing_shards_leave_the_need_unknown(tmp_path, base_model, prepared):
    config = config_at(tmp_path, base_model, prepared, data={"train": str(tmp_path / "none")})
    finding = disk.judge([Report(0, "n0", 0, disk.collect(config))])[0]
    assert (finding.check, finding.status) == ("disk", "skip")


def test_problems_name_the_host():
    findings = by_check(cluster(problems=["--out /data/run: no room for it; delete something"]))
    finding = findings["disk"]
    assert (finding.status, finding.where) == ("fail", "host n1")
    assert (finding.found, finding.remedy) == ("--out /data/run: no room for it", "delete something")


def test_a_folder_that_one_host_cannot_write_to_fails(tmp_path):
    finding = by_check(cluster(write={"error": "Read-only file system"}))["disk"]
    assert (finding.status, finding.where) == ("fail", "host n1")
    assert "/data: Read-only file system" in finding.found
    assert "writable" in finding.remedy
    assert "--out" in finding.remedy


def test_write_errors_become_facts(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert disk.write_speed(tmp_path) == {"error": "No space left on device"}
    assert list(tmp_path.iterdir()) == []
    assert "error" in disk.write_speed(tmp_path / "missing")


def test_few_inodes_warn_and_none_counted_do_not():
    finding = by_check(cluster(inodes=500))["disk"]
    assert (finding.status, finding.where) == ("warn", "host n1")
    assert "500 files" in finding.found
    assert by_check(cluster(inodes=None))["disk"].status == "pass"


@pytest.mark.parametrize("error", ["No space left on device", "/data/x: Disk quota exceeded"])
def test_a_full_disk_is_called_full(error):
    finding = by_check(cluster(write={"error": error}))["disk"]
    assert "free space at /data" in finding.remedy
    assert "writable" not in finding.remedy
    (finding,) = disk.judge_seen(["n0"], [["n0", "/data", []]], [["n0", "name", "/data", error]])
    assert "free space at /data" in finding.remedy


def test_one_rank_that_cannot_write_is_enough():
    reports = cluster()
    reports[3].facts["write"] = {"error": "Disk quota exceeded"}
    assert by_check(reports)["disk"].status == "fail"


def test_small_needs_are_told_in_mib():
    room = {**FACTS["room"], "need_gib": 0.004}
    reports = [Report(rank, "n0", rank, {**FACTS, "room": room, "checkpoint_bytes": 3 * 2**20}) for rank in range(2)]
    findings = by_check(reports)
    assert "4.1 MiB needed, 100.0 GiB free" in findings["disk"].found
    assert "a checkpoint of 3.0 MiB" in findings["write speed"].found


def test_the_slowest_host_decides_how_long_a_checkpoint_takes():
    """60 GiB, half of it from two ranks on n1: at 0.25 GiB/s each 60 s, at 0.02 GiB/s too long."""
    slow = by_check(cluster(write={"bytes": 1, "seconds": 1, "bytes_per_s": GIB / 4}))["write speed"]
    assert (slow.status, slow.figures["checkpoint_s"]) == ("pass", 60.0)
    assert "512 MiB/s from host n1 by 2 ranks at a time" in slow.found
    slower = by_check(cluster(write={"bytes": 1, "seconds": 1, "bytes_per_s": GIB / 50}))["write speed"]
    assert (slower.status, slower.where) == ("warn", "host n1")
    assert "checkpoint.every" in slower.remedy


def meet_hosts(configs, hosts=("n0", "n1")):
    """`disk.see` on one rank per host, in threads over one store."""
    store = dist.HashStore()
    places = tuple(Place(host, "127.0.0.1") for host in hosts)
    findings = [None] * len(hosts)

    def work(rank):
        group = Group(Meeting(rank, len(hosts), store, places), 0, limit_s=30)
        findings[rank] = disk.see(group, configs[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert findings[0] == findings[1]
    return findings[0]


def test_one_folder_for_both_hosts_passes(tmp_path, base_model, prepared):
    config = config_at(tmp_path / "run", base_model, prepared)
    (finding,) = meet_hosts([config, config])
    assert finding.status == "pass"
    assert str(tmp_path) in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_each_host_alone_fails(tmp_path, base_model, prepared, monkeypatch):
    monkeypatch.setattr(disk, "SEEN_AFTER_S", 0.5)
    configs = []
    for name in ("n0", "n1"):
        (tmp_path / name).mkdir()
        configs.append(config_at(tmp_path / name / "run", base_model, prepared))
    findings = meet_hosts(configs)
    assert [(finding.status, finding.where) for finding in findings] == [("fail", "host n0"), ("fail", "host n1")]
    assert "does not see" in findings[0].found
    assert findings[0].figures == {"unseen": ["n1"]}
    assert "all share" in findings[0].remedy
    assert not [file for name in ("n0", "n1") for file in (tmp_path / name).iterdir()]


def test_a_host_that_cannot_write_is_named_once():
    findings = disk.judge_seen(
        ["n0", "n1"],
        [["n0", "/data", []], ["n1", "/data", []]],
        [["n1", "name", "/data", "Permission denied"]],
    )
    assert [(finding.status, finding.where) for finding in findings] == [("fail", "host n1")]
    assert "Permission denied" in findings[0].found
    assert "writable" in findings[0].remedy


def test_one_host_has_nobody_to_share_with(tmp_path, base_model, prepared):
    meeting = Meeting(0, 1, dist.HashStore(), (Place("n0", "127.0.0.1"),))
    assert disk.see(Group(meeting, 0, limit_s=5), config_at(tmp_path, base_model, prepared)) == []


def test_patience_with_a_slow_file_system(tmp_path):
    threading.Timer(0.3, (tmp_path / "late").touch).start()
    assert disk.look_for(tmp_path, [("n1", "late")], patience_s=5) == []
    assert disk.look_for(tmp_path, [("n1", "late"), ("n2", "never")], patience_s=0.1) == ["n2"]
