"""Ranks of a check: what one knows, all learn, through the store of their meeting; who is late is named."""

import json
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sft.doctor.finding import Report
from sft.errors import RankLost
from sft.rendezvous import Meeting, missing_ranks

LOOK_S = 0.02
LONGEST_LOOK_S = 0.5
"""Hundreds of ranks that ask rank 0's store more often keep it busy."""


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
        texts = self._put(what, value)
        if self.rank == 0:
            self.meeting.store.set(f"doctor/{what}/all", f"[{','.join(texts)}]")
            return [json.loads(text) for text in texts]
        return list(json.loads(self._await(what)))

    def reports(self, what: str, facts: dict[str, Any]) -> list[Report]:
        """Everyone's facts, by rank, on rank 0; on the others none, once rank 0 has all: they may be large.

        Raises:
            RankLost: as gather.
        """
        texts = self._put(what, [self.local_rank, facts])
        if self.rank != 0:
            self._await(what)
            return []
        self.meeting.store.set(f"doctor/{what}/all", "")
        gathered, places = map(json.loads, texts), self.meeting.places
        return [Report(rank, places[rank].host, local, found) for rank, (local, found) in enumerate(gathered)]

    def _put(self, what: str, value: Any) -> list[str]:
        """Tell rank 0 this rank's value; on rank 0, all values."""
        store = self.meeting.store
        keys = [f"doctor/{what}/{rank}" for rank in range(self.world_size)]
        try:
            store.set(keys[self.rank], json.dumps(value))
            arrived = store.add(f"doctor/{what}/arrived", 1)
            if self.rank != 0:
                return []
            deadline_s = time.monotonic() + self.limit_s
            while arrived < self.world_size:
                if time.monotonic() > deadline_s:
                    raise self._late([rank for rank, key in enumerate(keys) if not store.check([key])], what)
                time.sleep(LOOK_S)
                arrived = store.add(f"doctor/{what}/arrived", 0)
            return [text.decode() for text in store.multi_get(keys)]
        except dist.DistError as error:
            raise self._lost(what) from error

    def _await(self, what: str) -> bytes:
        """What rank 0 says when it has all."""
        store, deadline_s, pause_s = self.meeting.store, time.monotonic() + self.limit_s, LOOK_S
        try:
            while not store.check([f"doctor/{what}/all"]):
                if time.monotonic() > deadline_s:
                    raise self._late([0], what)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_LOOK_S)
            return bytes(store.get(f"doctor/{what}/all"))
        except dist.DistError as error:
            raise self._lost(what) from error

    def _late(self, ranks: list[int], what: str) -> RankLost:
        return RankLost(
            f"{self.name(ranks)} did not finish '{what}' within {self.limit_s:.0f} s; see that host's output, "
            "or raise doctor.limit_s if it only needs longer"
        )

    def _lost(self, what: str) -> RankLost:
        return RankLost(f"rank {self.rank} on {self.host}: lost rank 0 during '{what}'")

    def name(self, ranks: list[int]) -> str:
        """Names of ranks with their hosts."""
        return missing_ranks(ranks, ",".join(f"{place.host}:1" for place in self.meeting.places))
