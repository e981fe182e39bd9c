"""Completeness, retention and slice reading of checkpoints, without any ranks.

Run: pytest tests/unit/test_checkpoint.py
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint import (
    FORMAT_VERSION,
    Pieces,
    check_identity,
    is_complete,
    newest_complete,
    prune,
    read_meta,
    step_folder,
)
from sft.errors import UserError


def write(folder, step, heldout_loss=None, marker=True):
    """A checkpoint of two ranks that holds one 10-element parameter "w" = 0..9, cut after 6."""
    checkpoint = step_folder(folder, step)
    checkpoint.mkdir(parents=True)
    values = torch.arange(10, dtype=torch.float32)
    for rank, (start, end) in enumerate([(0, 6), (6, 10)]):
        tensors = {f"w|{state}": values[start:end].clone() for state in ("fp32", "exp_avg", "exp_avg_sq")}
        slices = json.dumps({"w": (start, end - start)})
        save_file(tensors, checkpoint / f"rank-{rank:05d}-of-00002.safetensors", metadata={"slices": slices})
    meta = {"format_version": FORMAT_VERSION, "step": step, "identity": {"data_key": "k"}, "heldout_loss": heldout_loss}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    if marker:
        sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
        (checkpoint / "COMPLETE").write_text(json.dumps({"bytes": sizes}))
    return checkpoint


def steps_left(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


def test_newest_is_chosen_by_completeness_not_by_name(tmp_path):
    first = write(tmp_path, 1)
    write(tmp_path, 2, marker=False)
    assert newest_complete(tmp_path) == first
    assert newest_complete(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["truncate", "delete", "garbage marker"])
def test_a_damaged_checkpoint_is_not_complete(tmp_path, damage):
    checkpoint = write(tmp_path, 1)
    assert is_complete(checkpoint)
    file = checkpoint / "rank-00001-of-00002.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "delete":
        file.unlink()
    else:
        (checkpoint / "COMPLETE").write_text("{")
    assert not is_complete(checkpoint)
    with pytest.raises(UserError, match="not complete"):
        read_meta(checkpoint)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in [(1, 2.0), (2, 1.0), (3, 3.0), (4, 1.5), (5, None)]:
        write(tmp_path, step, loss)
    write(tmp_path, 6, marker=False)
    prune(tmp_path, keep_last=2, keep_best=True)
    assert steps_left(tmp_path) == [2, 4, 5, 6]
    prune(tmp_path, keep_last=1, keep_best=False)
    assert steps_left(tmp_path) == [5, 6]


@pytest.mark.parametrize(("start", "numel"), [(0, 10), (0, 6), (4, 4), (6, 4), (9, 1)])
def test_slices_are_read_across_rank_files(tmp_path, start, numel):
    pieces = Pieces(write(tmp_path, 1))
    assert pieces.read("w", "exp_avg", start, numel).tolist() == list(range(start, start + numel))


def test_elements_that_no_rank_wrote_are_an_error(tmp_path):
    pieces = Pieces(write(tmp_path, 1))
    with pytest.raises(UserError, match="2 of 4 elements"):
        pieces.read("w", "fp32", 8, 4)
    with pytest.raises(UserError, match="0 of 1"):
        pieces.read("other", "fp32", 0, 1)


def test_identity_names_every_difference(tmp_path):
    checkpoint = write(tmp_path, 1)
    meta = {"identity": {"data_key": "k", "rows_per_step": 8, "data_seed": 0}}
    check_identity(checkpoint, meta, {"data_key": "k", "rows_per_step": 8, "data_seed": 0})
    with pytest.raises(UserError, match=r"data_key: was k, now other; rows_per_step: was 8, now 4"):
        check_identity(checkpoint, meta, {"data_key": "other", "rows_per_step": 4, "data_seed": 0})
