"""Small checkpoints without any engine, written as sft.saver does it, and what they must hold."""

from pathlib import Path
from typing import Any

import torch

from sft import checkpoint
from sft.checkpoint import CONSTANT, Piece
from sft.config import CheckpointSection
from sft.retention import superfluous
from sft.zero_state import STATES

WORLD_SIZE = 2
NUMEL = {"w": 10, "embed": 3000}
CUTS = {"w": 6, "embed": 1701}
"""Where the second rank's part begins."""
SHAPES = {"w": [2, 5], "embed": [30, 100], "frozen": [3]}
IDENTITY = {"data_key": "k", "rows_per_step": 8, "data_seed": 0}


def values(step: int, name: str, state: str) -> torch.Tensor:
    """The whole flattened tensor after `step`."""
    offset = 1000.0 * step + 0.25 * STATES.index(state)
    return offset + torch.arange(NUMEL[name], dtype=torch.float32)


def frozen(step: int) -> torch.Tensor:
    """A bf16 constant, which the first rank holds."""
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16) * step


def pieces(step: int, rank: int) -> list[Piece]:
    """What a rank writes."""
    found = []
    for state in STATES:
        for name, cut in CUTS.items():
            low, high = (0, cut) if rank == 0 else (cut, NUMEL[name])
            found.append(Piece(name, state, low, values(step, name, state)[low:high]))
    return found + ([Piece("frozen", CONSTANT, 0, frozen(step))] if rank == 0 else [])


def write_files(folder: Path, step: int) -> dict[str, Any]:
    """Every rank's file in step-….partial; their entries for meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_abandoned(folder)
    partial = checkpoint.partial_folder(folder, step)
    partial.mkdir()
    names = [checkpoint.rank_file(rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    return {name: checkpoint.write_pieces(partial / name, pieces(step, rank)) for rank, name in enumerate(names)}


def meta(files: dict[str, Any], heldout_loss: float | None = None) -> dict[str, Any]:
    """The rest of meta.json."""
    return {"shapes": SHAPES, "identity": IDENTITY, "heldout_loss": heldout_loss, "files": files}


def save(folder: Path, step: int, heldout_loss: float | None = None) -> Path:
    """A complete checkpoint."""
    return checkpoint.publish(folder, step, meta(write_files(folder, step), heldout_loss))


def save_and_prune(folder: Path, step: int, keep: CheckpointSection, heldout_loss: float | None = None) -> None:
    """A complete checkpoint, then without those that it makes superfluous."""
    save(folder, step, heldout_loss)
    for dropped in superfluous(folder, keep):
        checkpoint.delete(dropped)


def assert_holds(saved: Path, step: int) -> None:
    """Complete, undamaged, and every element as it was at `step`."""
    assert checkpoint.is_complete(saved), saved
    lines = checkpoint.damage(saved, checkpoint.digests(saved))
    assert not lines, lines
    assert checkpoint.read_meta(saved)["step"] == step
    read = checkpoint.Pieces(saved)
    for name, numel in NUMEL.items():
        for state in STATES:
            assert torch.equal(read.read(name, state, 0, numel), values(step, name, state)), (name, state)
    assert torch.equal(read.weights("frozen", SHAPES["frozen"]), frozen(step))


def steps(folder: Path) -> list[int]:
    """Of every folder with a checkpoint's name, complete or not."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(folder)]
