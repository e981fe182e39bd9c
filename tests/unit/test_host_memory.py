"""Host memory under limits of control groups. Run: pytest tests/unit/test_host_memory.py"""

import psutil
import pytest

from sft.host_memory import _left_in_control_groups, available_host_memory

GIB = 2**30


def group(folder, limit, use, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon {use - inactive}\nfile {inactive}\ninactive_file {inactive}\n")


def left(tmp_path, membership):
    (tmp_path / "cgroup").write_text(membership)
    return _left_in_control_groups(tmp_path / "cgroup", tmp_path / "root")


def test_every_group_around_the_process_counts(tmp_path):
    group(tmp_path / "root" / "slurm" / "job_7" / "step_0", 8 * GIB, 3 * GIB)
    group(tmp_path / "root" / "slurm" / "job_7", 6 * GIB, 2 * GIB)
    group(tmp_path / "root" / "slurm" / "job_8", GIB, GIB)
    assert left(tmp_path, "0::/slurm/job_7/step_0\n") == [5 * GIB, 4 * GIB]


def test_a_group_without_a_limit_is_passed_over(tmp_path):
    group(tmp_path / "root" / "user.slice", "max", 3 * GIB)
    assert left(tmp_path, "0::/user.slice\n") == []


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    group(tmp_path / "root", 4 * GIB, GIB)
    assert left(tmp_path, "0::/\n") == [3 * GIB]


def test_a_path_outside_of_the_namespace_is_no_error(tmp_path):
    group(tmp_path / "root", 4 * GIB, GIB)
    assert 3 * GIB in left(tmp_path, "0::/../../other\n")


def test_files_that_were_read_are_room(tmp_path):
    """After a model was loaded, the page cache fills the group to its limit."""
    group(tmp_path / "root", 4 * GIB, 4 * GIB, inactive=3 * GIB)
    assert left(tmp_path, "0::/\n") == [3 * GIB]


def test_a_host_without_control_groups_has_no_limits(tmp_path):
    assert _left_in_control_groups(tmp_path / "absent", tmp_path / "root") == []
    assert left(tmp_path, "7:memory:/old\n1:cpu:/\n") == []


def test_version_1_of_control_groups_counts_as_well(tmp_path):
    folder = tmp_path / "root" / "memory" / "slurm" / "job_7"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{6 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{4 * GIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    assert left(tmp_path, "1:cpu:/slurm\n4:memory,hugetlb:/slurm/job_7\n") == [3 * GIB]


@pytest.mark.parametrize(("limit", "expected"), [(GIB, GIB), (10 * GIB, 5 * GIB)])
def test_the_lowest_counts(monkeypatch, limit, expected):
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=5 * GIB))
    monkeypatch.setattr("sft.host_memory._left_in_control_groups", lambda membership: [limit, 20 * GIB])
    assert available_host_memory() == expected


def test_on_this_host():
    assert available_host_memory() <= psutil.virtual_memory().total
