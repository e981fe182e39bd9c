"""Memory of this host that a process may still take."""

from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available_host_memory() -> int:
    """Bytes: what the kernel calls available, or less where a control group (Slurm, Kubernetes) sets a lower limit."""
    return min([psutil.virtual_memory().available, *_left_in_control_groups(Path("/proc/self/cgroup"))])


def _left_in_control_groups(membership: Path, root: Path = CGROUPS) -> list[int]:
    """Limit minus use of this process's control group and of those around it, where there is a limit.

    Files that were read count as use; the part that the kernel drops first when memory is asked for is left out, as
    Kubernetes does for its working set: otherwise nothing would be left after a model has been loaded.
    """
    left = []
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit, use = (int((folder / name).read_text()) for name in names[:2])
                left.append(limit - use + _count(folder / "memory.stat", names[2]))
            folder = folder.parent
    return left


def _count(statistics: Path, name: str) -> int:
    """Bytes of the page cache that were not used lately."""
    return int(dict(line.split() for line in statistics.read_text().splitlines())[name])
