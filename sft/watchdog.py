"""A rank that dies or hangs stops the others within a bounded time, and they name it.

Two daemon threads per rank, because the main thread may wait in a collective (NCCL: in C) for a peer that is no more.
Every `lost_after_s` / 6, but at most 5 s, `_watch` puts this rank's sign of life into the store of the process group,
over a connection of its own, and asks for a verdict. Rank 0 reads all the signs: who gave none (by the clock of
rank 0: two hosts' clocks are never compared), who does not get on. The death of a process of the same host shows in
/proc within half a second. `_guard_store` talks to nobody: rank 0 has the store, and a call to a stopped process never
returns. The first verdict in the store holds for all; every rank leaves with EXIT_RANK_LOST.
"""

import dataclasses
import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch.distributed as dist

from sft.errors import EXIT_CODES, EXIT_RANK_LOST, Preempted, RankLost, leave
from sft.vitals import (
    ADVICE,
    Beat,
    Member,
    Progress,
    Verdict,
    describe_error,
    is_gone,
    is_stopped,
    judge_progress,
    name_all,
    take_beat,
    this_member,
)

LOOK_S = 0.5
"""Between two looks at the processes of this host: a look costs one read of /proc each."""
LONGEST_INTERVAL_S = 5.0
"""Between two signs of life: a thousand ranks are some hundred small requests per second for the store."""
ENDING_GRACE_S = 10.0
"""After one rank has ended by an error: time for the others to end by the same error, which then is theirs to tell."""
LEAVE_S = 15.0
"""For trackers to close and for files to be written on the way out. The launcher kills 30 s after the first death."""


class Watchdog:
    """Context manager around training, on every rank, from the meeting on; once per meeting.

    Args:
        rank, world_size: of all ranks.
        lost_after_s: a rank without a sign of life for this long is lost.
        hang_after_s: a rank that lives but calls no `mark` for this long hangs.
        record: writes a reason to events.jsonl; called on the lowest rank that is left, before it leaves. Where rank 0
            is lost, nobody can ask who else is: then on the lowest left of rank 0's host and the lowest of all others.
        stacks: folder for the stacks of ranks that hang, rank-00003.txt.
        store: of the meeting; a TCPStore below its prefixes.

    Every rank must call `mark` in the same order with the same phases: the one with the fewest calls is behind.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        lost_after_s: float,
        hang_after_s: float,
        record: Callable[[str], None],
        stacks: Path,
        store: dist.Store,
    ) -> None:
        self._shared_store = store
        self._rank, self._world_size = rank, world_size
        self._lost_after_s, self._hang_after_s = lost_after_s, hang_after_s
        self._interval_s = min(LONGEST_INTERVAL_S, lost_after_s / 6)
        self._record, self._stacks = record, stacks
        self.progress = Progress(0, "start", 0, time.monotonic(), hang_after_s)
        self._trains = threading.get_ident()
        self._beats, self._has_ended, self._beating = 0, False, threading.Lock()
        self._stood_still_s, self._woke_s = 0.0, float("-inf")
        self._leaving, self._knows, self._stop = threading.Lock(), False, threading.Event()
        # the main thread is in __exit__ and waits for a verdict; and has it
        self._waits, self._found, self._reason = threading.Event(), threading.Event(), ""

    def mark(self, phase: str, step: int, limit_s: float | None = None) -> None:
        """The main thread gets on: it begins `phase` of 1-based `step`, which may take `limit_s` (hang_after_s)."""
        limit_s = self._hang_after_s if limit_s is None else limit_s
        self.progress = Progress(self.progress.marks + 1, phase, step, time.monotonic(), limit_s)

    def __enter__(self) -> "Watchdog":
        """Collective: every rank tells where it runs.

        Raises:
            RankLost: ranks did not come within hang_after_s.
        """
        self._store = _own_connection(self._shared_store, timedelta(seconds=self._hang_after_s + 60))
        self._put_beat()
        try:
            self._members = self._meet()
        except dist.DistError as error:  # rank 0 has left, or waits for others for too long
            raise RankLost(f"rank {self._rank} on {os.uname().nodename}: no answer from rank 0; {ADVICE}") from error
        self._me, self._zero = self._members[self._rank], self._members[0]
        self._neighbours = [m for m in self._members.values() if m.place == self._me.place and m != self._me]
        self._beside_zero = {m.rank for m in self._members.values() if m.place == self._zero.place}
        self._zero_seen = self._read_beats([0])[0].place
        self._answered_s = time.monotonic()
        self._signs = {rank: ("", self._answered_s) for rank in range(self._world_size)}
        for target in (self._watch,) if self._rank == 0 else (self._watch, self._guard_store):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this rank ends; after a failed collective, find out which rank broke it.

        Raises:
            RankLost: another rank ended the run; `error` is its cause. Only on a host's first rank: the others have
                no trackers to close and leave here.
        """
        try:
            if error is None or isinstance(error, Preempted):  # Preempted is agreed: every rank ends by it
                self._end_with_the_others()
            elif is_failed_collective(error):
                self._await_verdict(error)
        except dist.DistError as broken:
            self._await_verdict(broken)
        if error is not None and not self._stop.is_set():
            self._announce(error)

    def _end_with_the_others(self) -> None:
        """Rank 0 stays until all have come here: it holds the store, and its end would look like a loss."""
        self._put_beat(ended=True)
        self._store.add("finished", 1)
        if self._rank == 0:
            self._waits.set()
            while self._store.add("finished", 0) < self._world_size:
                if self._found.wait(0.1):
                    raise RankLost(self._reason)
        self._stop.set()

    def _await_verdict(self, error: BaseException) -> None:
        """Returns only if nobody can be named."""
        self.progress = dataclasses.replace(self.progress, limit_s=math.inf)
        self._waits.set()
        # the slowest way: the silence of a host, seen by rank 0, read by the others, written down
        if self._found.wait(self._lost_after_s + 4 * self._interval_s + LEAVE_S):
            raise RankLost(self._reason) from error

    def _announce(self, error: BaseException) -> None:
        """Publish why this rank ends. Bounded: a store that does not answer must not keep it."""
        self._stop.set()
        reason = f"{self._me} ended in {self.progress.place}: {describe_error(error)}; {ADVICE}"
        run_bounded(3 * self._interval_s + 2, self._tell, Verdict("ended", (self._rank,), reason))

    def _tell(self, verdict: Verdict) -> None:
        if self._knows or (self._zero in self._neighbours and is_gone(self._zero)):
            return  # the others are leaving, too
        try:
            self._put_beat(ended=True)
            self._acknowledge(self._publish(verdict))
        except dist.DistError:
            return  # rank 0 has left: nobody to tell

    def _meet(self) -> dict[int, Member]:
        """By rank: for rank 0 all, for others rank 0's host and their own (a thousand need not read a thousand)."""
        me = this_member(self._rank)
        self._store.set(f"member/{self._rank}", json.dumps(dataclasses.asdict(me)))
        if self._rank > 0:
            known = json.loads(self._store.get(f"members/{me.place}"))
            return {facts["rank"]: Member(**facts) for facts in known}
        deadline_s = time.monotonic() + self._hang_after_s
        missing = list(range(self._world_size))
        while missing := [rank for rank in missing if not self._store.check([f"member/{rank}"])]:
            if time.monotonic() > deadline_s:
                names = name_all([f"rank {rank}" for rank in missing])
                reason = f"{names}: not up within {self._hang_after_s:.0f} s of rank 0 on {me.host}; {ADVICE}"
                self._record(reason)
                raise RankLost(reason)
            time.sleep(0.05)
        texts = self._store.multi_get([f"member/{rank}" for rank in range(self._world_size)])
        members = [Member(**json.loads(text)) for text in texts]
        for place in {member.place for member in members}:
            known = [dataclasses.asdict(member) for member in members if member.place in (place, me.place)]
            self._store.set(f"members/{place}", json.dumps(known))
        return dict(enumerate(members))

    def _put_beat(self, ended: bool = False) -> None:
        with self._beating:
            if not self._has_ended:
                self._has_ended = ended
                self._beats += 1
                beat = take_beat(self._beats, self.progress, self._woke_s, self._trains, ended)
                self._store.set(f"beat/{self._rank}", json.dumps(dataclasses.asdict(beat)))

    def _read_beats(self, ranks: list[int]) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}

    def _publish(self, verdict: Verdict) -> Verdict:
        """The verdict that holds: the first one."""
        return _verdict_of(self._store.compare_set("verdict", "", json.dumps(dataclasses.asdict(verdict))))

    def _acknowledge(self, verdict: Verdict) -> None:
        """This rank knows the verdict. Rank 0 stays for the others, for as long as two of their questions take."""
        if self._knows:
            return
        self._knows = True
        try:
            self._hold_store(verdict)
        except dist.DistError:
            return  # rank 0 has left

    def _hold_store(self, verdict: Verdict) -> None:
        self._store.add("know", 1)
        knowing = len(verdict.survivors(range(self._world_size))) + (verdict.kind == "ended")
        deadline_s = time.monotonic() + 2 * self._interval_s + 1
        while self._rank == 0 and self._store.add("know", 0) < knowing and time.monotonic() < deadline_s:
            time.sleep(0.05)

    def _watch(self) -> None:
        """Thread: signs of life, neighbours, verdicts."""
        next_s = looked_s = time.monotonic()
        while not self._stop.wait(0.1 if self._waits.is_set() else min(LOOK_S, self._interval_s)):
            now = self._notice_standstill(looked_s)
            try:
                verdict = self._look_at_neighbours()
                if verdict is None and (now >= next_s or self._waits.is_set()):
                    next_s = now + self._interval_s
                    verdict = self._talk(now)
            except dist.DistError:
                verdict = self._store_broke_off()
            looked_s = self._notice_standstill(now)  # it can be stopped in the middle of a question, too
            if verdict is not None and not self._stop.is_set():
                own_hang = verdict.kind == "hangs" and self._rank in verdict.culprits
                if looked_s - self._woke_s < self._lost_after_s + 2 * self._interval_s and not own_hang:
                    still = f"{self._me} was itself stopped for {self._stood_still_s:.0f} s; meanwhile "
                    verdict = Verdict("silent", (self._rank,), still + verdict.reason)
                self._act(verdict)
                return

    def _notice_standstill(self, looked_s: float) -> float:
        """Now; a rank that was stopped since `looked_s`, as a whole job can be, holds nobody's silence against it."""
        now = time.monotonic()
        if now - looked_s > self._lost_after_s / 2:
            self._stood_still_s, self._woke_s = now - looked_s, now
            self._signs = {rank: (sign, now) for rank, (sign, _) in self._signs.items()}
        return now

    def _look_at_neighbours(self) -> Verdict | None:
        gone = [member for member in self._neighbours if is_gone(member)]
        if self._zero in gone:  # it stays until all have ended, so it did not end well; its store went with it
            return self._zero_lost("gone", "is gone")
        if not gone:
            return None
        self._neighbours = [member for member in self._neighbours if member not in gone]
        beats = self._read_beats([member.rank for member in gone])
        gone = [member for member in gone if not beats[member.rank].ended]
        if not gone:
            return None
        who, are = name_all([str(member) for member in gone]), "is" if len(gone) == 1 else "are"
        reason = f"{who} {are} gone: {self._seen(beats[gone[0].rank].place)}; {ADVICE}"
        return self._publish(Verdict("gone", tuple(member.rank for member in gone), reason))

    def _talk(self, now: float) -> Verdict | None:
        self._put_beat()
        verdict = None
        if self._store.check(["verdict"]):
            verdict = _verdict_of(self._store.get("verdict"))
        elif self._rank > 0:
            self._zero_seen = self._read_beats([0])[0].place
        elif judged := self._judge(now):
            verdict = self._publish(judged)
        self._answered_s = time.monotonic()
        return verdict

    def _judge(self, now: float) -> Verdict | None:
        """Rank 0: who gives no sign of life, who does not get on."""
        beats = self._read_beats(list(range(self._world_size)))
        for rank, beat in beats.items():
            if self._signs[rank][0] != str(beat.number):
                self._signs[rank] = (str(beat.number), now)
        silence_s = {rank: now - self._signs[rank][1] for rank, beat in beats.items() if not beat.ended}
        longest_s = max(silence_s.values(), default=0)
        if longest_s <= self._lost_after_s:
            return judge_progress(beats, self._members)
        # a host takes all its ranks along, whose last signs came within an interval or two
        silent = [rank for rank, age_s in silence_s.items() if age_s > longest_s - 2 * self._interval_s]
        who, give = name_all([self._name(self._members[rank]) for rank in silent]), "give" + "s" * (len(silent) == 1)
        seen = self._seen(beats[silent[0]].place)
        reason = f"{who} {give} no sign of life for {longest_s:.0f} s: {seen}; {ADVICE}"
        return Verdict("silent", tuple(silent), reason)

    def _name(self, member: Member) -> str:
        return f"{member}, stopped by a signal," if member in self._neighbours and is_stopped(member) else str(member)

    def _seen(self, place: str) -> str:
        """Its last sign may be an interval older than its end: our own place is the other bound."""
        mine = self.progress.place
        return f"last seen in {place}" + (f" (rank {self._rank} is in {mine})" if mine != place else "")

    def _zero_lost(self, kind: Literal["gone", "silent"], how: str) -> Verdict:
        """Rank 0 took the store along, so that each rank finds this verdict for itself."""
        return Verdict(kind, (0,), f"{self._name(self._zero)} {how}: {self._seen(self._zero_seen)}; {ADVICE}")

    def _store_broke_off(self) -> Verdict:
        deadline_s = time.monotonic() + 2
        while self._zero in self._neighbours and time.monotonic() < deadline_s:  # its sockets close before it is gone
            if is_gone(self._zero):
                return self._zero_lost("gone", "is gone")
            time.sleep(0.05)
        return self._zero_lost("gone", "closed its connection")

    def _guard_store(self) -> None:
        """Thread of every rank but 0: does rank 0's store answer?"""
        looked_s = time.monotonic()
        while not self._stop.wait(min(LOOK_S, self._interval_s)) and not self._knows:
            now = time.monotonic()
            if now - looked_s > self._lost_after_s / 2:
                self._answered_s = now
            looked_s = now
            if now - self._answered_s > self._lost_after_s:
                self._leave(self._zero_lost("silent", f"does not answer for {now - self._answered_s:.0f} s"))

    def _act(self, verdict: Verdict) -> None:
        """In the thread `_watch`: leave; by the main thread's way out if it is waiting and has something to close."""
        if verdict.kind == "ended":
            run_bounded(LEAVE_S, self._acknowledge, verdict)
            deadline_s = time.monotonic() + ENDING_GRACE_S
            while time.monotonic() < deadline_s and not self._waits.is_set():
                if self._stop.wait(0.05):
                    return
        if self._waits.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
            run_bounded(LEAVE_S, self._write_down, verdict)
            self._reason = verdict.reason
            self._found.set()
            time.sleep(LEAVE_S)
            leave(EXIT_RANK_LOST)
        self._leave(verdict)

    def _leave(self, verdict: Verdict) -> None:
        """Say it once per host, write it down, end this process: from any thread, within LEAVE_S."""
        if not self._leaving.acquire(blocking=False):
            return
        try:
            if self._rank == min(verdict.survivors(self._alive_here()), default=self._rank):
                # past sys.stderr: the main thread may hold its lock
                os.write(2, f"{EXIT_CODES[RankLost][1]}: {verdict.reason}\n".encode())
            run_bounded(LEAVE_S, self._write_down, verdict)  # what hangs may be the file system
        finally:
            leave(EXIT_RANK_LOST)

    def _write_down(self, verdict: Verdict) -> None:
        """Stacks of a rank that hangs (of all, where none is behind), and the event on one rank."""
        if verdict.kind == "hangs" and self._rank in (verdict.culprits or [self._rank]):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._rank:05d}.txt").open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
        is_lost = verdict.kind in ("gone", "silent")
        ranks = set(range(self._world_size))
        if is_lost and 0 in verdict.culprits:
            ranks = self._alive_here() if self._zero.place == self._me.place else ranks - self._beside_zero
        if verdict.survivors(ranks)[:1] == [self._rank]:
            self._record(verdict.reason)
        if not (is_lost and {0, self._rank} & set(verdict.culprits)):
            self._acknowledge(verdict)

    def _alive_here(self) -> set[int]:
        return {self._rank, *(member.rank for member in self._neighbours if not is_gone(member))}


def run_bounded(limit_s: float, target: Callable[[Verdict], None], verdict: Verdict) -> None:
    """`target(verdict)`, waited for no longer than `limit_s`."""
    thread = threading.Thread(target=target, args=(verdict,), daemon=True)
    thread.start()
    thread.join(limit_s)


def is_failed_collective(error: BaseException) -> bool:
    """Whether the error tells of a peer and not of this rank: of torch.distributed, or a RuntimeError of gloo."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def _own_connection(store: dist.Store, timeout: timedelta) -> dist.Store:
    """To the same store: on a shared connection, the main thread's waiting calls would hold up ours."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore), f"a TCPStore is needed, not {type(store).__name__}"
    client = dist.TCPStore(store.host, store.port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore("watchdog", client)


def _verdict_of(text: bytes) -> Verdict:
    facts = json.loads(text)
    return Verdict(facts["kind"], tuple(facts["culprits"]), facts["reason"])
