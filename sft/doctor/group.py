"""Ranks of a check: what one knows, all learn, through the store of their meeting; nothing hangs without a name."""

import json
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sft.doctor.finding import Report
from sft.errors import RankLost
from sft.rendezvous import Meeting, missing_ranks

LOOK_S = 0.05


@dataclass(frozen=True)
class Group:
    """Ranks that have met. Every method is collective and takes JSON values."""

    meeting: Meeting
    local_rank: int
    limit_s: float
    """A rank that takes longer than this for one exchange is named, and the others leave."""

    @property
    def rank(self) -> int:
        """This rank."""
        return self.meeting.rank

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.meeting.world_size

    @property
    def host(self) -> str:
        """This rank's host."""
        return self.meeting.places[self.rank].host

    def gather(self, what: str, value: Any) -> list[Any]:
        """Everyone's `value` under the name `what`, which is used once; by rank.

        Raises:
            RankLost: a rank did not come to this point in time; names it.
        """
        store, deadline_s = self.meeting.store, time.monotonic() + self.limit_s
        store.set(f"doctor/{what}/{self.rank}", json.dumps(value))
        keys = [f"doctor/{what}/{rank}" for rank in range(self.world_size)]
        try:
            while not store.check(keys):
                if time.monotonic() > deadline_s:
                    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                    late = self.name(missing)
                    raise RankLost(
                        f"{late} did not finish '{what}' within {self.limit_s:.0f} s; see that host's output"
                    )
                time.sleep(LOOK_S)
            return [json.loads(store.get(key)) for key in keys]
        except dist.DistError as error:
            raise RankLost(f"rank {self.rank} on {self.host}: lost rank 0 during '{what}'") from error

    def reports(self, what: str, facts: dict[str, Any]) -> list[Report]:
        """Everyone's facts, by rank."""
        gathered = self.gather(what, [self.local_rank, facts])
        places = self.meeting.places
        return [Report(rank, places[rank].host, local, found) for rank, (local, found) in enumerate(gathered)]

    def name(self, ranks: list[int]) -> str:
        """Names of ranks with their hosts."""
        return missing_ranks(ranks, ",".join(f"{place.host}:1" for place in self.meeting.places))
