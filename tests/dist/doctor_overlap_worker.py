"""Started on two real ranks: the doctor's measurements, healthy and with planted faults, one after the other.

    doctor_overlap_worker OUT --config options by flag

Rank 0 writes OUT: {case: "found": all findings, as the doctor gathers them, "error": what RankLost says, "seconds"}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.config import RunConfig
from sft.doctor import network, overlap
from sft.doctor.finding import Finding
from sft.doctor.group import Group
from sft.doctor.options import DoctorSection
from sft.engine import join
from sft.errors import RankLost
from sft.rendezvous import Meeting, Place, meet
from sft.settings import load

ONE_HOST, TWO_HOSTS = ("n1", "n1"), ("n1", "n2")


def main(argv: list[str]) -> None:
    """Every case in order; the last one leaves the group broken."""
    out, *flags = [text for text in argv if not text.startswith("--local_rank")]
    config = load(RunConfig, flags, prog="doctor_overlap_worker")
    meeting = meet(60)
    device = join(meeting)
    told: dict[str, Any] = {}
    quick = DoctorSection(network_mib=4, limit_s=60)
    network.MOST = network.FEWEST

    def record(case: str, hosts: tuple[str, str], check: Callable[..., Any], *options: Any) -> None:
        started_s = time.monotonic()
        found: list[Finding] = []
        error = ""
        try:
            found += check(group_of(meeting, case, hosts), *options)
        except RankLost as broken:
            error = str(broken)
        seconds = time.monotonic() - started_s
        told[case] = {"found": [asdict(finding) for finding in found], "error": error, "seconds": seconds}

    for rate, case, hosts in ((1e6, "one host", ONE_HOST), (1e18, "two hosts", TWO_HOSTS)):
        with instead(network, "multiply", multiplying_at(rate)):
            record(case, hosts, network.measure, config, device, quick)
    with instead(dist, "all_gather_into_tensor", corrupting(meeting.rank)):
        record("corrupt", TWO_HOSTS, network.measure, None, device, quick)
    with instead(dist, "send", slow(meeting.rank)):
        record("slow", TWO_HOSTS, network.measure, None, device, quick)
    for stage, on in ((3, True), (2, False)):
        chosen = with_file(config, out, stage, on)
        record(f"zero{stage}", ONE_HOST, overlap.measure, chosen, device, quick)
    with instead(overlap, "build_engine", wrong_with_overlap(meeting.rank)):
        record("wrong gradients", ONE_HOST, overlap.measure, with_file(config, out, 2, True), device, quick)
    hanging = quick.model_copy(update={"limit_s": 3.0})
    with instead(network, "_latency", late(meeting.rank)):
        record("hang", TWO_HOSTS, network.measure, None, device, hanging)
    if meeting.rank == 0:
        Path(out).write_text(json.dumps(told))


def group_of(meeting: Meeting, case: str, hosts: tuple[str, str]) -> Group:
    """The ranks, as if on these hosts; names of exchanges begin anew."""
    places = tuple(Place(host, "127.0.0.1") for host in hosts)
    own = replace(meeting, store=dist.PrefixStore(case, meeting.store), places=places)
    return Group(own, int(os.environ["LOCAL_RANK"]), 60.0)


def with_file(config: RunConfig, out: str, stage: int, on: bool) -> RunConfig:
    path = Path(out).with_name(f"zero{stage}-{on}-{os.environ['RANK']}.json")
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": on}}))
    return config.model_copy(update={"deepspeed": str(path)})


@contextmanager
def instead(module: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    healthy = getattr(module, name)
    setattr(module, name, make(healthy))
    yield
    setattr(module, name, healthy)


def multiplying_at(flop_s: float) -> Callable[[Any], Any]:
    """A device of this speed, so that what the run's communication means for it is known beforehand."""
    return lambda _multiply: lambda _device: {"median": flop_s, "dtype": "float32"}


def corrupting(rank: int) -> Callable[[Any], Any]:
    """One bit of what rank 1 receives is flipped."""

    def make(all_gather: Any) -> Any:
        def broken(out: torch.Tensor, own: torch.Tensor, **group: Any) -> None:
            all_gather(out, own, **group)
            out[-7] ^= 4 * (rank == 1)

        return broken

    return make


def slow(rank: int) -> Callable[[Any], Any]:
    """Rank 0 sends 2 MiB/s; answers, which are small, at once."""

    def make(send: Any) -> Any:
        def limited(tensor: torch.Tensor, to: int, **group: Any) -> None:
            time.sleep(tensor.nbytes / 2**21 if rank == 0 else 0)
            send(tensor, to, **group)

        return limited

    return make


def late(rank: int) -> Callable[[Any], Any]:
    """Rank 1 comes to the last part after the limit."""

    def make(latency: Any) -> Any:
        def delayed(net: Any) -> Any:
            time.sleep(6 if rank == 1 else 0)
            return latency(net)

        return delayed

    return make


def wrong_with_overlap(rank: int) -> Callable[[Any], Any]:
    """With overlap_comm, rank 1's gradients come out 2 % too large."""

    def make(build_engine: Any) -> Any:
        def build(config: RunConfig, strategy: dict[str, Any], numerics: Any) -> Any:
            engine = build_engine(config, strategy, numerics)
            backward = engine.backward
            factor = 1.02 if rank == 1 and strategy["zero_optimization"]["overlap_comm"] else 1.0
            engine.backward = lambda loss, **options: backward(loss * factor, **options)
            return engine

        return build

    return make


if __name__ == "__main__":
    main(sys.argv[1:])
