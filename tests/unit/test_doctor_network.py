"""What the doctor makes of measured rates, by hand-computed numbers: volumes, slow ends, verdicts."""

import json

import pytest
import torch

from sft.doctor import fabric
from sft.doctor.finding import Report
from sft.doctor.overlap_verdict import Difference, Trained, judge, largest_relative
from sft.doctor.rates import (
    GIB,
    Bandwidth,
    bus_bandwidth,
    judge_bandwidth,
    judge_links,
    rounds,
    show,
    slow_links,
    slower,
)
from sft.doctor.traffic import Workload, judge_traffic, volume

ON_TWO_NODES = {
    "num_parameters": 13_015_864_320,  # Llama-2-13B
    "ranks": 16,
    "strategy": {"zero_optimization": {"stage": 3}},
    "weight_bytes": 2,
    "gradient_bytes": 4,
    "accumulation": 4,
    "micro_batch": 1,
    "seq_len": 4096,
    "recompute": True,
}
SXM = "NVIDIA H100 80GB HBM3"


def on(*hosts: str, **facts: object) -> list[Report]:
    """Ranks on these hosts, CPUs where nothing else is said."""
    told = {"gpu": None, "ports_gbit_s": [], "disabled": [], **facts}
    return [Report(rank, host, hosts[:rank].count(host), told) for rank, host in enumerate(hosts)]


THREE_HOSTS = on("n1", "n2", "n3")
FOUR_HOSTS = on("n1", "n2", "n3", "n4")


def strategy(stage: int, **zero: object) -> dict:
    return {"zero_optimization": {"stage": stage, **zero}}


def test_bus_bandwidth_is_that_of_nccl_tests():
    # 8 ranks give 64 MiB each: 512 MiB in 2 ms are 250 GiB/s, of which 7/8 crossed a rank's link
    assert bus_bandwidth(64 * 2**20, 8, 0.002) == pytest.approx(250 * 7 / 8)


def test_zero3_volume():
    gathered, reduced = volume(Workload(**ON_TWO_NODES))
    # twice 26.03e9 bytes of bf16 weights and once 52.06e9 of fp32 gradients, of which 15/16 travel
    assert gathered == pytest.approx(48.809e9, rel=1e-4)
    assert reduced == pytest.approx(48.809e9, rel=1e-4)


@pytest.mark.parametrize(
    ("chosen", "gathered", "reduced"),
    [
        # P c = 26.0317e9, P g = 52.0635e9, 4 micro-steps per step
        (strategy(2), 52.0635e9 + 26.0317e9 / 4, 52.0635e9),
        (strategy(2, use_multi_rank_bucket_allreduce=False), 26.0317e9 / 4, 52.0635e9),
        (strategy(1), (52.0635e9 + 26.0317e9) / 4, 52.0635e9 / 4),
    ],
)
def test_volume_of_the_other_stages(chosen, gathered, reduced):
    found = volume(Workload(**ON_TWO_NODES | {"strategy": chosen}))
    assert found == pytest.approx((gathered * 15 / 16, reduced * 15 / 16), rel=1e-4)


@pytest.mark.parametrize(
    ("gbit_s", "status", "communication_s", "tokens"),
    [
        # 97.62e9 bytes; 8 x 13.016e9 FLOPs per token at 400e12 FLOP/s: 0.2603 ms per token, 1.066 s for 4096
        (25, "warn", 31.238, 120_000),
        (400, "warn", 1.9524, 7_500),
        (800, "pass", 0.9762, 3_750),
    ],
)
def test_llama_13b_on_two_nodes(gbit_s, status, communication_s, tokens):
    gib_s = gbit_s / 8 * 1e9 / GIB
    found = judge_traffic(Workload(**ON_TWO_NODES), gib_s, gib_s, 400e12)
    assert found.status == status
    assert found.figures["communication_s"] == pytest.approx(communication_s, rel=1e-3)
    assert found.figures["compute_s"] == pytest.approx(1.0663, rel=1e-3)
    assert found.figures["tokens_that_hide_it"] == pytest.approx(tokens, rel=1e-3)
    assert found.figures["slowdown_without_overlap"] == pytest.approx(1 + communication_s / 1.0663, rel=1e-3)
    if status == "warn":
        assert f"raise batch.micro_batch (1) to {-(-tokens // 4096):,}" in found.remedy
        assert "13B parameters sends 90.9 GiB" in found.found
    else:
        assert found.remedy == ""


def test_without_recomputation_less_is_hidden():
    work = Workload(**ON_TWO_NODES | {"recompute": False})
    assert judge_traffic(work, 50, 50, 400e12).figures["compute_s"] == pytest.approx(0.7997, rel=1e-3)


def test_ranks_that_share_a_pack_compute_a_part_of_it_each():
    work = Workload(**ON_TWO_NODES | {"sequence_parallel": 4})
    found = judge_traffic(work, 50, 50, 400e12)
    assert found.figures["tokens"] == 1024
    assert found.figures["compute_s"] == pytest.approx(1.0663 / 4, rel=1e-3)
    needed = found.figures["tokens_that_hide_it"]
    assert 1024 < needed < 8192
    assert f"raise batch.micro_batch (1) to {-(-needed * 4 // 4096)}," in found.remedy


def test_slower():
    assert slower({"n1": 10.0, "n2": 9.0, "n3": 2.3}, 0.25) == []  # a quarter of 9 is 2.25
    assert slower({"n1": 10.0, "n2": 9.0, "n3": 2.25}, 0.25) == ["n3"]
    assert slower({"n1": 10.0, "n2": 2.0}, 0.25) == ["n2"]
    assert slower({"n1": 10.0}, 0.6) == slower({}, 0.6) == []


@pytest.mark.parametrize(("num_hosts", "num_rounds"), [(2, 2), (3, 6), (4, 4), (5, 6), (16, 4), (17, 6)])
def test_rounds(num_hosts, num_rounds):
    found = rounds(num_hosts)
    assert len(found) == num_rounds
    links = [link for links in found for link in links]
    assert len(set(links)) == len(links) == (2 if num_hosts == 2 else 2 * num_hosts)
    assert {receiver for _, receiver in links} == {sender for sender, _ in links} == set(range(num_hosts))
    for one_round in found:
        busy = [host for link in one_round for host in link]
        assert len(busy) == len(set(busy)), "a host has two messages at a time"


def ring(num_hosts: int, **slow: float) -> dict:
    """Links of 10 GiB/s; `sends_1=0.5`: those on which host 1 sends."""
    links = {link: 10.0 for links in rounds(num_hosts) for link in links}
    for name, rate in slow.items():
        action, host = name.split("_")
        end = 0 if action == "sends" else 1
        links |= {link: rate for link in links if link[end] == int(host)}
    return links


def test_healthy_links():
    (found,) = judge_links(ring(4), [], FOUR_HOSTS)
    assert (found.status, found.where, found.remedy) == ("pass", "all ranks", "")


def test_a_host_that_sends_slowly():
    (found,) = judge_links(ring(3, sends_1=0.5), [], THREE_HOSTS)
    assert (found.status, found.where) == ("fail", "host n2")
    assert found.found.startswith("sends slowly: n2 -> n1 512 MiB/s, n1 -> n2 10 GiB/s, n2 -> n3 512 MiB/s")
    assert "n1 -> n3" not in found.found


def test_a_host_that_receives_slowly():
    (found,) = judge_links(ring(4, receives_3=1.0), [], FOUR_HOSTS)
    assert (found.status, found.where) == ("fail", "host n4")
    assert found.found.startswith("receives slowly: ")


def test_a_host_that_is_slow_both_ways():
    """Four links of six are slow: the median link is no measure."""
    found = judge_links(ring(3, sends_0=0.5, receives_0=0.5), [], THREE_HOSTS)
    assert [(one.status, one.where) for one in found] == [("fail", "host n1"), ("fail", "host n1")]
    assert {one.found.partition(":")[0] for one in found} == {"sends slowly", "receives slowly"}


def test_two_hosts_cannot_tell_which_end():
    (found,) = judge_links({(0, 1): 0.9 / 1024, (1, 0): 0.8}, [], on("hosta", "hostb"))
    assert (found.status, found.where) == ("fail", "host hosta to host hostb")
    assert "hosta -> hostb 0.9 MiB/s, hostb -> hosta 819 MiB/s" in found.found
    json.dumps(found.figures)


def test_a_single_slow_link_is_nobodys():
    links = ring(4) | {(1, 2): 1.0}
    assert slow_links(links, 0.25) == {(1, 2)}
    (found,) = judge_links(links, [], FOUR_HOSTS)
    assert found.where == "host n2 to host n3"


def test_one_network_card_of_a_host():
    """Two ranks per host, each with a card: rank 3's sends slowly."""
    hosts = on("n1", "n1", "n2", "n2", "n3", "n3")
    links = {(2 * a + i, 2 * b + i): 10.0 for links in rounds(3) for a, b in links for i in (0, 1)}
    links |= {link: 1.0 for link in links if link[0] == 3}
    (found,) = judge_links(links, [], hosts)
    assert (found.status, found.where) == ("fail", "rank 3 on n2")
    assert "rank 3 on n2 -> rank 5 on n3 1.0 GiB/s" in found.found


def test_one_network_card_of_two_hosts():
    links = {(0, 2): 10.0, (2, 0): 10.0, (1, 3): 0.5, (3, 1): 10.0}
    (found,) = judge_links(links, [], on("n1", "n1", "n2", "n2"))
    assert found.where == "rank 1 on n1 to rank 3 on n2"


def test_wrong_bytes_on_a_link():
    found = judge_links(ring(2), [(0, 1)], on("n1", "n2"))
    assert [(one.status, one.where) for one in found] == [("fail", "host n2")]
    assert "n1 -> n2: received other bytes than were sent" in found[0].found


def measured(what: str, groups: list, all_gather: list, **more: object) -> Bandwidth:
    rates = {"all-gather": all_gather, "reduce-scatter": [2 * rate for rate in all_gather]}
    return Bandwidth(what, groups, dict.fromkeys(rates, 64.0), rates, {"all-gather": [], **more})


def test_a_host_whose_own_ranks_are_slow():
    hosts = on("n1", "n1", "n2", "n2", "n3", "n3")
    bandwidth = measured("within hosts", [[0, 1], [2, 3], [4, 5]], [300.0, 20.0, 310.0])
    (found,) = judge_bandwidth(bandwidth, hosts)
    assert (found.status, found.where, found.found) == ("fail", "host n2", "20 GiB/s among its ranks, others 310 GiB/s")
    (found,) = judge_bandwidth(measured("within hosts", [[0, 1], [2, 3]], [300.0, 100.0]), hosts[:4])
    assert found.status == "pass", "ranks on CPUs fight for cores"


@pytest.mark.parametrize(("rate", "status"), [(0.65, "pass"), (0.6, "warn"), (0.26, "warn"), (0.25, "fail")])
def test_on_gpus_part_of_the_peers_rate_is_told(rate, status):
    """Of a host's ranks, of the ranks on one network card of every host, of a link: warn at 0.6, fail at a quarter."""
    four = on("n1", "n1", "n2", "n2", gpu=SXM)
    (found,) = judge_bandwidth(measured("within hosts", [[0, 1], [2, 3]], [300.0, 300.0 * rate]), four)
    assert (found.status, found.where) == (status, "all ranks" if status == "pass" else "host n2")
    (found,) = judge_bandwidth(measured("between hosts", [[0, 2], [1, 3]], [40.0, 40.0 * rate]), four)
    assert (found.status, found.where) == (status, "all ranks" if status == "pass" else "local rank 1 of every host")
    slow = [found for found in judge_links(ring(3, sends_1=10.0 * rate), [], on("n1", "n2", "n3", gpu=SXM))]
    assert [(found.status, found.where) for found in slow] == [(status, "all ranks" if status == "pass" else "host n2")]
    (found,) = judge_links(ring(3, sends_1=10.0 * rate), [], THREE_HOSTS)
    assert found.status == ("fail" if rate == 0.25 else "pass"), "control: on CPUs"


@pytest.mark.parametrize(
    ("gpu", "rate", "status"),
    [
        (SXM, 9.0, "warn"),
        (SXM, 49.0, "warn"),
        (SXM, 51.0, "pass"),
        ("NVIDIA H100 PCIe", 9.0, "pass"),
        ("NVIDIA H100 NVL", 9.0, "pass"),
        ("NVIDIA A100-SXM4-80GB", 9.0, "warn"),
        ("NVIDIA A100 80GB PCIe", 9.0, "pass"),
        ("NVIDIA L40S", 9.0, "pass"),
    ],
)
def test_hosts_that_all_lack_their_nvlink(gpu, rate, status):
    ranks = on("n1", "n1", "n2", "n2", gpu=gpu)
    (found,) = judge_bandwidth(measured("within hosts", [[0, 1], [2, 3]], [rate, rate]), ranks)
    assert (found.status, found.where) == (status, "all ranks")
    assert ("nvlink --status" in found.remedy) == (status == "warn")


@pytest.mark.parametrize(
    ("ports", "rate", "status"),
    [
        ([400.0, 400.0], 0.55, "warn"),  # TCP: 1.1 GiB/s where 93 are possible
        ([400.0, 400.0], 9.0, "warn"),
        ([400.0, 400.0], 9.5, "pass"),
        ([400.0] * 8, 9.5, "pass"),  # two ranks are not expected to use eight ports
        ([400.0], 4.6, "warn"),
        ([400.0], 4.7, "pass"),
        ([], 0.55, "pass"),
    ],
)
def test_hosts_that_do_not_use_their_infiniband(ports, rate, status):
    ranks = on("n1", "n1", "n2", "n2", gpu=SXM, ports_gbit_s=ports)
    (found,) = judge_bandwidth(measured("between hosts", [[0, 2], [1, 3]], [rate, rate]), ranks)
    assert found.status == status
    assert ("of its InfiniBand ports" in found.found) == ("NET/Socket" in found.remedy) == (status == "warn")


def test_ports_as_the_kernel_tells_them(tmp_path):
    for name, state, rate in (("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"), ("mlx5_1", "1: DOWN", "10 Gb/sec (4X)"),
                              ("mlx5_2", "4: ACTIVE", "2.5 Gb/sec (1X SDR)"), ("odd", "4: ACTIVE", None)):  # fmt: skip
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        if rate:
            (port / "rate").write_text(f"{rate}\n")
    assert fabric.port_rates(tmp_path) == [400.0, 2.5]
    assert fabric.port_rates(tmp_path / "none") == []


def test_settings_that_close_the_fast_way(monkeypatch):
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert fabric.collect(torch.device("cpu"))["disabled"] == ["NCCL_IB_DISABLE"]
    off = {"disabled": ["NCCL_IB_DISABLE"], "ports_gbit_s": [400.0]}
    (found,) = fabric.judge_settings(on("n1", "n2", gpu=SXM, **off))
    assert (found.status, found.where) == ("warn", "all ranks")
    assert found.remedy.startswith("unset NCCL_IB_DISABLE")
    for harmless in (on("n1", "n1", gpu=SXM, **off), on("n1", "n2", **off), on("n1", "n2", gpu=SXM),
                     on("n1", "n2", gpu=SXM, **off | {"ports_gbit_s": []})):  # fmt: skip
        assert fabric.judge_settings(harmless) == []
    (found,) = fabric.judge_settings(on("n1", "n1", gpu=SXM, disabled=["NCCL_P2P_DISABLE"]))
    assert "through its memory" in found.found
    assert fabric.judge_settings(on("n1", "n2", gpu=SXM, disabled=["NCCL_P2P_DISABLE"])) == []


@pytest.mark.parametrize(
    ("rate", "on_gpu", "status"), [(0.04, True, "warn"), (0.06, True, "pass"), (0.04, False, "pass")]
)
def test_gpu_hosts_on_a_management_network(rate, on_gpu, status):
    """Two ranks per host share the link: 0.04 GiB/s each are 0.08 per host, less than 1 Gb/s Ethernet."""
    bandwidth = measured("between hosts", [[0, 2], [1, 3]], [rate, rate])
    (found,) = judge_bandwidth(bandwidth, on("n1", "n1", "n2", "n2", gpu=SXM if on_gpu else None))
    assert found.status == status
    assert ("NCCL_SOCKET_IFNAME" in found.remedy) == (status == "warn")


def test_wrong_values_are_a_failure_however_fast():
    bandwidth = measured("of all ranks", [[0, 1, 2, 3]], [100.0], **{"reduce-scatter": [2, 3]})
    (found,) = judge_bandwidth(bandwidth, on("n1", "n1", "n2", "n2"))
    assert (found.status, found.where) == ("fail", "host n2")
    assert found.found == "reduce-scatter: received other values than were sent"


def test_rates_for_people():
    assert [show(rate) for rate in (42.4, 3.14, 0.9 / 1024)] == ["42 GiB/s", "3.1 GiB/s", "0.9 MiB/s"]


OFF = Trained([5.0, 4.0, 3.0], [2.0, 2.0, 2.0], step_s=0.2)
NOTHING = Difference(0.0, 0.0, 0.0)


def overlap(**changed: object):
    told = {"wanted": True, "off": OFF, "on": Trained(OFF.losses, OFF.norms, 0.16), "control": NOTHING,
            "difference": NOTHING, "dtype": torch.bfloat16, "file": "zero3", "has_streams": True}  # fmt: skip
    return judge(**told | changed)


def test_overlap_that_is_equal():
    assert overlap().status == "pass"
    assert overlap().found.endswith("25% faster with it (0.16 s, 0.2 s)")
    assert overlap(wanted=False).found.endswith("it may be turned on in zero3")
    slower = overlap(wanted=False, on=Trained(OFF.losses, OFF.norms, 0.25))
    assert slower.found.endswith("20% slower with it (0.25 s, 0.2 s)")


@pytest.mark.parametrize("wrong", [{"losses": 0.01}, {"norms": 0.01}, {"weights": 0.1}, {"norms": float("nan")}])
def test_overlap_that_differs(wrong):
    difference = Difference(**{"losses": 0.0, "norms": 0.0, "weights": 0.0} | wrong)
    found = overlap(difference=difference)
    assert (found.status, found.remedy) == ("fail", "set zero_optimization.overlap_comm to false in zero3")
    assert overlap(difference=difference, wanted=False).status == "warn"


def test_overlap_on_kernels_that_are_never_equal():
    """A difference that two runs without overlap_comm show as well is none of its faults; a larger one is."""
    control = Difference(1e-3, 4e-3, 0.05)
    assert overlap(control=control, difference=Difference(3e-3, 1e-2, 0.1)).status == "pass"
    assert overlap(control=control, difference=Difference(3e-3, 2e-2, 0.1)).status == "fail"
    assert overlap(control=Difference(1e-3, 0.2, 0.05), difference=Difference(1e-3, 0.2, 0.05)).status == "warn"


@pytest.mark.parametrize(
    ("losses", "norms"), [([5.0, 0.0, 3.0], [2.0, 2.0, 2.0]), ([5.0, 4.0, 3.0], [2.0, 2.0, float("inf")])]
)
def test_overlap_with_zero_losses_or_steps_not_taken(losses, norms):
    broken = Trained(losses, norms, 0.16)
    assert overlap(on=broken).status == "fail"
    assert "in step" in overlap(on=broken).found
    both = overlap(off=broken, on=broken)
    assert both.status == "fail"
    assert both.found.startswith("without it")


def test_largest_relative():
    assert largest_relative([2.0, 4.0], [2.0, 5.0]) == 0.25
    assert largest_relative([2.0, 4.0], [2.0, float("nan")]) == float("inf")
    assert largest_relative([0.0], [0.0]) == 0
