"""Checkpoints of our own: each rank's slices of fp32 weights and Adam moments, in safetensors and JSON.

    <run out>/checkpoints/step-00000500/
        rank-00000-of-00002.safetensors   "<parameter>|fp32", "|exp_avg", "|exp_avg_sq": 1-D slices of this rank;
                                          the header's `slices` says where each begins in the flattened parameter
        meta.json                         step, optimizer step, parameter shapes, identities to compare on resume
        COMPLETE                          written last: sizes of the files; without it the folder is not a checkpoint

Learning rate, data order and seeds follow from the step, so they are not stored. Slices carry global
offsets, so any number of ranks can read what another number wrote. DeepSpeed's own checkpoints are
pickles, not atomic, and its Universal Checkpoint restores the first parameter group's settings to all.

The slices are read from DeepSpeed 0.19.8's optimizer through attributes that are not a public interface:
the version is pinned, and resume equality is tested.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from sft.errors import UserError

FORMAT_VERSION = 1
STATES = ("fp32", "exp_avg", "exp_avg_sq")
PREFIX = "hf."
"""PackedCausalLM's attribute; stripped, so that a checkpoint names parameters as transformers does."""


@dataclass(frozen=True)
class Slice:
    """A run of one flattened parameter that this rank owns, inside one of the optimizer's flat fp32 tensors."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    flat_offset: int


# Writing


def save(engine: Any, folder: Path, step: int, identity: dict[str, Any], heldout_loss: float | None) -> None:
    """Write a complete checkpoint of `engine` after optimizer step `step`; collective, every rank calls it.

    Args:
        folder: <run out>/checkpoints, on a file system that all ranks share.
        identity: what a resume must agree with (data key, tokenizer digest, rows_per_step, ...).
        heldout_loss: measured after this step, for retention; None where none was.
    """
    final = step_folder(folder, step)
    partial = final.with_name(final.name + ".partial")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _write_rank_file(engine, partial / _rank_file(rank, world_size))
    dist.barrier()
    if rank == 0:
        _write_json(
            partial / "meta.json",
            {
                "format_version": FORMAT_VERSION,
                "step": step,
                "optimizer_step": _optimizer_step(engine.optimizer),
                "world_size": world_size,
                "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
                "shapes": _shapes(engine),
                "identity": identity,
                "heldout_loss": heldout_loss,
            },
        )
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        os.replace(partial, final)
        _write_json(final / "COMPLETE", {"bytes": sizes})
        for abandoned in folder.glob("step-*.partial"):  # of saves that were killed
            shutil.rmtree(abandoned)
    dist.barrier()


def prune(folder: Path, keep_last: int, keep_best: bool) -> list[Path]:
    """Delete complete checkpoints beyond the newest `keep_last` and the one with the lowest held-out loss."""
    complete = [checkpoint for checkpoint in list_checkpoints(folder) if is_complete(checkpoint)]
    losses = {checkpoint: read_meta(checkpoint)["heldout_loss"] for checkpoint in complete}
    measured = [checkpoint for checkpoint in complete if losses[checkpoint] is not None]
    best = [min(measured, key=losses.__getitem__)] if keep_best and measured else []
    dropped = [checkpoint for checkpoint in complete if checkpoint not in [*complete[-keep_last:], *best]]
    for checkpoint in dropped:
        (checkpoint / "COMPLETE").unlink()  # first, so that a half-deleted folder never looks whole
        shutil.rmtree(checkpoint)
    return dropped


# Reading


def newest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next((checkpoint for checkpoint in reversed(list_checkpoints(folder)) if is_complete(checkpoint)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file that it lists has its size."""
    try:
        sizes = json.loads((checkpoint / "COMPLETE").read_text())["bytes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, complete or not."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return folder / f"step-{step:08d}"


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a complete checkpoint.

    Raises:
        UserError: the checkpoint is not complete, or of another format version.
    """
    if not is_complete(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint}: not complete (no COMPLETE marker, or a file is cut short); use another"
        )
    meta = json.loads((checkpoint / "meta.json").read_text())
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {checkpoint}: format {meta['format_version']}, this version reads {FORMAT_VERSION}"
        )
    return meta


def check_identity(checkpoint: Path, meta: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to resume another run's checkpoint.

    Raises:
        UserError: names every value that differs.
    """
    saved = meta["identity"]
    differing = [key for key in identity if saved.get(key) != identity[key]]
    if differing:
        changes = "; ".join(f"{key}: was {saved.get(key)}, now {identity[key]}" for key in differing)
        raise UserError(
            f"checkpoint {checkpoint} belongs to another run ({changes}); choose another --out, or restore the setting"
        )


def load(engine: Any, checkpoint: Path) -> None:
    """Put weights, moments and optimizer step of `checkpoint` into a fresh engine; collective."""
    meta = read_meta(checkpoint)
    optimizer = engine.optimizer
    _check_shapes(checkpoint, meta["shapes"], _shapes(engine))
    if _is_stage3(optimizer):
        optimizer.checkpoint_event_prologue()
    pieces = Pieces(checkpoint)
    for owned in owned_slices(optimizer):
        for state in STATES:
            target = owned.flat if state == "fp32" else _moment(optimizer, owned.flat, state)
            view = target.detach()[owned.flat_offset : owned.flat_offset + owned.numel]
            view.copy_(pieces.read(owned.name, state, owned.start, owned.numel))
    _set_optimizer_step(optimizer, meta["optimizer_step"])
    _refresh_compute_weights(optimizer)
    if _is_stage3(optimizer):
        optimizer.checkpoint_event_epilogue()
    dist.barrier()


class Pieces:
    """Random access to flattened parameters across the rank files of a checkpoint, memory-mapped."""

    def __init__(self, checkpoint: Path) -> None:
        self._files = []
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(checkpoint.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files.append(file)
            for name, (start, numel) in json.loads(file.metadata()["slices"]).items():
                self._where.setdefault(name, []).append((start, numel, file))

    def read(self, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter `name`, fp32 [numel], on the CPU."""
        out = torch.empty(numel, dtype=torch.float32)
        found = 0
        for piece_start, piece_numel, file in self._where.get(name, []):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                part = file.get_slice(f"{name}|{state}")[low - piece_start : high - piece_start]
                out[low - start : high - start] = part
                found += high - low
        if found != numel:
            raise UserError(
                f"checkpoint: holds {found} of {numel} elements of {name}|{state} from {start}; it is damaged"
            )
        return out


# DeepSpeed's optimizers


def owned_slices(optimizer: Any) -> Iterator[Slice]:
    """What this rank owns of each parameter, for ZeRO-3 and for ZeRO-1/2."""
    yield from _stage3_slices(optimizer) if _is_stage3(optimizer) else _stage12_slices(optimizer)


def _stage3_slices(optimizer: Any) -> Iterator[Slice]:
    rank = dist.get_rank(optimizer.dp_process_group)
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            per_rank = parameter.partition_numel()
            start = rank * per_rank
            numel = min(per_rank, parameter.ds_numel - start)  # the last ranks' partitions are padded, or empty
            if numel > 0:
                yield Slice(_name(optimizer.param_names[parameter]), start, numel, flat, offset)
            offset += per_rank


def _stage12_slices(optimizer: Any) -> Iterator[Slice]:
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Slice(_name(optimizer.param_names[parameter]), low.start, low.numel, flat, high.start)


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors that this rank's optimizer steps."""
    if _is_stage3(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def _moment(optimizer: Any, flat: torch.Tensor, state: str) -> torch.Tensor:
    states = optimizer.optimizer.state[flat]
    if state not in states:  # a fresh optimizer creates its states at its first step
        states[state] = torch.zeros_like(flat, requires_grad=False)
    return states[state]


def _optimizer_step(optimizer: Any) -> int:
    states = optimizer.optimizer.state.get(flat_tensors(optimizer)[0], {})
    return int(states.get("step", 0))


def _set_optimizer_step(optimizer: Any, step: int) -> None:
    counts_on_host = type(optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    for flat in flat_tensors(optimizer):
        # one tensor each: torch's AdamW counts in place, and a shared one would count once per flat tensor
        optimizer.optimizer.state[flat]["step"] = (
            step if counts_on_host else torch.tensor(float(step), dtype=torch.float32, device=flat.device)
        )


def _refresh_compute_weights(optimizer: Any) -> None:
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        parts = optimizer.unflatten(
            optimizer.fp16_partitioned_groups_flat[index], optimizer.fp16_partitioned_groups[index]
        )
        for partition, part in zip(optimizer.fp16_partitioned_groups[index], parts, strict=True):
            partition.data = part.data


def _write_rank_file(engine: Any, path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    slices: dict[str, tuple[int, int]] = {}
    for owned in owned_slices(engine.optimizer):
        slices[owned.name] = (owned.start, owned.numel)
        for state in STATES:
            source = owned.flat if state == "fp32" else _moment(engine.optimizer, owned.flat, state)
            view = source.detach()[owned.flat_offset : owned.flat_offset + owned.numel]
            tensors[f"{owned.name}|{state}"] = view.to("cpu", torch.float32, copy=True)
    save_file(tensors, path, metadata={"slices": json.dumps(slices)})
    _sync(path)


def _name(engine_name: str) -> str:
    return engine_name.removeprefix(PREFIX)


def _shapes(engine: Any) -> dict[str, list[int]]:
    parameters = engine.module.named_parameters()
    return {_name(name): list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}


def _check_shapes(checkpoint: Path, saved: dict[str, list[int]], current: dict[str, list[int]]) -> None:
    if wrong := [name for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)]:
        name = wrong[0]
        shapes = f"{saved.get(name)} there, {current.get(name)} here"
        raise UserError(
            f"checkpoint {checkpoint}: is of another model: shape of {name} is {shapes}; choose another --out"
        )


def _rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
