"""Versions, code and environment of the ranks. Run: pytest tests/unit/test_doctor_software.py"""

import copy
import json

import pytest

from sft.doctor import software
from sft.doctor.differences import by_value, halves, place, tell
from sft.doctor.finding import Report
from sft.doctor.software import code_digest, judge, outside_bounds, shared_environment

FACTS = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "driver": "570.1", "deepspeed": "0.19.8", "flash-attn": None},
    "code": {"commit": "a" * 40, "dirty": False, "digest": "0123456789abcdef"},
    "system": {"os": "Debian", "kernel": "6.1", "glibc": "glibc 2.36"},
    "environment": {"NCCL_DEBUG": "WARN"},
    "bounds": [],
}


def cluster(change=None, ranks=(3,)):
    """Two hosts of two ranks; `change(facts)` is applied to some of them."""
    reports = [Report(rank, f"n{rank // 2}", rank % 2, copy.deepcopy(FACTS)) for rank in range(4)]
    for rank in ranks if change else ():
        change(reports[rank].facts)
    return reports


def other_than_pass(reports):
    return [finding for finding in judge(reports) if finding.status != "pass"]


def test_equal_ranks_pass_every_check():
    findings = judge(cluster())
    assert {finding.check for finding in findings} == {"versions", "code", "system", "requirements", "environment"}
    assert {finding.status for finding in findings} == {"pass"}
    assert "torch 2.13.0" in findings[0].found
    assert "flash-attn" not in findings[0].found


@pytest.mark.parametrize("name", ["torch", "driver", "deepspeed"])
def test_another_version_fails_and_names_who_has_which(name):
    (finding,) = other_than_pass(cluster(lambda facts: facts["versions"].update({name: "9.9"}), ranks=(2, 3)))
    assert (finding.check, finding.status, finding.where) == ("versions", "fail", "host n1")
    assert f"{name} differs: {FACTS['versions'][name]} on host n0, 9.9 on host n1" == finding.found
    assert "install the same" in finding.remedy
    assert finding.figures["versions"][1] == {"value": "9.9", "ranks": [2, 3], "hosts": ["n1"]}


def test_a_package_that_one_rank_lacks_fails():
    (finding,) = other_than_pass(cluster(lambda facts: facts["versions"].update({"flash-attn": "2.8.3"}), ranks=(0,)))
    assert finding.found == "flash-attn differs: none on rank 1 on n0, host n1, 2.8.3 on rank 0 on n0"


def test_libraries_may_not_differ_even_in_their_last_number():
    (finding,) = other_than_pass(cluster(lambda facts: facts["versions"].update(torch="2.13.1")))
    assert (finding.status, finding.where) == ("fail", "rank 3 on n1")


@pytest.mark.parametrize(("version", "status"), [("3.11.9", "warn"), ("3.12.7", "fail")])
def test_python_may_differ_in_its_last_number(version, status):
    (finding,) = other_than_pass(cluster(lambda facts: facts["versions"].update(python=version)))
    assert (finding.status, finding.where) == (status, "rank 3 on n1")


def test_two_copies_of_the_code_that_differ_fail():
    def change(facts):
        facts["code"] = {"commit": "b" * 40, "dirty": True, "digest": "fedcba9876543210"}

    (finding,) = other_than_pass(cluster(change, ranks=(2, 3)))
    assert (finding.check, finding.status, finding.where) == ("code", "fail", "host n1")
    assert "commit bbbbbbbbbbbb with local changes, digest fedcba9876543210 on host n1" in finding.found
    assert "same commit" in finding.remedy


def test_equal_code_of_a_checkout_and_an_installation_passes():
    assert other_than_pass(cluster(lambda facts: facts["code"].update(commit=None))) == []


def test_kernels_may_differ_and_c_libraries_should_not():
    assert other_than_pass(cluster(lambda facts: facts["system"].update(kernel="5.15"))) == []
    (finding,) = other_than_pass(cluster(lambda facts: facts["system"].update(glibc="glibc 2.31"), ranks=(2, 3)))
    assert (finding.check, finding.status, finding.where) == ("system", "warn", "host n1")
    assert "TORCH_EXTENSIONS_DIR" in finding.remedy


def test_versions_outside_the_bounds_warn():
    (finding,) = other_than_pass(cluster(lambda facts: facts.update(bounds=["torch 2.9 (needs >=2.10)"]), ranks=(2, 3)))
    assert (finding.check, finding.status, finding.where) == ("requirements", "warn", "host n1")
    assert "torch 2.9 (needs >=2.10)" in finding.found
    assert "constraints.txt" in finding.remedy


def test_unknown_bounds_are_not_called_good():
    (finding,) = other_than_pass(cluster(lambda facts: facts.update(bounds=None), ranks=(0, 1, 2, 3)))
    assert (finding.check, finding.status) == ("requirements", "skip")


def test_a_variable_that_one_host_lacks_warns():
    (finding,) = other_than_pass(cluster(lambda facts: facts["environment"].clear(), ranks=(2, 3)))
    assert (finding.check, finding.status, finding.where) == ("environment", "warn", "host n1")
    assert finding.found == "NCCL_DEBUG differs: 'WARN' on host n0, not set on host n1"
    assert "set NCCL_DEBUG alike" in finding.remedy


def test_which_variables_count():
    given = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth1",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_EXTENSIONS_DIR": "/local/n1",
        "OMP_NUM_THREADS": "8",
        "HOSTNAME": "n1",
        "WANDB_API_KEY": "swordfish",
        "TORCH_HUB_token": "swordfish",
        "NCCL_IB_PKEY": "0x8001",
        "GLOO_PASSWORD": "swordfish",
        "NCCL_PROXY": "http://user:swordfish@proxy",
    }
    kept = shared_environment(given)
    assert set(kept) == {
        "NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "NCCL_PROXY",
        "NCCL_IB_PKEY",
    }  # fmt: skip
    assert "swordfish" not in json.dumps(kept)


def test_bounds_of_requirements():
    lines = ["torch>=2.10", "transformers<6,>=5.17", "deepspeed==0.19.8", "wandb>=0.19",
             "flash-attn>=2.8; extra == 'gpu'", "liger-kernel>=0.6; extra == 'gpu'", "ruff>=9; extra == 'dev'",
             "tomli>=1; python_version < '3'"]  # fmt: skip
    versions = {"torch": "2.13.0+cu130", "transformers": "6.0", "deepspeed": "0.19.8", "flash-attn": "2.5", "ruff": "1"}
    assert outside_bounds(lines, versions.get) == [
        "transformers 6.0 (needs <6,>=5.17)",
        "wandb is not installed (needs >=0.19)",
        "flash-attn 2.5 (needs >=2.8)",
    ]
    good = {**versions, "transformers": "5.23.0", "wandb": "0.20", "flash-attn": "2.8.3"}
    assert outside_bounds(lines, good.get) == []
    assert outside_bounds(["torch>=2.10"], {"torch": "my-build"}.get) == ["torch my-build (needs >=2.10)"]


def test_the_digest_sees_every_byte_and_name(tmp_path):
    for name, text in (("a.py", "x = 1\n"), ("b.py", "x = 1\n"), ("c.py", "x = 2\n")):
        (tmp_path / name).write_text(text)
    one = code_digest({"sft/a.py": tmp_path / "a.py"})
    assert one == code_digest({"sft/a.py": tmp_path / "b.py"})
    assert one != code_digest({"sft/b.py": tmp_path / "a.py"})
    assert one != code_digest({"sft/a.py": tmp_path / "c.py"})


def test_facts_of_this_process_are_json_and_pass():
    facts = json.loads(json.dumps(software.collect(None)))
    assert facts["versions"]["deepspeed"] == "0.19.8"
    assert len(facts["code"]["digest"]) == 16
    findings = judge([Report(0, "n0", 0, facts), Report(1, "n1", 0, facts)])
    assert {finding.status for finding in findings if finding.check in ("versions", "code")} == {"pass"}


def test_a_checkout_that_was_changed_is_called_dirty(tmp_path, monkeypatch):
    import subprocess

    for folder in ("sft", "data_prep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
        (tmp_path / folder / "shards.py").write_text("")
    monkeypatch.setattr(software.sft, "__file__", str(tmp_path / "sft" / "__init__.py"))
    monkeypatch.setattr(software.shards, "__file__", str(tmp_path / "data_prep" / "shards.py"))
    assert software._own_code()["commit"] is None
    author = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    clean = software._own_code()
    assert len(clean["commit"]) == 40
    assert not clean["dirty"]
    (tmp_path / "data_prep" / "shards.py").write_text("x = 1\n")
    changed = software._own_code()
    assert changed["dirty"]
    assert changed["commit"] == clean["commit"]
    assert changed["digest"] != clean["digest"]


def test_words_about_who():
    reports = cluster()
    assert place(reports, reports) == "all ranks"
    assert place(reports[:3], reports) == "host n0, rank 2 on n1"
    groups = by_value(reports, lambda report: report.rank > 2)
    assert [(value, len(having)) for value, having in groups] == [(False, 3), (True, 1)]
    assert tell([("x", reports[:2]), (None, reports[2:])], reports) == "x on host n0, none on host n1"
    assert halves("a: b; do c; or d") == ("a: b", "do c; or d")
    assert halves("a: b") == ("a: b", "a: b")
