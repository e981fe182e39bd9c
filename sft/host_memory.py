"""Memory of this host that a process may still take."""

from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available_host_memory() -> int:
    """Bytes: what the kernel calls available, or less where a control group (Slurm, Kubernetes) sets a lower limit."""
    return min([psutil.virtual_memory().available, *_left_in_control_groups(Path("/proc/self/cgroup"))])


def _left_in_control_groups(membership: Path, root: Path = CGROUPS) -> list[int]:
    """Limit minus use of this process's control group (version 2) and of those around it, where there is a limit."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    inner = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), "")
    folder = root / inner
    left = []
    while folder.is_relative_to(root):
        with suppress(OSError, ValueError):  # no such file, or "max"
            left.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
        folder = folder.parent
    return left
