"""The doctor's collective measurements on two real ranks: healthy ones pass, planted faults are found and named."""

import json
from pathlib import Path

import pytest

from tests.dist import forked

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, base_model: Path, prepared: Path) -> dict[str, dict]:
    """What every case of the worker found."""
    out = tmp_path_factory.mktemp("doctor") / "found.json"
    flags = ["--model.path", base_model, "--data.train", prepared / "train", "--batch.rows_per_step", "8",
             "--model.precision", "fp32", "--out", out.with_name("run")]  # fmt: skip
    done = forked.run_ranks(2, "tests.dist.doctor_overlap_worker", str(out), *map(str, flags))
    assert out.is_file(), done.stdout + done.stderr
    assert "%|" not in done.stderr, "progress bars of libraries"
    return json.loads(out.read_text())


def by_check(told: dict[str, dict], case: str) -> dict[str, dict]:
    assert told[case]["error"] == "", told[case]
    return {finding["check"]: finding for finding in told[case]["found"]}


def test_a_healthy_host(told):
    found = by_check(told, "one host")
    assert set(found) == {"bandwidth within hosts", "bandwidth of all ranks", "latency", "communication of the run"}
    assert [finding["status"] for name, finding in found.items() if name != "communication of the run"] == ["pass"] * 3
    rates = found["bandwidth of all ranks"]["figures"]["bus_gib_s"]
    assert all(0.001 < rate < 1000 for group in rates.values() for rate in group), rates
    run = found["communication of the run"]
    assert run["status"] == "pass", "at 1 MFLOP/s, computation takes minutes and 0.5 MB do not"
    assert run["figures"]["tokens"] == 512
    assert run["figures"]["reduced_gib"] == pytest.approx(run["figures"]["gathered_gib"] / 2)  # fp32 both, W = 2


def test_two_healthy_hosts(told):
    found = by_check(told, "two hosts")
    measured = ["bandwidth between hosts", "links between hosts", "bandwidth of all ranks", "latency"]
    assert list(found) == [*measured, "communication of the run"]
    assert {found[check]["status"] for check in measured} == {"pass"}, found
    assert found["communication of the run"]["status"] == "warn", "at 1e18 FLOP/s"
    assert set(found["links between hosts"]["figures"]["gib_s"]) == {"n1 -> n2", "n2 -> n1"}


def test_a_flipped_bit_is_found_where_it_arrived(told):
    found = by_check(told, "corrupt")
    for check in ("bandwidth between hosts", "bandwidth of all ranks"):
        assert (found[check]["status"], found[check]["where"]) == ("fail", "host n2"), found[check]
        assert "all-gather: received other values than were sent" in found[check]["found"]
    assert found["links between hosts"]["status"] == "pass"


def test_a_slow_direction_is_named(told):
    found = by_check(told, "slow")["links between hosts"]
    assert (found["status"], found["where"]) == ("fail", "host n1 to host n2"), found
    assert found["figures"]["gib_s"]["n1 -> n2"] == pytest.approx(2 / 1024, rel=0.5)
    assert found["figures"]["gib_s"]["n2 -> n1"] > 8 / 1024


def test_a_rank_that_hangs_is_told_of_in_time_and_nothing_before_it_is_lost(told):
    assert "rank 0 on n1: lost a connection while measuring the network with n2" in told["hang"]["error"]
    assert told["hang"]["seconds"] < told["two hosts"]["seconds"] + 20
    assert [(finding["check"], finding["status"]) for finding in told["hang"]["found"]] == [
        ("bandwidth between hosts", "pass"), ("links between hosts", "pass"), ("bandwidth of all ranks", "pass"),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", [2, 3])
def test_overlap_gives_the_same_gradients(told, stage):
    (found,) = told[f"zero{stage}"]["found"]
    assert found["status"] == "pass", found
    assert "on CPU nothing overlaps" in found["found"]
    losses = found["figures"]["losses"]
    assert len(losses["on"]) == len(losses["off"]) == 3
    assert all(5 < loss < 7 for loss in losses["on"]), "not the loss of a random model with 256 tokens, ln 256 = 5.5"


def test_wrong_gradients_with_overlap_are_found(told):
    (found,) = told["wrong gradients"]["found"]
    assert found["status"] == "fail", found
    assert "other gradients than without it" in found["found"]
    assert "overlap_comm to false" in found["remedy"]
    assert found["figures"]["difference"]["norms"] > 100 * found["figures"]["limit"]["norms"]
