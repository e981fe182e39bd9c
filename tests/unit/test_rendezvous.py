"""Ranks meet within a bounded time, or say who is missing. Run: pytest tests/unit/test_rendezvous.py"""

import os
import signal
import socket
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sft import rendezvous
from sft.errors import Preempted, RankLost, UserError
from sft.ports import free_port
from sft.rendezvous import HOSTS, Place, meet, missing_ranks, name_interface

HOST = os.uname().nodename


@dataclass
class Rank:
    """A forked process that meets the others on the loopback; what came of it arrives through a pipe."""

    pid: int
    pipe: int

    def end(self) -> str:
        os.waitpid(self.pid, 0)
        with os.fdopen(self.pipe) as file:
            return file.read()


def start(rank: int, world_size: int, port: str, arrive_after_s: float = 20.0, stop_after_s: float = 1e9) -> Rank:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Rank(pid, reading)
    told = "nothing"
    try:
        began_s = time.monotonic()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        meeting = meet(arrive_after_s, lambda: time.monotonic() - began_s > stop_after_s)
        told = f"met {len(meeting.places)} on {','.join(meeting.hosts)} as {meeting.rank}"
        _leave_together(meeting)
    except (RankLost, Preempted, UserError) as error:
        told = f"{type(error).__name__}: {error}"
    except BaseException as error:
        told = f"crash: {error!r}"
    finally:
        os.write(writing, told.encode())
        os._exit(0)


def _leave_together(meeting: rendezvous.Meeting) -> None:
    """Rank 0 serves the store: it goes last."""
    meeting.store.add("test: done", 1)
    while meeting.rank == 0 and meeting.store.add("test: done", 0) < meeting.world_size:
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", HOSTS):
        monkeypatch.delenv(name, raising=False)


def test_ranks_meet_in_any_order():
    port = free_port()
    ranks = [start(rank, 3, port) for rank in (2, 1, 0)]
    assert [rank.end() for rank in ranks] == [f"met 3 on {HOST} as {rank}" for rank in (2, 1, 0)]


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setenv(HOSTS, "a:1,b:2")
    port = free_port()
    began_s = time.monotonic()
    ranks = [start(0, 3, port, arrive_after_s=4.0), start(1, 3, port, arrive_after_s=2.0)]
    for end in [rank.end() for rank in ranks]:
        assert end.startswith("RankLost: rank ")
        assert "rank 2 on b did not come within" in end
        assert "(2 of 3 are here)" in end
    assert time.monotonic() - began_s < 15


def test_the_first_one_to_give_up_tells_the_others_who_is_missing():
    """Rank 0 came first and gives up first; rank 1, which could still wait, must not blame rank 0."""
    port = free_port()
    ranks = [start(0, 3, port, arrive_after_s=1.5), start(1, 3, port, arrive_after_s=30.0)]
    ends = [rank.end() for rank in ranks]
    assert "rank 2 did not come" in ends[0]
    assert "rank 2 did not come" in ends[1]


def test_rank_0_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setenv(HOSTS, "a:1,b:1")
    port = free_port()
    end = start(1, 2, port, arrive_after_s=1.0).end()
    assert end.startswith(f"RankLost: rank 1 on {HOST}: no answer from rank 0 on a at 127.0.0.1:{port} in 1 s"), end


@pytest.mark.parametrize("asked", [0, 1])
def test_a_wish_to_stop_reaches_all(asked):
    port = free_port()
    ranks = [start(rank, 3, port, stop_after_s=1.5 if rank == asked else 1e9) for rank in (0, 1)]
    ends = [rank.end() for rank in ranks]
    reason = f"Preempted: rank {asked} on {HOST}: asked to stop before all ranks had come"
    assert [end[: len(reason)] for end in ends] == [reason] * 2


def test_a_wish_to_stop_while_rank_0_is_awaited():
    assert start(1, 2, free_port(), stop_after_s=0.5).end().startswith(f"Preempted: rank 1 on {HOST}: asked to stop")


def test_rank_0_that_dies_meanwhile_is_blamed():
    port = free_port()
    first, second = start(0, 3, port), start(1, 3, port)
    time.sleep(1.5)
    os.kill(first.pid, signal.SIGKILL)
    began_s = time.monotonic()
    assert second.end().startswith(f"RankLost: rank 1 on {HOST}: lost rank 0 while the ranks were meeting")
    assert time.monotonic() - began_s < 5, "long before it would give up by itself"
    first.end()


def test_a_replaced_rank_does_not_join_the_remains_of_its_run():
    """It would find everybody there, in places that are no longer true, and hang in what follows."""
    port = free_port()
    first, ones = start(0, 3, port), [start(1, 3, port), start(1, 3, port)]
    time.sleep(1.5)
    last = start(2, 3, port)
    refused, met = sorted(rank.end() for rank in ones)
    reason = f"RankLost: rank 1 on {HOST}: at 127.0.0.1:{port} is a run that already had a rank 1"
    assert refused[: len(reason)] == reason
    assert [first.end(), met, last.end()] == [f"met 3 on {HOST} as {rank}" for rank in (0, 1, 2)]


def test_a_port_in_use_is_the_users_to_change():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert start(0, 2, port).end().startswith(f"UserError: rank 0 on {HOST}: cannot listen on 127.0.0.1:{port}")


def test_missing_ranks_are_named_with_their_hosts():
    assert missing_ranks([2, 3], "n1:2,n2:2") == "rank 2 on n2, rank 3 on n2"
    assert missing_ranks([1], None) == "rank 1"
    assert missing_ranks([0, 4], "n1:2,n2:2") == "rank 0 on n1, rank 4", "more ranks than the launcher told of"


@pytest.mark.parametrize(
    ("addresses", "rank", "interface"),
    [
        (["127.0.1.1", "10.9.9.2"], 1, "eth7"),  # rank 0's host name is its loopback, as on Debian: its own way counts
        (["127.0.1.1", "127.0.0.1"], 1, None),
        (["10.9.9.1", "10.9.9.2"], 1, "eth7"),
    ],
)
def test_the_interface_that_leads_to_the_others(monkeypatch, addresses, rank, interface):
    known = {"lo": "127.0.0.1", "eth7": "10.9.9.2", "docker0": "172.17.0.1"}
    cards = {name: [SimpleNamespace(address=address)] for name, address in known.items()}
    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(rendezvous, "_own_address", lambda target: "10.9.9.2" if target[:2] == "10" else "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    places = tuple(Place(f"host{number}", address) for number, address in enumerate(addresses))
    name_interface(places, rank)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
