"""A run's folder: that it is one, that every host sees it, and that one run at a time works in it."""

import fcntl
import os
import time
from pathlib import Path

from sft.config import RunConfig
from sft.errors import UserError
from sft.settings import to_yaml

LOCK = "lock"
LAUNCH = "launch-"
"""Beginning of the names of folders that launchers of several hosts keep here while they are at work."""
DOCTOR = ".sft-doctor-"
"""Beginning of the names of files that `sft doctor` writes here; one that was killed leaves them behind."""
VISIBLE_AFTER_S = 90.0
"""A network file system may remember for this long that a folder did not exist."""


def run_folder(config: RunConfig) -> Path:
    """The run's folder; one that holds anything else than a run is refused.

    Raises:
        UserError: the folder exists, is not empty, and has no config.yaml of a run; or it cannot be written to.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a folder")
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {out}: {above} is no folder that can be written to; choose another --out")
    is_run = (out / "config.yaml").is_file()
    if (
        out.is_dir()
        and not is_run
        and any(path.name != LOCK and not path.name.startswith((LAUNCH, DOCTOR)) for path in out.iterdir())
    ):
        raise UserError(f"--out {out}: exists and is no run folder; choose another")
    return out


def lock(out: Path) -> None:
    """Hold the folder until this process ends; for rank 0. File systems without locks are passed over.

    Raises:
        UserError: another run holds it; names its host and process.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: closing would let go
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        raise UserError(f"--out {out}: a run is at work there ({owner}); stop it, or choose another --out") from None
    except OSError:
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())


def write_config(config: RunConfig, out: Path) -> None:
    """Save the resolved options, whole or not at all."""
    partial = out / "config.yaml.partial"
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, out / "config.yaml")


def await_config(out: Path) -> None:
    """See what rank 0 wrote: `out` must be one folder for all.

    Raises:
        UserError: this rank's host does not see it.
    """
    deadline_s = time.monotonic() + VISIBLE_AFTER_S
    while not (out / "config.yaml").is_file():
        if time.monotonic() > deadline_s:
            host = os.uname().nodename
            raise UserError(
                f"--out {out}: {host} does not see what rank 0 wrote there; choose a file system that all share"
            )
        if out.parent.is_dir():
            os.listdir(out.parent)  # makes a network file system look again
        time.sleep(0.5)
