"""Memory of this host that a process may still take."""

from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available_host_memory() -> int:
    """Bytes: what the kernel calls available, or less where a control group (Slurm, Kubernetes) sets a lower limit."""
    return min([psutil.virtual_memory().available, *_left_in_control_groups(Path("/proc/self/cgroup"))])


def _left_in_control_groups(membership: Path, root: Path = CGROUPS) -> list[int]:
    """Limit minus use of this process's control group (version 2) and of those around it, where there is a limit.

    Files that were read count as use; the part that the kernel drops first when memory is asked for is left out, as
    Kubernetes does for its working set: otherwise nothing would be left after a model has been loaded.
    """
    lines = membership.read_text().splitlines() if membership.is_file() else []
    inner = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), "")
    folder = root / inner
    left = []
    while folder.is_relative_to(root):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit, use = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            left.append(limit - use + _inactive_file(folder))
        folder = folder.parent
    return left


def _inactive_file(group: Path) -> int:
    """Bytes of the page cache that were not used lately."""
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(counts["inactive_file"])
