"""What measured times say about a network: bandwidths, and which rank or host is far slower than the others.

Nothing is measured here: sft.doctor.network does that.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import TypeVar

from sft.doctor.finding import Finding, Status

GIB = 2**30
SLOW_FACTOR = 4
"""So many times slower than its peers is no bad luck with other jobs on the switch but a defect: a port that came up at
a tenth of its speed, half duplex, a broken lane."""
LEAST_BETWEEN_HOSTS_GIB_S = 0.1
"""1 Gb/s Ethernet carries 0.11: GPU hosts that reach less talk through their management network."""

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
    "point NCCL at the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); NCCL_DEBUG=INFO tells what it has chosen"
)

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


def far_slower(rates: Mapping[Key, float]) -> list[Key]:
    """Those below a quarter of the median of all; of two, the faster one counts as the median."""
    if not rates:
        return []
    least = median_high(rates.values()) / SLOW_FACTOR
    return [key for key, rate in rates.items() if rate < least]


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


def slow_links(links: Mapping[Link, float]) -> set[Link]:
    """Links far slower than the best ones of most ranks.

    A rank that is slow both ways spoils the links of its neighbours, but not all of them: so it is the best link of
    each rank that the median is taken of.
    """
    best = {rank: max(rate for link, rate in links.items() if rank in link) for link in links for rank in link}
    if not best:
        return set()
    least = median_high(best.values()) / SLOW_FACTOR
    return {link for link, rate in links.items() if rate < least}


def judge_links(links: Mapping[Link, float], wrong: Iterable[Link], hosts: Sequence[str]) -> list[Finding]:
    """Findings on the single links between hosts: a slow end is named where two partners agree, else the direction.

    Args:
        links: GiB/s of each.
        wrong: links whose receiver did not get what was sent.
        hosts: host of each rank.
    """
    check = "links between hosts"
    found = [
        Finding(check, "fail", _who([receiver], hosts), f"{_arrow(sender, receiver, hosts)}: received other bytes than "
                "were sent", WRONG_REMEDY)
        for sender, receiver in wrong
    ]  # fmt: skip
    slow = slow_links(links)
    fast = median_high([rate for link, rate in links.items() if link not in slow])
    blamed: dict[tuple[str, str], list[Link]] = {}
    for link in sorted(slow):
        blamed.setdefault(_blame(link, slow, links, hosts), []).append(link)
    for (action, _), guilty in blamed.items():
        pairs = {pair: None for link in guilty for pair in (link, link[::-1])}
        told = ", ".join(f"{_arrow(*link, hosts)} {show(links[link])}" for link in pairs)
        if action == "direction":
            senders, receivers = (sorted({link[end] for link in guilty}) for end in (0, 1))
            where, verb = f"{_who(senders, hosts)} to {_who(receivers, hosts)}", "this direction is slow"
        else:
            ends = sorted({link[0 if action == "sends" else 1] for link in guilty})
            where, verb = _who(ends, hosts), f"{action} slowly"
        figures = {"gib_s": {_arrow(*link, hosts): links[link] for link in pairs}, "others_gib_s": fast}
        found.append(Finding(check, "fail", where, f"{verb}: {told}; others {show(fast)}", SLOW_REMEDY, figures))
    if found:
        return found
    slowest = min(links, key=lambda link: links[link])
    text = f"{len(links)} links, {show(links[slowest])} ({_arrow(*slowest, hosts)}) to {show(max(links.values()))}"
    figures = {"gib_s": {_arrow(*link, hosts): rate for link, rate in links.items()}}
    return [Finding(check, "pass", "all ranks", text, figures=figures)]


def judge_bandwidth(measured: Bandwidth, hosts: Sequence[str], *, on_gpu: bool) -> list[Finding]:
    """Findings on the collectives of one kind of group; never a failure for slowness alone, but for a slow host.

    Args:
        hosts: host of each rank.
    """
    check, slowest = f"bandwidth {measured.what}", measured.slowest()
    figures = {
        "groups": measured.groups,
        "mib_per_rank": measured.mib,
        "bus_gib_s": measured.gib_s,
        "formula": "(W - 1) x bytes per rank / time, as in nccl-tests",
    }
    found = [
        Finding(
            check, "fail", _who(ranks, hosts), f"{name}: received other values than were sent", WRONG_REMEDY, figures
        )
        for name, ranks in measured.wrong.items()
        if ranks
    ]
    if measured.what == "within hosts":
        rates = {hosts[ranks[0]]: rate for ranks, rate in zip(measured.groups, slowest, strict=True)}
        for host in far_slower(rates):
            others = show(median_high([rate for name, rate in rates.items() if name != host]))
            text = f"{show(rates[host])} among its ranks, others {others}"
            remedy = "compare nvidia-smi topo -m and nvidia-smi nvlink --status with a good host's; or leave it out"
            found.append(Finding(check, "fail", f"host {host}", text, remedy, figures))
    if found:
        return found
    told = ", ".join(f"{name} {_range(rates)}" for name, rates in measured.gib_s.items())
    text = f"{told} per rank ({_sizes(measured)})"
    status: Status = "pass"
    remedy = ""
    if measured.what == "between hosts":
        per_host = sum(slowest)
        text += f"; {show(per_host)} per host"
        if on_gpu and per_host < LEAST_BETWEEN_HOSTS_GIB_S:
            status, remedy = "warn", INTERFACE_REMEDY
            text += f", less than 1 Gb/s Ethernet ({LEAST_BETWEEN_HOSTS_GIB_S} GiB/s)"
    return [Finding(check, status, "all ranks", text, remedy, figures)]


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


def _who(ranks: list[int], hosts: Sequence[str]) -> str:
    """All ranks of a host are the host."""
    names = []
    for host in dict.fromkeys(hosts[rank] for rank in ranks):
        own = [rank for rank in ranks if hosts[rank] == host]
        whole = len(own) == list(hosts).count(host)
        names += [f"host {host}"] if whole else [f"rank {rank} on {host}" for rank in own]
    return ", ".join(names)


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
