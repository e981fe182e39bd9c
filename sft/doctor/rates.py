"""What measured times say about a network: bandwidths, and which rank or host is far slower than the others.

Nothing is measured here: sft.doctor.network does that.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any, TypeVar

from sft.doctor import fabric
from sft.doctor.differences import place
from sft.doctor.finding import Finding, Report, Status

GIB = 2**30
BROKEN_SHARE = 0.25
"""So little of its peers' rate is no bad luck with other jobs on the switch but a defect: a port that came up at a
tenth of its speed, half duplex, a broken lane."""
DOUBTFUL_SHARE = 0.6
"""So little on GPUs deserves a look: every other lane or card is missing. Ranks on CPUs fight for cores: no sign there.
"""
LEAST_BETWEEN_HOSTS_GIB_S = 0.1
"""1 Gb/s Ethernet carries 0.11: GPU hosts that reach less talk through their management network."""
LEAST_OF_PORTS = 0.2
"""Share of what a host's InfiniBand ports carry. TCP over the same or another network stays below."""
LEAST_OVER_NVLINK_GIB_S = 50.0
"""Between the GPUs of a host. PCIe 5 carries 30 to 45, the slowest NVLink of these GPUs several times as much."""

SLOW_REMEDY = (
    "check its cable, NIC, switch port, negotiated speed and duplex (ethtool, ibstat), traffic limits (tc qdisc) and "
    "other jobs' traffic; or leave the host out: every layer of every step waits for the slowest link"
)
WRONG_REMEDY = (
    "do not train here: weights and gradients would be corrupted silently. Look for Xid and PCIe errors (dmesg), "
    "update driver, NIC firmware and NCCL, and find the transport with NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1 and "
    "NCCL_IB_DISABLE=1"
)
INTERFACE_REMEDY = (
    "point NCCL at the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); NCCL_DEBUG=INFO tells what it has chosen: "
    "NET/IB, or NET/Socket, which is TCP"
)
NVLINK_REMEDY = (
    "look at nvidia-smi nvlink --status and nvidia-smi topo -m, at nvidia-fabricmanager (systemctl status), and at "
    "NCCL_DEBUG=INFO: P2P, or SHM, which goes through the host's memory"
)
LINKS = "links between hosts"

Key = TypeVar("Key", bound=Hashable)
Link = tuple[int, int]
"""Sending rank, receiving rank."""


@dataclass(frozen=True)
class Bandwidth:
    """Collectives measured in groups of one kind, in all of them at the same time."""

    what: str
    """"within hosts", "between hosts", "of all ranks"."""
    groups: list[list[int]]
    """Ranks of each group."""
    mib: dict[str, float]
    """What each rank gave to the all-gather, and got from the reduce-scatter, by collective."""
    gib_s: dict[str, list[float]]
    """Bus bandwidth of each group, by collective ("all-gather", "reduce-scatter")."""
    wrong: dict[str, list[int]]
    """Ranks that received other values than were sent, by collective."""

    def slowest(self) -> list[float]:
        """The slower collective's bus bandwidth, by group, GiB/s."""
        return [min(rates) for rates in zip(*self.gib_s.values(), strict=True)]


def bus_bandwidth(bytes_per_rank: int, ranks: int, time_s: float) -> float:
    """What each rank's link carried in an all-gather or reduce-scatter, in GiB/s: (W - 1) / W x W x bytes / time.

    That of NCCL's tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): it does not depend on the number of ranks
    and can be compared with the hardware's.

    Args:
        bytes_per_rank: what a rank gives to an all-gather, or receives from a reduce-scatter.
    """
    return (ranks - 1) * bytes_per_rank / time_s / GIB


def least_share(ranks: Sequence[Report]) -> float:
    """At this share of its peers' rate and below, something is told as slow."""
    return DOUBTFUL_SHARE if ranks[0].facts["gpu"] is not None else BROKEN_SHARE


def slower(rates: Mapping[Key, float], share: float) -> list[Key]:
    """Those at or below a share of the median of all; of two, the faster one counts as the median."""
    if not rates:
        return []
    most = median_high(rates.values()) * share
    return [key for key, rate in rates.items() if rate <= most]


def rounds(num_hosts: int) -> list[list[Link]]:
    """Neighbours on a ring of hosts, both directions, in rounds in which every host sends to one, receives or rests.

    The number of rounds does not grow with the hosts: 2 for two hosts, 4 for an even number, 6 for an odd one.
    """
    ring = [(host, (host + 1) % num_hosts) for host in range(num_hosts)]
    if num_hosts == 2:
        ring = ring[:1]
    colour = [index % 2 for index in range(len(ring))]
    if len(ring) % 2 and len(ring) > 1:
        colour[-1] = 2
    there = [[link for link, own in zip(ring, colour, strict=True) if own == wanted] for wanted in sorted(set(colour))]
    back = [[(receiver, sender) for sender, receiver in links] for links in there]
    return there + back


def slow_links(links: Mapping[Link, float], share: float) -> set[Link]:
    """Links at or below a share of the best ones of most ranks.

    A rank that is slow both ways spoils the links of its neighbours, but not all of them: so it is the best link of
    each rank that the median is taken of.
    """
    best = {rank: max(rate for link, rate in links.items() if rank in link) for link in links for rank in link}
    if not best:
        return set()
    most = median_high(best.values()) * share
    return {link for link, rate in links.items() if rate <= most}


def judge_links(links: Mapping[Link, float], wrong: Iterable[Link], ranks: Sequence[Report]) -> list[Finding]:
    """Findings on the single links between hosts: a slow end is named where two partners agree, else the direction.

    Args:
        links: GiB/s of each.
        wrong: links whose receiver did not get what was sent.
        ranks: all, with the facts of sft.doctor.fabric.
    """
    hosts = [report.host for report in ranks]
    found = [
        Finding(LINKS, "fail", place([ranks[receiver]], ranks), f"{_arrow(sender, receiver, hosts)}: received other "
                "bytes than were sent", WRONG_REMEDY)
        for sender, receiver in wrong
    ]  # fmt: skip
    slow, broken = (slow_links(links, share) for share in (least_share(ranks), BROKEN_SHARE))
    fast = median_high([rate for link, rate in links.items() if link not in slow])
    blamed: dict[tuple[str, str], list[Link]] = {}
    for link in sorted(slow):
        blamed.setdefault(_blame(link, slow, links, hosts), []).append(link)
    for (action, _), guilty in blamed.items():
        pairs = {pair: None for link in guilty for pair in (link, link[::-1])}
        told = ", ".join(f"{_arrow(*link, hosts)} {show(links[link])}" for link in pairs)
        ends = [[ranks[rank] for rank in sorted({link[end] for link in guilty})] for end in (0, 1)]
        if action == "direction":
            where, verb = f"{place(ends[0], ranks)} to {place(ends[1], ranks)}", "this direction is slow"
        else:
            where, verb = place(ends[0 if action == "sends" else 1], ranks), f"{action} slowly"
        figures = {"gib_s": {_arrow(*link, hosts): links[link] for link in pairs}, "others_gib_s": fast}
        status: Status = "warn" if broken.isdisjoint(guilty) else "fail"
        found.append(Finding(LINKS, status, where, f"{verb}: {told}; others {show(fast)}", SLOW_REMEDY, figures))
    if found:
        return found
    slowest = min(links, key=lambda link: links[link])
    text = f"{len(links)} links, {show(links[slowest])} ({_arrow(*slowest, hosts)}) to {show(max(links.values()))}"
    figures = {"gib_s": {_arrow(*link, hosts): rate for link, rate in links.items()}}
    return [Finding(LINKS, "pass", "all ranks", text, figures=figures)]


def judge_bandwidth(measured: Bandwidth, ranks: Sequence[Report]) -> list[Finding]:
    """Findings on the collectives of one kind of group; a failure where values are wrong, or one group is far slower.

    Args:
        ranks: all, with the facts of sft.doctor.fabric.
    """
    check = f"bandwidth {measured.what}"
    figures = {
        "groups": measured.groups,
        "mib_per_rank": measured.mib,
        "bus_gib_s": measured.gib_s,
        "formula": "(W - 1) x bytes per rank / time, as in nccl-tests",
    }
    found = [
        Finding(check, "fail", place([ranks[rank] for rank in wrong], ranks), f"{name}: received other values than "
                "were sent", WRONG_REMEDY, figures)
        for name, wrong in measured.wrong.items()
        if wrong
    ]  # fmt: skip
    found += _judge_groups(check, measured, ranks, figures)
    if found:
        return found
    told = ", ".join(f"{name} {_range(rates)}" for name, rates in measured.gib_s.items())
    text = f"{told} per rank ({_sizes(measured)})"
    if measured.what == "between hosts":
        text += f"; {show(sum(measured.slowest()))} per host"
    problem, remedy = _too_slow(measured, ranks)
    if problem:
        return [Finding(check, "warn", "all ranks", f"{text}, {problem}", remedy, figures)]
    return [Finding(check, "pass", "all ranks", text, figures=figures)]


def _judge_groups(check: str, measured: Bandwidth, ranks: Sequence[Report], figures: dict[str, Any]) -> list[Finding]:
    """Those that are slower than the others of their kind: a host, or the i-th ranks of all hosts."""
    rates = dict(enumerate(measured.slowest()))
    broken = slower(rates, BROKEN_SHARE)
    found = []
    for index in slower(rates, least_share(ranks)):
        if measured.what == "within hosts":
            where, among = f"host {ranks[measured.groups[index][0]].host}", "among its ranks"
            remedy = "compare nvidia-smi topo -m and nvidia-smi nvlink --status with a good host's; or leave it out"
        else:
            where, among = f"local rank {index} of every host", "among them"
            remedy = "compare the network cards nearest to these GPUs with the others (nvidia-smi topo -m, ibstat)"
        others = show(median_high([rate for other, rate in rates.items() if other != index]))
        text = f"{show(rates[index])} {among}, others {others}"
        found.append(Finding(check, "fail" if index in broken else "warn", where, text, remedy, figures))
    return found


def _too_slow(measured: Bandwidth, ranks: Sequence[Report]) -> tuple[str, str]:
    """(what all GPU hosts alike fall short of, what to do); empty where they do not."""
    gpus = [report.facts["gpu"] for report in ranks]
    slowest = measured.slowest()
    if measured.what == "within hosts" and all(map(fabric.has_nvlink, gpus)) and min(slowest) < LEAST_OVER_NVLINK_GIB_S:
        return f"too little for the NVLink of {gpus[0]}", NVLINK_REMEDY
    if measured.what != "between hosts" or gpus[0] is None:
        return "", ""
    ports_gib_s = fabric.port_gib_s(ranks)
    if sum(slowest) < LEAST_OF_PORTS * ports_gib_s:
        return f"less than {LEAST_OF_PORTS:.0%} of the {show(ports_gib_s)} of its InfiniBand ports", INTERFACE_REMEDY
    if sum(slowest) < LEAST_BETWEEN_HOSTS_GIB_S:
        return f"less than 1 Gb/s Ethernet ({LEAST_BETWEEN_HOSTS_GIB_S} GiB/s)", INTERFACE_REMEDY
    return "", ""


def show(gib_s: float) -> str:
    """A rate for people."""
    if gib_s >= 10:
        return f"{gib_s:.0f} GiB/s"
    return f"{gib_s:.1f} GiB/s" if gib_s >= 1 else f"{gib_s * 1024:.3g} MiB/s"


def _blame(link: Link, slow: set[Link], links: Mapping[Link, float], hosts: Sequence[str]) -> tuple[str, str]:
    """(what is slow, whose): an end where it is slow with both of its partners and the other end is not."""
    sender, receiver = link
    sent = [other for other in links if other[0] == sender]
    received = [other for other in links if other[1] == receiver]
    sends = len(sent) > 1 and slow.issuperset(sent)
    receives = len(received) > 1 and slow.issuperset(received)
    if sends and not receives:
        return "sends", hosts[sender]
    if receives and not sends:
        return "receives", hosts[receiver]
    return "direction", f"{hosts[sender]} {hosts[receiver]}"


def _arrow(sender: int, receiver: int, hosts: Sequence[str]) -> str:
    alone = len(set(hosts)) == len(hosts)
    ends = (hosts[rank] if alone else f"rank {rank} on {hosts[rank]}" for rank in (sender, receiver))
    return " -> ".join(ends)


def _range(rates: list[float]) -> str:
    low, high = show(min(rates)), show(max(rates))
    return low if low == high else f"{low} to {high}"


def _sizes(measured: Bandwidth) -> str:
    sizes = sorted(set(measured.mib.values()))
    return f"{' and '.join(f'{size:g}' for size in sizes)} MiB from each of {len(measured.groups[0])} ranks"
