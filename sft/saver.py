"""Saving beside training: a thread copies this rank's state to host memory and writes it; a later step publishes it.

Master weights and moments change in the optimizer's update alone, so the copy runs beside the next step's forwards and
backwards, and training waits for it, if at all, before the update. Files are then written from the copy. Where the host
has no memory for a copy, the thread writes straight from the live state, and the update waits for the whole write.

Collectives are made by the main thread only. A checkpoint is published when the reduction that ends a step has shown
that every rank's file is on the disk.
"""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist

from sft import checkpoint, zero_state
from sft.checkpoint import Piece
from sft.config import CheckpointSection
from sft.errors import UserError
from sft.host_memory import available_host_memory
from sft.moments import Held
from sft.quantised import Quantised
from sft.resume import on_first_rank
from sft.retention import superfluous

COPY_SHARE = 0.5
"""Of the host memory that is free at the start, the copies of all local ranks may take this part."""
ASSUMED_BYTES_PER_S = 2e8
"""How fast this rank writes, until a save has been measured: a slow network file system."""
ASSUMED_FIXED_S = 5.0
"""What a save takes whatever its size, until one has been measured: ranks agree, folders are made and synced."""


@dataclass
class _Save:
    """One checkpoint on its way to the disk."""

    step: int
    states: list[str]
    optimizer_step: int
    heldout_loss: float | None
    began_s: float
    released: Event
    """Set when the optimizer may change its state again."""
    written: "Future[dict[str, Any]]"


class Saver:
    """Writes, publishes and prunes the checkpoints of a run. All of it is collective unless it says otherwise."""

    def __init__(
        self,
        engine: Any,
        folder: Path,
        identity: dict[str, Any],
        keep: CheckpointSection,
        local_ranks: int,
        record: Callable[..., None],
    ) -> None:
        self._engine = engine
        self._folder = folder
        self._identity = identity
        self._keep = keep
        self._record = record
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        flats = zero_state.flat_tensors(engine.optimizer)
        # a thread begins on GPU 0, whichever is this rank's
        choose_gpu = (torch.cuda.set_device, (flats[0].device,)) if flats[0].is_cuda else (None, ())
        self._threads = ThreadPoolExecutor(1, "checkpoint", *choose_gpu)
        self._pruning = ThreadPoolExecutor(1, "prune")  # of its own: deleting must not keep a last save waiting
        self._pruned: Future[None] | None = None
        self._current: _Save | None = None
        self._slices = list(zero_state.owned_slices(engine.optimizer))
        self._stall_s = 0.0
        held = [tensor for state in zero_state.state_tensors(engine.optimizer).values() for tensor in state]
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        copy_bytes = sum(_host_bytes(part) for tensor in held for part in _parts(tensor))
        self.copies = copy_bytes * local_ranks <= COPY_SHARE * available_host_memory()
        """Whether the state is copied to host memory before it is written."""
        self._copy: dict[str, list[Held]] = {}
        self.expected_s = ASSUMED_FIXED_S + self._bytes / ASSUMED_BYTES_PER_S
        """How long a save will take: the last one, or a cautious guess."""
        self.step = 0
        """Of the newest checkpoint: the one begun last, or the one that the run goes on from."""
        on_first_rank(lambda: checkpoint.make_room(folder))

    def seconds_needed(self) -> float:
        """To have the present state on the disk. Not collective."""
        return self.expected_s * (1 if self._current is None else 2)

    def describe(self) -> str:
        """Where the state waits while it is written, for people. Not collective."""
        size = f"{self._bytes / 2**30:,.2f} GiB of this rank"
        if self.copies:
            return f"{size}, written beside training from a copy in host memory"
        return f"{size}, written beside training; no host memory for a copy, so the next update waits for the disk"

    def begin(self, step: int, heldout_loss: float | None) -> None:
        """Start saving the state after optimizer step `step`; finishes a save that is still under way."""
        self.finish()
        self.step = step
        began_s = time.perf_counter()
        self._on_first_rank(step, checkpoint.partial_folder(self._folder, step).mkdir)
        released = Event()
        live = zero_state.state_tensors(self._engine.optimizer)
        constants = [
            Piece(constant.name, checkpoint.CONSTANT, constant.start, constant.tensor)
            for constant in zero_state.constants(self._engine)
        ]
        path = checkpoint.partial_folder(self._folder, step) / checkpoint.rank_file(self._rank, self._world_size)
        ready = torch.cuda.current_stream().record_event() if live["fp32"][0].is_cuda else None
        written = self._threads.submit(self._write, path, live, constants, released, ready)
        counted = zero_state.optimizer_step(self._engine.optimizer)
        self._current = _Save(step, list(live), counted, heldout_loss, began_s, released, written)
        self._stall_s += time.perf_counter() - began_s

    def before_update(self) -> None:
        """Wait until the optimizer may change its state. Not collective."""
        if self._current is not None and not self._current.released.is_set():
            began_s = time.perf_counter()
            self._current.released.wait()
            self._stall_s += time.perf_counter() - began_s

    def is_written(self) -> bool:
        """Whether this rank has a save under way and is done with it, well or not. Not collective."""
        return self._current is not None and self._current.written.done()

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one, and publish it."""
        if self._current is not None:
            began_s = time.perf_counter()
            self._current.written.exception()  # waits; publish() tells of it
            self._stall_s += time.perf_counter() - began_s
            self.publish()

    def publish(self) -> None:
        """Make a checkpoint of what every rank has written.

        Raises:
            UserError: a rank could not write; names it, its host and the reason. Earlier checkpoints are untouched.
        """
        save, self._current = self._current, None
        assert save is not None
        began_s = time.perf_counter()
        outcomes: list[dict[str, Any]] = [{}] * self._world_size
        dist.all_gather_object(outcomes, self._outcome(save.written))
        if failed := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            if self._rank == 0:
                checkpoint.clear_abandoned(self._folder)
            raise UserError(f"checkpoint of step {save.step}: {failed[0]}; earlier checkpoints are untouched")
        files = {checkpoint.rank_file(rank, self._world_size): entry for rank, entry in enumerate(outcomes)}
        meta = self._meta(save, files)
        self._on_first_rank(save.step, lambda: checkpoint.publish(self._folder, save.step, meta))
        self.expected_s = time.perf_counter() - save.began_s
        self._stall_s += time.perf_counter() - began_s
        gib = sum(entry["bytes"] for entry in outcomes) / 2**30
        self._record("save", save.step, save_time_s=round(self.expected_s, 3), stall_s=round(self._stall_s, 3), gib=gib)
        if self._rank == 0:
            self._pruned = self._pruning.submit(self._prune, save.step)

    def take_stall_s(self) -> float:
        """Seconds that training has waited for saving since the last call. Not collective."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def wait_for_deletions(self) -> None:
        """Until no older checkpoint is about to go. Not collective."""
        if self._pruned is not None:
            self._pruned.result()

    def _prune(self, step: int) -> None:
        for dropped in superfluous(self._folder, self._keep):
            try:
                checkpoint.delete(dropped)
            except OSError as error:
                self._record("not_deleted", step, checkpoint=str(dropped), reason=str(error))
            else:
                self._record("delete", step, checkpoint=str(dropped))

    def _on_first_rank(self, step: int, act: Callable[[], object]) -> None:
        """Let rank 0 act while the others wait.

        Raises:
            UserError: the disk did not take it; on every rank.
        """

        def told() -> None:
            try:
                act()
            except OSError as error:
                said = self._describe(error)
                raise UserError(f"checkpoint of step {step}: {said}; earlier checkpoints are untouched") from error

        on_first_rank(told)

    def _write(
        self,
        path: Path,
        live: dict[str, list[Held]],
        constants: list[Piece],
        released: Event,
        ready: Any,
    ) -> dict[str, Any]:
        try:
            if self.copies:
                self._copy_to_host(live, ready)
                released.set()
            source = self._copy if self.copies else live
            pieces = [
                Piece(part.name, state, part.start, flats[part.flat][part.flat_offset : part.flat_offset + part.numel])
                for state, flats in source.items()
                for part in self._slices
            ]
            return checkpoint.write_pieces(path, [*pieces, *constants])
        finally:
            released.set()

    def _copy_to_host(self, live: dict[str, list[Held]], ready: Any) -> None:
        if not self._copy:  # pinned memory takes long to get: once a run
            self._copy = {state: [_host_space(flat) for flat in flats] for state, flats in live.items()}
        if ready is None:
            self._copy_all(live)
            return
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            self._copy_all(live)
        stream.synchronize()

    def _copy_all(self, live: dict[str, list[Held]]) -> None:
        for state, flats in live.items():
            for target, flat in zip(self._copy[state], flats, strict=True):
                for into, part in zip(_parts(target), _parts(flat), strict=True):
                    into.copy_(part, non_blocking=True)

    def _outcome(self, written: "Future[dict[str, Any]]") -> dict[str, Any]:
        error = written.exception()
        if error is None:
            return written.result()
        if not isinstance(error, OSError):
            raise error
        return {"error": self._describe(error)}

    def _describe(self, error: OSError) -> str:
        what = error.strerror or str(error)
        full = "; free disk space, or keep fewer checkpoints" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"rank {self._rank} on {os.uname().nodename} could not write it: {what}{full}"

    def _meta(self, save: _Save, files: dict[str, Any]) -> dict[str, Any]:
        return {
            "optimizer_step": save.optimizer_step,
            "world_size": self._world_size,
            "dtype": str(self._engine.get_data_types()[0]).removeprefix("torch."),
            "shapes": zero_state.shapes(self._engine),
            "states": save.states,
            "identity": self._identity,
            "heldout_loss": save.heldout_loss,
            "files": files,
        }


def _parts(held: Held) -> tuple[torch.Tensor, ...]:
    """The tensors that training changes."""
    return held.parts() if isinstance(held, Quantised) else (held,)


def _host_space(held: Held) -> Held:
    """Room for a copy."""
    if isinstance(held, Quantised):
        return Quantised(_host_tensor(held.codes), _host_tensor(held.scales), held.table.cpu())
    return _host_tensor(held)


def _host_tensor(flat: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)


def _host_bytes(flat: torch.Tensor) -> int:
    """Host memory of a copy: pinned memory comes in powers of two (torch's caching host allocator)."""
    num_bytes = flat.numel() * flat.element_size()
    return 1 << (num_bytes - 1).bit_length() if flat.is_cuda and num_bytes else num_bytes
