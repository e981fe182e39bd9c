"""Where ranks meet before a process group exists: who is here, from where, and who is missing, in a bounded time.

torch's own rendezvous waits as long as its group may wait for a collective, in C++ and without a word: a host that
never comes up would hold all others for hours. Here every rank says that it is here, and who is awaited has a name.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from sft.errors import Preempted, RankLost, UserError
from sft.launch_env import HOSTS
from sft.ports import free_port
from sft.vitals import name_all

LOOK_S = 0.1
CONNECT_S = 5.0
HEARD_S = 5.0
"""For the others to read why the meeting ended, before rank 0 ends, and the store with it."""
VERDICT = "verdict"
"""Key of what came of the meeting; the first rank to write it decides for all."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    address: str
    """Its own address on the way to rank 0; of the loopback, where rank 0's host name is one."""


@dataclass(frozen=True)
class Meeting:
    """Ranks that have found each other."""

    rank: int
    world_size: int
    store: dist.Store
    """Served by rank 0, or by torchrun; for strings of every kind until the group is gone."""
    places: tuple[Place, ...]
    """By rank."""

    def on_first_rank(self, name: str, work: Callable[[], None]) -> None:
        """Rank 0 does `work`, named once and for all; its UserError is everyone's. Collective.

        Raises:
            UserError: rank 0's.
            RankLost: rank 0 is gone.
        """
        reason = ""
        if self.rank == 0:
            try:
                work()
            except UserError as error:
                reason = str(error)
            self.store.set(f"work/{name}", reason)
        try:
            reason = self.store.get(f"work/{name}").decode()
        except dist.DistError as error:
            raise RankLost(f"{_me(self.rank)}: lost rank 0 at the start; start again to resume") from error
        if self.rank == 0 and reason:
            self._wait_for_readers(name)
        elif reason:
            self.store.add(f"read/{name}", 1)
        if reason:
            raise UserError(reason)

    def _wait_for_readers(self, name: str) -> None:
        """The store ends with rank 0."""
        until_s = time.monotonic() + HEARD_S
        while self.store.add(f"read/{name}", 0) < self.world_size - 1 and time.monotonic() < until_s:
            time.sleep(LOOK_S)

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts in the order of their ranks; where two have one name, their addresses tell them apart."""
        return [place.host for place in dict.fromkeys(self.places)]


def meet(arrive_after_s: float, asked_to_stop: Callable[[], bool] = lambda: False) -> Meeting:
    """Meet all ranks that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or none.

    Where the run has several hosts, the interface that leads to the others is written to GLOO_SOCKET_IFNAME, unless the
    user did: gloo would take the address of the host's own name, which on many systems is one of the loopback.

    Args:
        arrive_after_s: ranks may come so long after this one.
        asked_to_stop: looked at while waiting; true: leave.

    Raises:
        RankLost: ranks did not come, or left again; names them, and their hosts where sft.launch told them. Or the run
            that is met had this rank already.
        Preempted: this rank, or one that is here, was asked to stop.
        UserError: the port is taken, or torchrun would restart ranks.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            "torchrun --max-restarts: ranks cannot be restarted below a living launcher; use 0, run it again"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline_s = time.monotonic() + arrive_after_s
    try:
        store = _open_store(rank, deadline_s, arrive_after_s, asked_to_stop)
        _check_in(store, rank, world_size, deadline_s, arrive_after_s, asked_to_stop)
        texts = store.multi_get([f"place/{other}" for other in range(world_size)])
        places = tuple(Place(**json.loads(text)) for text in texts)
    except dist.DistError as error:
        raise RankLost(f"{_me(rank)}: lost rank 0 while the ranks were meeting; start again to resume") from error
    meeting = Meeting(rank, world_size, store, places)
    if len(meeting.hosts) > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        name_interface(places, rank)
    return meeting


def name_interface(places: tuple[Place, ...], rank: int) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface on the way to the other hosts, if there is one."""
    targets = [place.address for place in places if place != places[rank]]
    ways = [*(_own_address(target) for target in targets), places[rank].address]
    address = next((own for own in ways if not _is_loopback(own)), None)
    for interface, addresses in psutil.net_if_addrs().items():
        if address in [entry.address.partition("%")[0] for entry in addresses]:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def missing_ranks(missing: list[int], hosts: str | None) -> str:
    """Names of ranks that did not come: `rank 8 on n2, rank 9 on n2`.

    Args:
        hosts: the variable HOSTS.
    """
    names = [name for entry in (hosts or "").split(",") if entry for name in _repeated(entry)]
    return name_all([f"rank {rank}" + (f" on {names[rank]}" if rank < len(names) else "") for rank in missing])


def _repeated(entry: str) -> list[str]:
    name, _, ranks = entry.rpartition(":")
    return [name] * int(ranks)


def _open_store(rank: int, deadline_s: float, arrive_after_s: float, asked_to_stop: Callable[[], bool]) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not by_torchrun
    if not serves:
        _await_port(address, port, rank, deadline_s, arrive_after_s, asked_to_stop)
    timeout = timedelta(seconds=arrive_after_s + 60)
    try:
        store = dist.TCPStore(
            address, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        if serves:
            raise UserError(
                f"{_me(rank)}: cannot listen on {address}:{port}: another run on this host may use the port; "
                f"choose another MASTER_PORT ({' '.join(str(error).split())[:160]})"
            ) from None
        raise
    return dist.PrefixStore("sft", store)


def _await_port(
    address: str, port: int, rank: int, deadline_s: float, arrive_after_s: float, asked_to_stop: Callable[[], bool]
) -> None:
    """Try until rank 0 listens. In Python, where signals are noticed."""
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT_S).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if asked_to_stop():
            raise Preempted(f"{_me(rank)}: asked to stop while waiting for rank 0; run the same command again to go on")
        if time.monotonic() > deadline_s:
            who = missing_ranks([0], os.environ.get(HOSTS))
            raise RankLost(
                f"{_me(rank)}: no answer from {who} at {address}:{port} in {arrive_after_s:.0f} s ({reason}): is its "
                "host up, its process alive, the port open, and MASTER_ADDR an address that this host reaches?"
            )
        time.sleep(LOOK_S)


def _check_in(
    store: dist.Store,
    rank: int,
    world_size: int,
    deadline_s: float,
    arrive_after_s: float,
    asked_to_stop: Callable[[], bool],
) -> None:
    """Say that this rank is here, and wait until all are. What is polled is one key."""
    if store.add(f"came/{rank}", 1) > 1:  # a replaced process, at the store of a run that has not noticed its loss
        raise RankLost(
            f"{_me(rank)}: at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} is a run that already had a rank "
            f"{rank}: another run, which needs another MASTER_PORT, or this one's remains, which end soon; start again"
        )
    place = Place(os.uname().nodename, _own_address(os.environ["MASTER_ADDR"]))
    store.set(f"place/{rank}", json.dumps(asdict(place)))
    if store.add("arrived", 1) == world_size:
        store.compare_set(VERDICT, "", "met")
    while not store.check([VERDICT]):
        if asked_to_stop():
            reason = f"{_me(rank)}: asked to stop before all ranks had come; run the same command again to go on"
            store.compare_set(VERDICT, "", f"stop {reason}")
        elif time.monotonic() > deadline_s:
            missing = [other for other in range(world_size) if not store.check([f"place/{other}"])]
            reason = (
                f"{_me(rank)}: {missing_ranks(missing, os.environ.get(HOSTS))} did not come within "
                f"{arrive_after_s:.0f} s ({world_size - len(missing)} of {world_size} are here); see that host's output"
            )
            store.compare_set(VERDICT, "", f"lost {reason}")
        else:
            time.sleep(LOOK_S)
    kind, _, reason = store.get(VERDICT).decode().partition(" ")
    if kind == "met":
        return
    store.add("heard", 1)
    until_s = time.monotonic() + HEARD_S
    while rank == 0 and store.add("heard", 0) < store.add("arrived", 0) and time.monotonic() < until_s:
        time.sleep(LOOK_S)  # the store ends with this rank
    raise (Preempted if kind == "stop" else RankLost)(reason)


def _own_address(target: str) -> str:
    """This host's address on packets to `target`; nothing is sent."""
    try:
        kind, _, _, _, end = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(end)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _me(rank: int) -> str:
    return f"rank {rank} on {os.uname().nodename}"
