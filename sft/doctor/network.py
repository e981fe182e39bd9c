"""Bandwidth of the collectives that ZeRO is made of, whether what arrives is what was sent, and single links.

Groups: the ranks of each host; the i-th ranks of all hosts, all i at the same time, as their traffic shares the NICs;
all ranks, which is what ZeRO uses. Then point to point between neighbouring hosts on a ring, each direction by itself:
a collective runs at the speed of its slowest link and does not tell which that is.

Every wait is bounded by doctor.limit_s, and messages by time: a link of 1 Mb/s takes no longer than a fast one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from data_prep.shards import read_manifest
from sft.config import RunConfig
from sft.doctor import fabric
from sft.doctor.finding import Finding, Report
from sft.doctor.gpus import multiply
from sft.doctor.group import Group
from sft.doctor.options import DoctorSection
from sft.doctor.rates import (
    GIB,
    Bandwidth,
    Link,
    bus_bandwidth,
    judge_bandwidth,
    judge_links,
    least_share,
    rounds,
    slow_links,
)
from sft.doctor.traffic import CHECK, ITEMSIZE, Workload, judge_traffic
from sft.engine import Numerics, engine_settings, read_strategy
from sft.errors import RankLost, UserError
from sft.pretrained import choose_dtype
from sft.watchdog import is_failed_collective
from sft.weight_files import num_parameters

SMALLEST = 2**16
"""Bytes of the first message, from which the others grow."""
MOST_GATHERED = GIB
"""Bytes of a gathered whole at most: with very many ranks each gives less than doctor.network_mib, as in training."""
LONGEST_S = 0.25
"""Messages grow until one would take longer."""
FEWEST, MOST, REPEATS_S = 3, 20, 1.0
"""Repeats: so many as take about REPEATS_S."""
ATTEMPTS = 3
"""A link is called slow when it was that often in a row: once may have been another job."""
EFFICIENCY = 0.6
"""Training reaches about this share of a large matrix product's rate: attention, norms, optimizer and launches."""


@dataclass(frozen=True)
class _Net:
    """This rank's view of the groups that are measured; None where it has no part."""

    group: Group
    device: torch.device
    limit_s: float
    everyone: Any
    within: Any
    between: Any
    by_host: list[list[int]]
    """Ranks of each host."""
    rails: list[list[int]]
    """i-th ranks of all hosts that have so many, by i; only where there are two."""

    @property
    def host(self) -> int:
        """Index of this rank's host."""
        return next(index for index, ranks in enumerate(self.by_host) if self.group.rank in ranks)


Prepared = tuple[Callable[[], Any], Callable[[], bool]]
"""An operation, and whether it has brought the right values."""


def measure(group: Group, config: RunConfig | None, device: torch.device, options: DoctorSection) -> Iterator[Finding]:
    """Bandwidths, links and latency; with a run, what they mean for it. Collective; the process group exists.

    Each finding is given out as soon as it is known: what comes after it may break.

    Raises:
        RankLost: a collective did not end within options.limit_s, or its connection broke.
    """
    if group.world_size == 1:
        yield Finding("bandwidth", "skip", "all ranks", "there is one rank: nothing travels")
        return
    with bounded(group, "measuring the network"):
        ranks = _everyones(group, device)
        yield from fabric.judge_settings(ranks)
        net = _make_groups(group, device, options.limit_s)
        most = options.network_mib * 2**20
        several = [own for own in net.by_host if len(own) > 1]
        if several:
            yield from judge_bandwidth(_bandwidth(net, "within hosts", several, net.within, most), ranks)
        if net.rails:
            yield from judge_bandwidth(_bandwidth(net, "between hosts", net.rails, net.between, most), ranks)
            yield from _links(net, most, ranks)
        overall = _bandwidth(net, "of all ranks", [list(range(group.world_size))], net.everyone, most)
        yield from judge_bandwidth(overall, ranks)
        yield _latency(net)
        _release_groups(net)
    if config is not None and group.rank == 0:  # it is rank 0's findings that are shown
        yield _for_run(config, device, overall, group.world_size)


def _everyones(group: Group, device: torch.device) -> list[Report]:
    """What each rank has for its traffic, on every rank."""
    told = group.gather("network: fabric", [group.local_rank, fabric.collect(device)])
    places = group.meeting.places
    return [Report(rank, places[rank].host, local, facts) for rank, (local, facts) in enumerate(told)]


def _make_groups(group: Group, device: torch.device, limit_s: float) -> _Net:
    """Subgroups, in one order on all ranks, whose collectives end in time."""
    hosts = [place.host for place in group.meeting.places]
    by_host = [[rank for rank, host in enumerate(hosts) if host == name] for name in group.meeting.hosts]
    rails = [[ranks[index] for ranks in by_host if index < len(ranks)] for index in range(max(map(len, by_host)))]
    rails = [ranks for ranks in rails if len(ranks) > 1]
    # NCCL's own limit ends the process without a word: _finish is to see it first
    timeout = timedelta(seconds=limit_s + (60 if device.type == "cuda" else 0))
    everyone = dist.new_group(timeout=timeout)
    within = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in by_host if len(ranks) > 1]
    between = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in rails]
    mine, rail = (next((made for ranks, made in kind if group.rank in ranks), None) for kind in (within, between))
    return _Net(group, device, limit_s, everyone, mine, rail, by_host, rails)


def _release_groups(net: _Net) -> None:
    for made in (net.between, net.within, net.everyone):
        if made is not None:
            dist.destroy_process_group(made)


def _bandwidth(net: _Net, what: str, groups: list[list[int]], own: Any, most: int) -> Bandwidth:
    """Both collectives in all of `groups` at the same time; `own`: this rank's, or None."""
    members = next((ranks for ranks in groups if net.group.rank in ranks), None)
    most = min(most, MOST_GATHERED // max(map(len, groups))) // 4 * 4
    mib, gib_s, wrong = {}, {}, {}
    for name, collective in (("all-gather", _all_gather), ("reduce-scatter", _reduce_scatter)):
        prepare = partial(collective, net, own, members) if members else _nothing
        size, repeats = _grow(net, prepare, most)
        operation, is_right = prepare(size)
        times_s = [_timed(net, operation) for _ in range(repeats)]
        told = net.group.gather(f"network {what} {name}", [times_s, is_right()])
        mib[name] = size / 2**20
        gib_s[name] = [
            bus_bandwidth(size, len(ranks), median(map(max, zip(*(told[rank][0] for rank in ranks), strict=True))))
            for ranks in groups
        ]
        wrong[name] = [rank for rank, (_, right) in enumerate(told) if not right]
    return Bandwidth(what, groups, mib, gib_s, wrong)


def _nothing(_size: int) -> Prepared:
    """Of a rank that has no part in it."""
    return (lambda: None), (lambda: True)


def _all_gather(net: _Net, own: Any, members: list[int], size: int) -> Prepared:
    """`size` bytes from each."""
    count = size // 4
    given = _pattern(count, net.group.rank, net.device)
    whole = torch.full((len(members) * count,), -1, dtype=torch.int32, device=net.device)

    def is_right() -> bool:
        parts = zip(members, whole.chunk(len(members)), strict=True)
        return all(torch.equal(part, _pattern(count, member, net.device)) for member, part in parts)

    return (lambda: dist.all_gather_into_tensor(whole, given, group=own)), is_right


def _reduce_scatter(net: _Net, own: Any, members: list[int], size: int) -> Prepared:
    """`size` bytes to each; small whole numbers, whose sums are exact in fp32."""
    count, rank = size // 4, net.group.rank
    base = torch.arange(len(members) * count, dtype=torch.int32, device=net.device).remainder_(1021)
    given = (base + rank).float()
    part = torch.full((count,), -1.0, device=net.device)
    expected = (base.chunk(len(members))[members.index(rank)] * len(members) + sum(members)).float()
    return (lambda: dist.reduce_scatter_tensor(part, given, group=own)), (lambda: torch.equal(part, expected))


def _pattern(count: int, rank: int, device: torch.device) -> torch.Tensor:
    """int32 [count], other values on every rank and at every place."""
    return torch.arange(count, dtype=torch.int32, device=device) + rank * 100_003


def _links(net: _Net, most: int, ranks: list[Report]) -> list[Finding]:
    """Point to point on a ring of hosts; the best of several attempts where one looks slow."""
    links, wrong = _measure_links(net, most, 1)
    share = least_share(ranks)
    for attempt in range(2, ATTEMPTS + 1):
        if not slow_links(links, share):
            break
        again, wrong_again = _measure_links(net, most, attempt)
        links = {link: max(rate, again[link]) for link, rate in links.items()}
        wrong |= wrong_again
    return judge_links(links, sorted(wrong), ranks)


def _measure_links(net: _Net, most: int, attempt: int) -> tuple[dict[Link, float], set[Link]]:
    """GiB/s of each link, the best of a few times; links whose receiver got something else."""
    index = net.by_host[net.host].index(net.group.rank)
    own: list[tuple[int, int, float, bool]] = []
    for links in rounds(len(net.by_host)):
        partner = _partner(net, links, index)
        prepare = _nothing if partner is None else partial(_message, net, *partner)
        size, repeats = _grow(net, prepare, most)
        operation, is_right = prepare(size)
        time_s = min(_timed(net, operation) for _ in range(repeats))
        if partner is not None:
            own.append((*partner, size / time_s / GIB, is_right()))
    rates: dict[Link, float] = {}
    wrong: set[Link] = set()
    for rank, entries in enumerate(net.group.gather(f"network links {attempt}", own)):
        for other, sends, rate, right in entries:
            if sends:
                rates[rank, other] = rate
            elif not right:
                wrong.add((other, rank))
    return rates, wrong


def _partner(net: _Net, links: list[Link], index: int) -> tuple[int, bool] | None:
    """(the rank that this one exchanges a message with in this round, whether this one sends it)."""
    for sender, receiver in links:
        if net.host in (sender, receiver):
            other = net.by_host[receiver if net.host == sender else sender]
            return (other[index], net.host == sender) if index < len(other) else None
    return None


def _message(net: _Net, other: int, sends: bool, size: int) -> Prepared:
    """`size` bytes to or from rank `other`, and a word back: what the sender measures is the whole way."""
    answer = torch.zeros(1, device=net.device)
    if sends:
        given = _pattern(size // 4, net.group.rank, net.device)

        def send() -> None:
            dist.send(given, other, group=net.between)
            dist.recv(answer, other, group=net.between)

        return send, (lambda: True)
    got = torch.full((size // 4,), -1, dtype=torch.int32, device=net.device)

    def receive() -> None:
        dist.recv(got, other, group=net.between)
        dist.send(answer, other, group=net.between)

    return receive, (lambda: torch.equal(got, _pattern(size // 4, other, net.device)))


def _latency(net: _Net) -> Finding:
    """Of the smallest all-reduce."""
    one = torch.zeros(1, device=net.device)
    times_s = [_timed(net, lambda: dist.all_reduce(one, group=net.everyone)) for _ in range(MOST)]
    latency_us = median(times_s) * 1e6
    text = f"all-reduce of 4 bytes over {net.group.world_size} ranks: {latency_us:.0f} us"
    return Finding("latency", "pass", "all ranks", text, figures={"all_reduce_us": latency_us})


def _grow(net: _Net, prepare: Callable[[int], Prepared], most: int) -> tuple[int, int]:
    """The largest size up to `most` that takes about LONGEST_S at most on every rank, and how often to repeat it."""
    size = min(SMALLEST, most)
    while True:
        operation, _ = prepare(size)
        _timed(net, operation)  # the first message connects, and each size may take another way
        times_s = [_timed(net, operation) for _ in range(2)]
        slowest_s = torch.tensor(times_s, dtype=torch.float64, device=net.device)
        dist.all_reduce(slowest_s, op=dist.ReduceOp.MAX, group=net.everyone)
        _finish(net)
        time_s = slowest_s.min().item()  # of the slowest rank; one of two may have met with a stall
        larger = min(size * 4, most)
        if size == most or time_s * larger / size > LONGEST_S:
            return size, max(FEWEST, min(MOST, int(REPEATS_S / time_s)))
        size = larger


def _timed(net: _Net, operation: Callable[[], Any]) -> float:
    """Seconds on this rank; all ranks begin together."""
    dist.all_reduce(torch.zeros(1, device=net.device), group=net.everyone)
    _finish(net)
    started_s = time.perf_counter()
    operation()
    _finish(net)
    return time.perf_counter() - started_s


def _finish(net: _Net) -> None:
    """Wait for the GPU, not for ever: synchronize() would.

    Raises:
        RankLost: it is still waiting for another rank after the limit.
    """
    if net.device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record()
    deadline_s = time.monotonic() + net.limit_s
    while not done.query():
        if time.monotonic() > deadline_s:
            raise RankLost(_lost(net.group, "measuring the network", f"no end after {net.limit_s:.0f} s"))


@contextmanager
def bounded(group: Group, doing: str) -> Iterator[None]:
    """torch's errors of lost connections and exceeded limits become RankLost, which names ranks and hosts."""
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        raise RankLost(_lost(group, doing, " ".join(str(error).split())[:200])) from error


def _lost(group: Group, doing: str, reason: str) -> str:
    others = ", ".join(host for host in group.meeting.hosts if host != group.host) or "this host's other ranks"
    return (
        f"rank {group.rank} on {group.host}: lost a connection while {doing} with {others}: {reason}; see the other "
        "hosts' output, and check cables, firewall and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    )


def _for_run(config: RunConfig, device: torch.device, overall: Bandwidth, ranks: int) -> Finding:
    """What the measured bandwidth means for the run."""
    try:
        strategy = read_strategy(config.deepspeed)
        dtype = choose_dtype(config.model.precision, device)
        # of the numerics only device and dtype matter to the settings
        settings = engine_settings(config, strategy, Numerics(device, dtype, config.model.attention, False))
        micro_batch = 1 if config.batch.micro_batch == "auto" else config.batch.micro_batch
        work = Workload(
            num_parameters=num_parameters(Path(config.model.path)),
            ranks=ranks,
            strategy=strategy,
            weight_bytes=dtype.itemsize,
            gradient_bytes=ITEMSIZE.get(settings["communication_data_type"], 4),
            accumulation=max(1, config.batch.rows_per_step * config.batch.sequence_parallel // (ranks * micro_batch)),
            micro_batch=micro_batch,
            seq_len=read_manifest(Path(config.data.train))["seq_len"],
            recompute=config.model.activation_checkpointing == "full",
            sequence_parallel=config.batch.sequence_parallel,
        )
    except UserError as error:
        return Finding(CHECK, "skip", "all ranks", f"cannot be told: {error}")
    rate = multiply(device)
    if rate["dtype"] != str(dtype).removeprefix("torch."):
        return Finding(
            CHECK, "skip", "all ranks", f"cannot be told: how fast this device computes in {dtype} is unknown"
        )
    flop_s = EFFICIENCY * rate["median"]
    return judge_traffic(work, overall.gib_s["all-gather"][0], overall.gib_s["reduce-scatter"][0], flop_s)
