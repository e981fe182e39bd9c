"""Clocks of hosts are compared through the store. Run: pytest tests/unit/test_doctor_clock.py"""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from sft.doctor import clock
from sft.doctor.clock import Offset
from sft.doctor.group import Group
from sft.errors import RankLost
from sft.ports import free_port
from sft.rendezvous import Meeting, Place


def measure(hosts: list[str], ahead_s: dict[str, float], limit_s: float = 20.0, absent: tuple[int, ...] = ()):
    """What every rank finds, with a rank per entry of `hosts` and clocks that are ahead of the true one."""
    places = tuple(Place(host, "127.0.0.1") for host in hosts)
    port = int(free_port())
    found: dict[int, object] = {}

    def connect(rank: int) -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(20), wait_for_workers=False)

    def run(rank: int, store: dist.Store) -> None:
        group = Group(Meeting(rank, len(hosts), store, places), 0, limit_s)
        try:
            found[rank] = clock.measure(group, lambda: time.time() + ahead_s.get(hosts[rank], 0.0))
        except RankLost as error:
            found[rank] = error

    ranks = [rank for rank in range(len(hosts)) if rank not in absent]
    stores = [connect(rank) for rank in ranks]  # held here: rank 0's must outlive its thread
    threads = [threading.Thread(target=run, args=pair) for pair in zip(ranks, stores, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_equal_clocks_pass_on_every_rank():
    found = measure(["n1", "n1", "n2", "n2"], {})
    assert found[0] == found[1] == found[2] == found[3]
    (finding,) = found[0]
    assert (finding.status, finding.where) == ("pass", "all ranks")
    assert abs(finding.figures["n2"]["ahead_s"]) <= finding.figures["n2"]["bound_s"] < 0.5


@pytest.mark.parametrize(
    ("ahead_s", "status", "words"),
    [(5.0, "warn", "5.0 s ahead of"), (-5.0, "warn", "5.0 s behind"), (-600.0, "fail", "600.0 s behind")],
)
def test_a_planted_skew_is_measured_with_its_sign_and_its_host(ahead_s, status, words):
    (finding,) = measure(["n1", "n2", "n3"], {"n3": ahead_s})[0]
    assert (finding.check, finding.status, finding.where) == ("clock", status, "host n3")
    assert words in finding.found
    assert finding.remedy
    assert finding.figures["ahead_s"] == pytest.approx(ahead_s, abs=0.3)


def test_of_three_hosts_the_one_that_is_alone_is_wrong_even_if_it_is_the_first():
    (finding,) = measure(["n1", "n2", "n3"], {"n1": 90.0})[0]
    assert (finding.status, finding.where) == ("fail", "host n1")
    assert "ahead of" in finding.found


def test_a_difference_below_the_error_of_the_measurement_is_no_finding():
    """A slow link: the messages of two hosts take 8 s."""
    zero = Offset("n1", 0.0, 0.0)
    assert [finding.status for finding in clock.judge([zero, Offset("n2", 3.0, 4.0)])] == ["pass"]
    assert [finding.status for finding in clock.judge([zero, Offset("n2", 3.0, 0.1)])] == ["warn"]
    assert [finding.status for finding in clock.judge([zero, Offset("n2", 70.0, 65.0)])] == ["fail"]
    assert [finding.status for finding in clock.judge([zero, Offset("n2", 70.0, 75.0)])] == ["pass"]


def test_one_host_has_nothing_to_compare():
    assert [finding.status for finding in measure(["n1", "n1"], {"n1": 90.0})[0]] == ["skip"]


def test_a_host_that_does_not_answer_is_named():
    found = measure(["n1", "n2", "n3"], {}, limit_s=1.0, absent=(2,))
    assert "rank 2 on n3" in str(found[0])
    assert isinstance(found[0], RankLost)
    assert isinstance(found[1], RankLost)
