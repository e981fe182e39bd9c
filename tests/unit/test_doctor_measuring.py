"""How the doctor measures, without other ranks: message sizes, errors that are not the network's, the run's verdict."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import DistBackendError, HashStore

from sft.config import RunConfig
from sft.doctor import network
from sft.doctor.group import Group
from sft.doctor.rates import Bandwidth
from sft.errors import RankLost
from sft.rendezvous import Meeting, Place
from sft.settings import load

MOST = 2**26


def grow(monkeypatch: pytest.MonkeyPatch, stalls: set[int], bytes_per_s: float) -> tuple[int, int]:
    """(size, repeats) where messages need size / bytes_per_s; those with these numbers need 70 ms more."""
    clock_s, calls = 0.0, 0

    def prepare(size: int) -> network.Prepared:
        def send() -> None:
            nonlocal clock_s, calls
            clock_s += size / bytes_per_s + (0.07 if calls in stalls else 0.0)
            calls += 1

        return send, (lambda: True)

    monkeypatch.setattr(network, "time", SimpleNamespace(perf_counter=lambda: clock_s, monotonic=time.monotonic))
    monkeypatch.setattr(network.dist, "all_reduce", lambda *_, **__: None)
    net = SimpleNamespace(device=torch.device("cpu"), everyone=None)
    return network._grow(net, prepare, MOST)


@pytest.mark.parametrize("stalled", range(9))
def test_one_stall_does_not_end_the_growth(monkeypatch, stalled):
    assert grow(monkeypatch, {stalled}, 1e10) == (MOST, network.MOST)


def test_control_a_slow_network_ends_the_growth(monkeypatch):
    """1 Gb/s: 2**24 bytes take 0.13 s, 2**26 would take 0.54 s; where every message stalls, that is the network."""
    assert grow(monkeypatch, set(), 1.25e8) == (2**24, 7)
    assert grow(monkeypatch, set(range(99)), 1e10) == (2**16, 14)


def group_of_two() -> Group:
    places = (Place("n1", "127.0.0.1"), Place("n2", "127.0.0.1"))
    return Group(Meeting(rank=0, world_size=2, store=HashStore(), places=places), 0, 60.0)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: no kernel image is available"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_an_error_of_this_host_is_not_blamed_on_the_network(error):
    with pytest.raises(type(error)) as raised, network.bounded(group_of_two(), "measuring"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40000"),
        DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_control_an_error_of_a_collective_is(error):
    blamed = pytest.raises(RankLost, match="rank 0 on n1: lost a connection while measuring with n2: ")
    with blamed as raised, network.bounded(group_of_two(), "measuring"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(("flop_s", "status"), [(1e9, "pass"), (1e15, "warn")])
def test_what_a_bandwidth_means_for_a_run(base_model, prepared, monkeypatch, flop_s, status):
    """1 GiB/s; 512 tokens at 8 FLOPs per parameter and 0.6 of the product's rate."""
    monkeypatch.setattr(network, "multiply", lambda device: {"median": flop_s, "dtype": "float32"})
    found = for_run(base_model, prepared)
    parameters = found.figures["reduced_gib"] * 2**30 / 4 * 2
    assert parameters == pytest.approx(34_880, rel=0.2)
    compute_s = 512 * 8 * parameters / (0.6 * flop_s)
    assert found.figures["compute_s"] == pytest.approx(compute_s)
    assert found.figures["communication_s"] == pytest.approx(3 * parameters * 4 / 2 / 2**30)
    assert found.status == status
    assert math.isclose(found.figures["tflop_s"], 0.6 * flop_s / 1e12)


def test_the_rate_is_that_of_this_device(base_model, prepared, monkeypatch):
    assert 1e-3 < for_run(base_model, prepared).figures["tflop_s"] < 100
    found = for_run(base_model, prepared, "--model.precision", "bf16")
    assert (found.status, found.found) == (
        "skip", "cannot be told: how fast this device computes in torch.bfloat16 is unknown",
    )  # fmt: skip


def for_run(base_model, prepared, *more: str):
    flags = ["--model.path", base_model, "--data.train", prepared / "train", "--batch.rows_per_step", "8",
             "--model.precision", "fp32", "--out", "run", *more]  # fmt: skip
    config = load(RunConfig, list(map(str, flags)), prog="sft doctor")
    rates = {"all-gather": [1.0], "reduce-scatter": [1.0]}
    overall = Bandwidth("of all ranks", [[0, 1]], dict.fromkeys(rates, 64.0), rates, {})
    return network._for_run(config, torch.device("cpu"), overall, 2)
