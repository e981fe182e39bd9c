"""Other ways to save and load the state of the same engine, with the methods of sft.saver.Saver that a step calls.

Each keeps its newest checkpoint and deletes the one before it beside training, as ours does with keep_last 1.
"""

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from sft import zero_state


class Peer(ABC):
    """A save of another kind. Methods are collective unless they say otherwise.

    Args:
        record: told, as by our Saver, of every checkpoint that is on the disk.
    """

    def __init__(self, engine: Any, folder: Path, record: Callable[..., None]) -> None:
        self._engine, self._folder, self._record = engine, folder, record
        self._threads = ThreadPoolExecutor(1)
        self._written: Future[Any] | None = None
        self._newest: Path | None = None
        self._step, self._began_s, self._stall_s = 0, 0.0, 0.0

    def begin(self, step: int, _heldout_loss: float | None) -> None:
        """Save the state after `step`."""
        self.finish()
        self._step, self._began_s = step, time.perf_counter()
        self._written = self._start(self._folder / f"step-{step}")
        self._stall_s += time.perf_counter() - self._began_s

    def before_update(self) -> None:
        """Wait until the optimizer may change its state. Not collective."""
        began_s = time.perf_counter()
        self._wait_for_copy()
        self._stall_s += time.perf_counter() - began_s

    def is_written(self) -> bool:
        """Whether this rank's part is on the disk. Not collective."""
        return self._written is not None and self._written.done()

    def finish(self) -> None:
        """Wait for the save that is under way."""
        if self._written is not None:
            began_s = time.perf_counter()
            self._written.exception()
            self._stall_s += time.perf_counter() - began_s
            self.publish()

    def publish(self) -> None:
        """Note a save that is on every rank's disk."""
        assert self._written is not None
        self._written.result()
        self._written, previous, self._newest = None, self._newest, self._folder / f"step-{self._step}"
        dist.barrier()
        num_bytes = sum(file.stat().st_size for file in self._newest.rglob("*") if file.is_file())
        self._record("save", self._step, save_time_s=time.perf_counter() - self._began_s, gib=num_bytes / 2**30)
        if previous is not None and dist.get_rank() == 0:
            self._threads.submit(shutil.rmtree, previous)

    def take_stall_s(self) -> float:
        """Seconds that training has waited since the last call. Not collective."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def wait_for_deletions(self) -> None:
        """Wait for the thread. Not collective."""
        self._threads.shutdown()

    @abstractmethod
    def load(self) -> None:
        """Put the newest checkpoint into the engine."""

    @abstractmethod
    def _start(self, target: Path) -> "Future[Any]":
        """Begin to save."""

    @abstractmethod
    def _wait_for_copy(self) -> None:
        """Return when the state may change."""


class DeepSpeedSaver(Peer):
    """engine.save_checkpoint: training waits until the files are written, though not until they are on the disk."""

    def _start(self, target: Path) -> "Future[Any]":
        self._engine.save_checkpoint(str(self._folder), tag=target.name)
        dist.barrier()  # DeepSpeed's own lies before rank 0 has copied its scripts
        return self._threads.submit(sync_files, target)

    def _wait_for_copy(self) -> None:
        """Nothing to wait for: its call returns when the files are written."""

    def load(self) -> None:
        """engine.load_checkpoint."""
        assert self._newest is not None
        found, _ = self._engine.load_checkpoint(str(self._folder), tag=self._newest.name)
        assert found is not None


class DcpSaver(Peer):
    """torch.distributed.checkpoint.async_save of the optimizer's flat tensors, staged beside training as ours is.

    A rank's tensors carry its number: such a checkpoint can be read by as many ranks as wrote it, no other number.
    """

    def __init__(self, engine: Any, folder: Path, record: Callable[..., None]) -> None:
        super().__init__(engine, folder, record)
        self._group = dist.new_group(backend="gloo")
        on_gpu = zero_state.flat_tensors(engine.optimizer)[0].is_cuda
        options = StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=on_gpu
        )
        self._stager = DefaultStager(options)
        self._staged: Future[Any] | None = None

    def wait_for_deletions(self) -> None:
        """Let go of the copy as well."""
        self._stager.close()
        super().wait_for_deletions()

    def load(self) -> None:
        """dcp.load in place, then the compute weights."""
        optimizer = self._engine.optimizer
        zero_state.before_loading(optimizer)
        dcp.load(self._state(), checkpoint_id=self._newest, process_group=self._group)
        zero_state.refresh_compute_weights(optimizer)

    def _start(self, target: Path) -> "Future[Any]":
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the stager copies on a stream of its own
        answer = dcp.async_save(
            self._state(), checkpoint_id=target, process_group=self._group, async_stager=self._stager
        )
        self._staged = answer.staging_completion
        return answer.upload_completion

    def _wait_for_copy(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def _state(self) -> dict[str, torch.Tensor]:
        tensors = zero_state.state_tensors(self._engine.optimizer)
        rank = dist.get_rank()
        return {f"{state}.{index}.{rank}": flat for state, flats in tensors.items() for index, flat in enumerate(flats)}


def sync_files(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
