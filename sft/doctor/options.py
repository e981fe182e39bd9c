"""Options of `sft doctor`: every option of the run that is to be checked, and a few of its own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sft.config import PositiveInt, RunConfig, Section
from sft.errors import UserError

STDOUT = "-"
"""Where the JSON goes that is to be printed."""


class DoctorSection(Section):
    digests: Literal["sample", "full"] = "sample"
    """Shards and weights read and compared on every host. sample: as many as are read in about a minute at 1 GiB/s, the
    first and the last among them; full: every byte."""
    network_mib: PositiveInt = 64
    """What each rank gives to an all-gather when the bandwidth is measured. Larger than any latency shows."""
    overlap: bool = True
    """Train a small model for a few steps with overlap_comm on and off, and compare gradients and time."""
    limit_s: Annotated[float, Field(ge=10, le=1e6)] = 600.0
    """Longest time of one check; a rank that needs longer is named."""


class HostConfig(Section):
    """Without a run: this host alone."""

    doctor: DoctorSection = DoctorSection()


class DoctorConfig(RunConfig):
    """With the run that is to be started: its run file and flags, exactly as for `sft train`."""

    doctor: DoctorSection = DoctorSection()


def take_json(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Where the JSON goes (None: nowhere; STDOUT), and the flags without `--json [FILE]`.

    Raises:
        UserError: FILE cannot be written.
    """
    at = next((index for index, word in enumerate(argv) if word.partition("=")[0] == "--json"), None)
    if at is None:
        return None, list(argv)
    _, equals, target = argv[at].partition("=")
    rest = list(argv[at + 1 :])
    if not equals and rest and not rest[0].startswith("-"):
        target, rest = rest[0], rest[1:]
    if not target and equals:
        raise UserError("--json=: name a file, or leave the = out for standard output")
    path = Path(target or STDOUT)
    if target and os.environ.get("RANK", "0") == "0" and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json {target}: cannot be written; name a file in a folder that is there and writable")
    return target or STDOUT, [*argv[:at], *rest]
