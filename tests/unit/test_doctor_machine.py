"""What the facts of hosts and GPUs mean. No GPU is needed. Run: pytest tests/unit/test_doctor_machine.py"""

import copy
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from sft.config import RunConfig
from sft.doctor import gpus, machine, ops
from sft.doctor.finding import Report
from sft.engine import read_strategy
from sft.retention import num_parameters

GIB = 2**30
HEALTHY = {"uncorrected": 0, "pending": 0, "failed": 0}
NO_OPS = {
    "needed": [], "installed": [], "built": [], "folder": "/cache/ext", "locks": [], "compiling": False,
    "tools": {"c++": "/usr/bin/c++", "ninja": "/usr/bin/ninja", "nvcc": None},
}  # fmt: skip


def facts(rank, **more):
    """One of four ranks on two hosts with two H100 each."""
    gpu = {"name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{rank}", "total": 80 * GIB, "used_by_others": 0}
    return {
        "device": "cuda", "torch_cuda": "13.0", "wants_cpu": False, "cuda_error": None, "gpus_listed": 2,
        "gpus_seen": 2, "local_size": 2,
        "gpu": {**gpu, "health": HEALTHY},
        "product": {"best": 750e12, "median": 700e12, "dtype": "bfloat16", "size": 8192, "meanwhile": []},
        "limits": {"nofile": 65536, "memlock": None, "nproc": None, "core": 0},
        "infiniband": ["mlx5_0"], "shm_free": 16 * GIB, "cores": 64, "threads": "8", "memory": 900 * GIB,
        "state_bytes": 0, "optimizer_on_host": False, "ops": NO_OPS, **more,
    }  # fmt: skip


def cluster(change=None, ranks=(2, 3), **base):
    reports = [Report(rank, f"n{rank // 2}", rank % 2, copy.deepcopy(facts(rank, **base))) for rank in range(4)]
    for rank in ranks if change else ():
        change(reports[rank].facts)
    return reports


def found(change=None, ranks=(2, 3), **base):
    """All that is no pass; where nothing is changed, nothing must be found."""
    return [finding for finding in machine.judge(cluster(change, ranks, **base)) if finding.status != "pass"]


def only(change=None, ranks=(2, 3), **base):
    (finding,) = found(change, ranks, **base)
    assert finding.remedy
    return finding


ON_CPU = {"device": "cpu", "torch_cuda": None, "gpus_listed": 0, "gpus_seen": 0, "gpu": None,
          "product": {"best": 6e10, "median": 5e10, "dtype": "float32", "size": 512, "meanwhile": None}}  # fmt: skip


def test_a_healthy_cluster_passes_with_every_check():
    checks = [finding.check for finding in machine.judge(cluster())]
    assert checks == ["GPUs", "GPU health", "compute", "limits", "/dev/shm", "host memory", "threads", "DeepSpeed ops"]
    assert found() == []
    assert found(**ON_CPU) == []


# GPUs: how many, which


def test_fewer_gpus_than_ranks_fail():
    finding = only(lambda facts: facts.update(gpus_seen=1))
    assert (finding.check, finding.status, finding.where) == ("GPUs", "fail", "host n1")
    assert finding.found == "1 GPUs for 2 ranks"
    assert "slots in the hostfile" in finding.remedy


def test_a_rank_without_a_gpu_does_not_hide_the_others():
    """The second rank of n1 has no device at all."""
    reports = cluster(lambda facts: facts.update(gpus_seen=1))
    reports[3].facts.update(gpu=None, product=None)
    told = {(finding.check, finding.status, finding.where) for finding in machine.judge(reports)}
    assert ("GPUs", "fail", "host n1") in told
    assert ("compute", "pass", "all ranks") in told


def test_idle_gpus_warn_but_not_without_a_launcher():
    finding = only(lambda facts: facts.update(gpus_seen=8))
    assert (finding.status, finding.found) == ("warn", "8 GPUs for 2 ranks: 6 would idle")
    assert found(lambda facts: facts.update(gpus_seen=8, local_size=None)) == []


def test_another_kind_of_gpu_fails():
    finding = only(lambda facts: facts["gpu"].update(name="NVIDIA H200"))
    assert (finding.check, finding.status, finding.where) == ("GPUs", "fail", "host n1")
    assert "NVIDIA H100 80GB HBM3 on host n0, NVIDIA H200 on host n1" in finding.found


def test_two_ranks_on_one_gpu_fail():
    finding = only(lambda facts: facts["gpu"].update(uuid="GPU-x"))
    assert (finding.status, finding.where) == ("fail", "rank 2 on n1, rank 3 on n1")
    assert "GPU-x" in finding.found
    assert "LOCAL_RANK" in finding.remedy


@pytest.mark.parametrize(
    ("cuda", "error", "part", "remedy"),
    [
        (None, None, "it is built without CUDA", "install torch for"),
        ("13.0", "Error 802: system not yet initialized", "Error 802: system not yet", "nvidia-fabricmanager"),
        ("13.0", None, "it says no reason (it is built for CUDA 13.0)", "dmesg"),
    ],
)
def test_gpus_that_torch_does_not_use_fail(cuda, error, part, remedy):
    finding = only(lambda facts: facts.update(gpus_listed=2, torch_cuda=cuda, cuda_error=error), **ON_CPU)
    assert (finding.status, finding.where) == ("fail", "host n1")
    assert part in finding.found
    assert remedy in finding.remedy
    assert ("fabricmanager" in finding.remedy) == (cuda is not None)
    assert found(lambda facts: facts.update(gpus_listed=2, wants_cpu=True), **ON_CPU) == []


# GPUs: health


@pytest.mark.parametrize(
    ("health", "status", "part"),
    [
        ({"uncorrected": 3}, "fail", "3 uncorrectable"),
        ({"failed": 1}, "fail", "no spare memory rows"),
        ({"pending": 1}, "warn", "waits for a reset"),
    ],
)
def test_memory_errors(health, status, part):
    finding = only(lambda facts: facts["gpu"]["health"].update(health), ranks=(3,))
    assert (finding.check, finding.status, finding.where) == ("GPU health", status, "rank 3 on n1")
    assert part in finding.found
    assert "GPU-3" in finding.found


def test_unreadable_errors_are_none():
    assert found(lambda facts: facts["gpu"]["health"].update(uncorrected=None)) == []
    reports = cluster(lambda facts: facts["gpu"]["health"].update(uncorrected=None))
    finding = next(finding for finding in machine.judge(reports) if finding.check == "GPU health")
    assert "not readable on host n1" in finding.found


def test_memory_that_others_hold_warns_above_five_percent():
    assert found(lambda facts: facts["gpu"].update(used_by_others=4 * GIB)) == []
    finding = only(lambda facts: facts["gpu"].update(used_by_others=5 * GIB), ranks=(1,))
    assert (finding.status, finding.where) == ("warn", "rank 1 on n0")
    assert "5.0 of 80 GiB" in finding.found
    assert "GPU-1" in finding.remedy


def test_a_gpu_without_any_memory_fails(monkeypatch):
    findings = found(lambda facts: facts.update(product=None), ranks=(3,))
    assert [(finding.check, finding.status, finding.where) for finding in findings] == [
        ("GPU health", "fail", "rank 3 on n1")
    ]
    assert "GPU-3 has no memory left" in findings[0].found

    def full(device, meanwhile):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpus, "multiply", full)
    assert machine._product(torch.device("cuda", 0), "GPU-3") is None


def test_clocks_held_down_warn():
    finding = only(lambda facts: facts["product"].update(meanwhile=["hw_thermal_slowdown"]), ranks=(1,))
    assert (finding.check, finding.status, finding.where) == ("GPU health", "warn", "rank 1 on n0")
    assert "hw_thermal_slowdown" in finding.found


# Compute


@pytest.mark.parametrize(
    ("share", "status"), [(0.65, None), (0.599, "warn"), (0.55, "warn"), (0.401, "warn"), (0.399, "fail")]
)
def test_against_the_data_sheet(share, status):
    findings = found(lambda facts: facts["product"].update(median=share * 989e12), ranks=(0, 1, 2, 3))
    assert {finding.status for finding in findings} == ({status} if status else set())
    assert all("989 TFLOP/s of a NVIDIA H100" in finding.found for finding in findings)


def test_a_slow_gpu_is_named_though_fast_enough_for_itself():
    finding = only(lambda facts: facts["product"].update(median=594e12), ranks=(3,))
    assert (finding.check, finding.status, finding.where) == ("compute", "warn", "rank 3 on n1")
    assert "85% of the median" in finding.found
    assert "slows down every step of all" in finding.found
    assert found(lambda facts: facts["product"].update(median=596e12), ranks=(3,)) == []


def test_an_unknown_gpu_is_compared_with_the_others_only():
    def unknown(facts):
        facts["gpu"].update(name="NVIDIA X1")
        facts["product"].update(median=1e12)

    assert found(unknown, ranks=(0, 1, 2, 3)) == []


def test_ranks_on_cpus_may_vary_by_half():
    assert found(lambda facts: facts["product"].update(median=2.6e10), ranks=(3,), **copy.deepcopy(ON_CPU)) == []
    finding = only(lambda facts: facts["product"].update(median=2.4e10), ranks=(3,), **copy.deepcopy(ON_CPU))
    assert (finding.check, finding.status) == ("compute", "warn")
    assert "24 GFLOP/s" in finding.found


# Limits, memory, threads


def test_few_open_files_warn_and_more_ranks_need_more():
    finding = only(lambda facts: facts["limits"].update(nofile=1024))
    assert (finding.check, finding.status, finding.where) == ("limits", "warn", "host n1")
    assert finding.found == "ulimit -n (nofile) is 1,024, wanted 4,096"
    assert "ulimit -n 65536" in finding.remedy
    assert found(lambda facts: facts["limits"].update(nofile=4096)) == []
    many = [Report(rank, f"n{rank}", 0, facts(0, limits={**facts(0)["limits"], "nofile": 4096})) for rank in range(512)]
    assert machine._judge_limits(many)[0].figures["wanted"] == 1024 + 16 * 512


def test_few_processes_warn():
    finding = only(lambda facts: facts["limits"].update(nproc=100))
    assert finding.found == "ulimit -u (nproc) is 100, wanted 384"


def test_locked_memory_matters_where_infiniband_is():
    finding = only(lambda facts: facts["limits"].update(memlock=8 * 2**20))
    assert "8,192 KiB, and there is mlx5_0" in finding.found
    assert "ulimit -l unlimited" in finding.remedy
    assert found(lambda facts: facts.update(infiniband=[], limits={**facts["limits"], "memlock": 1})) == []


@pytest.mark.parametrize(("mib", "status"), [(64, "warn"), (20, "warn"), (19, "fail")])
def test_dockers_shared_memory_where_ranks_share_a_host(mib, status):
    """Two ranks need 10 MiB each."""
    finding = only(lambda facts: facts.update(shm_free=mib * 2**20))
    assert (finding.check, finding.status, finding.where) == ("/dev/shm", status, "host n1")
    assert f"{mib} MiB free for 2 ranks" in finding.found
    assert "--shm-size" in finding.remedy
    alone = [Report(0, "n0", 0, facts(0, shm_free=mib * 2**20))]
    assert [finding.status for finding in machine._judge_shm(alone)] == ["pass"]


def test_shared_memory_that_is_in_use_is_none(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=16 * GIB, free=1000))
    assert machine.collect(None, torch.device("cpu"))["shm_free"] == 1000


def test_states_that_do_not_fit_into_host_memory_fail():
    """400 GiB over four ranks: 200 for the two of each host."""
    assert found(lambda facts: facts.update(state_bytes=400 * GIB, memory=201 * GIB)) == []
    finding = only(lambda facts: facts.update(state_bytes=400 * GIB, memory=199 * GIB))
    assert (finding.check, finding.status, finding.where) == ("host memory", "fail", "host n1")
    assert "200.0 GiB needed" in finding.found


def test_threads():
    finding = only(lambda facts: facts.update(threads=None))
    assert (finding.check, finding.status, finding.where) == ("threads", "warn", "host n1")
    assert "2 ranks would each start 64 threads" in finding.found
    assert "OMP_NUM_THREADS=32" in finding.remedy
    assert found(lambda facts: facts.update(threads="1")) == []
    finding = only(lambda facts: facts.update(threads="1", optimizer_on_host=True))
    assert "OMP_NUM_THREADS is 1" in finding.found
    assert machine._judge_threads([Report(0, "n0", 0, facts(0, threads=None))])[0].status == "pass"


# Operators


def with_ops(**more):
    return lambda facts: facts.update(ops={**NO_OPS, "needed": ["cpu_adam"], **more})


def test_an_operator_that_will_be_compiled_warns():
    finding = only(with_ops())
    assert (finding.check, finding.status, finding.where) == ("DeepSpeed ops", "warn", "host n1")
    assert "cpu_adam will be compiled" in finding.found
    assert "/cache/ext" in finding.found
    assert found(with_ops(built=["cpu_adam"])) == []
    assert found(with_ops(installed=["cpu_adam"], tools={"c++": None, "ninja": None, "nvcc": None})) == []


@pytest.mark.parametrize(
    ("op", "built", "lacks", "missing"),
    [
        ("cpu_adam", [], "c++", "c++"),
        ("cpu_adam", [], "ninja", "ninja"),
        ("cpu_adam", ["cpu_adam"], "ninja", "ninja"),
        ("quantizer", [], "nvcc", "nvcc"),
    ],
)
def test_missing_tools_fail(op, built, lacks, missing):
    """torch asks for ninja even where the operator has been built."""
    tools = {"c++": "/c++", "ninja": "/ninja", "nvcc": "/nvcc", lacks: None}
    finding = only(with_ops(needed=[op], built=built, tools=tools))
    assert finding.status == "fail"
    assert f"{op} is compiled at the start: {missing} missing" == finding.found
    assert found(with_ops(built=["cpu_adam"], tools={"c++": None, "ninja": "/ninja", "nvcc": None})) == []


def test_a_lock_that_was_left_fails_with_the_path_to_remove():
    lock = {"path": "/cache/ext/cpu_adam/lock", "op": "cpu_adam", "age_s": 7200}
    finding = only(with_ops(built=["cpu_adam"], locks=[lock]))
    assert (finding.status, finding.where) == ("fail", "host n1")
    assert "120 minutes ago" in finding.found
    assert "rm /cache/ext/cpu_adam/lock" in finding.remedy
    assert only(with_ops(needed=[], locks=[lock])).status == "warn"
    assert found(with_ops(built=["cpu_adam"], locks=[lock], compiling=True)) == []
    assert found(with_ops(built=["cpu_adam"], locks=[{**lock, "age_s": 60}])) == []


def test_locks_and_operators_in_torchs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for op, file in (("cpu_adam", "lock"), ("quantizer", "quantizer.so"), ("other", "other.o")):
        (tmp_path / op).mkdir()
        (tmp_path / op / file).write_text("")
    os.utime(tmp_path / "cpu_adam" / "lock", (time.time() - 3600,) * 2)
    collected = json.loads(json.dumps(ops.collect(["cpu_adam", "quantizer"])))
    (lock,) = collected["locks"]
    assert (lock["path"], lock["op"]) == (str(tmp_path / "cpu_adam" / "lock"), "cpu_adam")
    assert 3590 < lock["age_s"] < 3700
    assert collected["built"] == ["quantizer"]
    assert collected["folder"] == str(tmp_path)


def test_the_folder_is_the_one_that_torch_builds_in(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given in (None, str(tmp_path / "mine")):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if given:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", given)
        assert str(ops.extensions_folder() / "cpu_adam") == _get_build_directory("cpu_adam", verbose=False)


@pytest.mark.parametrize(
    ("name", "on_gpu", "wanted"),
    [
        ("zero3", True, []),
        ("zero3_offload_optimizer", True, ["cpu_adam"]),
        ("zero3_offload_all", True, ["cpu_adam"]),
        ("zero3_offload_optimizer", False, []),
    ],
)
def test_operators_of_the_shipped_strategies(name, on_gpu, wanted):
    assert ops.needed(read_strategy(name), on_gpu) == wanted


def test_quantized_collectives_need_an_operator():
    assert ops.needed({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, True) == ["quantizer"]


def test_operators_that_deepspeeds_installation_has_built():
    text = "version='0.19.8'\ninstalled_ops={'async_io': False, 'cpu_adam': True}\naccelerator_name='cuda'\n"
    assert ops.installed_ops(text) == {"cpu_adam"}
    assert ops.installed_ops(text.replace("'cuda'", "'cpu'")) == set()
    assert ops.installed_ops("version='0.19.8'\n") == set()


# Collecting


def test_facts_of_this_host_are_json_and_judged(base_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "WARM_UP_S", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = RunConfig.model_validate({"model": {"path": str(base_model)}, "data": {"train": "x"}, "out": "y"})
    collected = json.loads(json.dumps(machine.collect(config, torch.device("cpu"))))
    assert collected["product"]["best"] >= collected["product"]["median"] > 1e8
    assert collected["state_bytes"] == num_parameters(base_model) * (16 + 2)
    assert collected["limits"].keys() == {"nofile", "memlock", "nproc", "core"}
    checks = {finding.check: finding.status for finding in machine.judge([Report(0, "n0", 0, collected)])}
    assert checks["compute"] == "pass"
    assert checks["host memory"] == "pass"
    without = machine.collect(None, torch.device("cpu"))
    assert without["state_bytes"] is None
    assert without["ops"]["needed"] == []
