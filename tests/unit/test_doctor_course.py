"""The course where all ranks live and a collective fails. Run: pytest tests/unit/test_doctor_course.py"""

import contextlib
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sft.doctor import course
from sft.doctor.group import Group
from sft.doctor.options import DoctorSection
from sft.errors import RankLost
from sft.ports import free_port
from sft.rendezvous import Meeting, Place


class Silent(contextlib.AbstractContextManager):
    """A watchdog that finds nobody lost: what the collective raised goes on."""

    def __init__(self, *_, **__):
        pass

    def mark(self, *_):
        pass

    def __exit__(self, *_):
        return None


@pytest.fixture
def ended(monkeypatch):
    """The last finding of a course whose network check raises an error."""

    def end(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(course, "Watchdog", Silent)
        monkeypatch.setattr(course, "look_alone", lambda *_: None)
        monkeypatch.setattr("sft.engine.join", lambda meeting: torch.device("cpu"))
        monkeypatch.setattr(course.network, "measure", fail)
        places = (Place("n1", "127.0.0.1"), Place("n2", "127.0.0.1"))
        group, findings = Group(Meeting(0, 2, dist.HashStore(), places), 0, 5.0), []
        course.examine(group, None, DoctorSection(), findings, lambda check: None, pytest.fail)
        (finding,) = findings
        return finding

    return end


def lost(cause):
    error = RankLost("rank 0 on n1: lost a connection")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [dist.DistBackendError("NCCL error: unhandled system error"), RuntimeError("[/gloo/x] connectFullMesh")]
)
def test_where_all_ranks_fail_alike_the_interface_is_named(ended, monkeypatch, error):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    finding = ended(lost(error))
    assert (finding.check, finding.status, finding.where) == ("network", "fail", "rank 0 on n1")
    assert "NCCL_SOCKET_IFNAME eth7" in finding.found
    assert str(error) in finding.found
    for part in ("NCCL_DEBUG=INFO", "GLOO_SOCKET_IFNAME", "ports"):
        assert part in finding.remedy


def test_an_error_of_another_kind_is_not_the_networks(ended):
    finding = ended(RuntimeError("CUDA error: no kernel image is available"))
    assert "no kernel image" in finding.found
    assert "IFNAME" not in finding.found + finding.remedy


def at_one_store(world_size, limit_s, work):
    """What `work(group)` returns or raises on each rank, in threads with connections of their own."""
    port, found = int(free_port()), {}
    places = tuple(Place(f"n{rank}", "127.0.0.1") for rank in range(world_size))
    stores = [
        dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(20), wait_for_workers=False)
        for rank in range(world_size)
    ]

    def run(rank):
        try:
            found[rank] = work(Group(Meeting(rank, world_size, stores[rank], places), rank % 2, limit_s))
        except RankLost as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_all_learn_what_is_gathered_and_rank_0_alone_reads_reports():
    def work(group):
        return group.gather("a", group.rank * 11), group.reports("b", {"rank": group.rank})

    found = at_one_store(3, 20.0, work)
    assert [found[rank][0] for rank in range(3)] == [[0, 11, 22]] * 3
    assert [found[rank][1] for rank in (1, 2)] == [[], []]
    assert [(report.rank, report.host, report.local_rank, report.facts) for report in found[0][1]] == [
        (rank, f"n{rank}", rank % 2, {"rank": rank}) for rank in range(3)
    ]


def test_a_rank_that_is_late_is_named_with_the_option():
    found = at_one_store(3, 0.5, lambda group: None if group.rank == 2 else group.reports("inputs", {}))
    assert found[0].startswith("rank 2 on n2 did not finish 'inputs' within 0 s")
    assert "doctor.limit_s" in found[0]
