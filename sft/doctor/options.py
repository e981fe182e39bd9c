"""Options of `sft doctor`: every option of the run that is to be checked, and a few of its own."""

from typing import Annotated, Literal

from pydantic import Field

from sft.config import PositiveInt, RunConfig, Section


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
