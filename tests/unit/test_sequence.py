"""A rank's part of a micro-batch that others share, the rules for their number, and MLPs in tiles.
Run: pytest tests/unit/test_sequence.py"""

import numpy as np
import pytest
import torch

from sft import inputs
from sft.attention import register
from sft.batch import IGNORE, build, build_scored
from sft.config import BatchSection, DataSection, ModelSection, RunConfig
from sft.errors import UserError
from sft.model import load_model
from sft.sequence import NOT_SHARED, Shares, check_heads, data_ranks, own_part
from sft.tiled_mlp import TiledMLP, tile_mlps

CPU = torch.device("cpu")
GROUP = "the group"


def parts_of(batch, size):
    return [own_part(batch, Shares(0, 1, rank, size, GROUP)) for rank in range(size)]


def test_parts_by_hand():
    labels = np.array([IGNORE, 11, 12, 13])
    batch = build(
        [(np.array([10, 11, 12, 13]), labels), (np.array([20, 21, 22]), np.array([20, 21, 22]))], CPU, [0, 1], 2
    )
    first, second = parts_of(batch, 2)
    assert first.ids_1T.tolist() == [[10, 11, 12, 13]]
    assert second.ids_1T.tolist() == [[20, 21, 22, 0]]
    assert second.pos_1T.tolist() == [[0, 1, 2, 0]]
    assert (first.predict_N.tolist(), first.targets_N.tolist()) == ([0, 1, 2], [11, 12, 13])
    assert (second.predict_N.tolist(), second.targets_N.tolist()) == ([0, 1], [21, 22])
    assert second.source_N.tolist() == [1, 1]
    assert (first.start, second.start) == (0, 4)
    for part in (first, second):
        assert part.layout.seq_lens == (4, 3, 1)
        assert part.layout.cu_seqlens.tolist() == [0, 4, 7, 8]
        assert part.layout.cu_seqlens.dtype == torch.int32
        assert part.layout.group == GROUP


def test_a_target_behind_the_cut_is_predicted_before_it():
    ids = np.arange(5, 11)
    first, second = parts_of(build([(ids, ids)], CPU), 2)
    assert first.targets_N.tolist() == [6, 7, 8]
    assert second.ids_1T[0, 0] == 8
    assert second.targets_N.tolist() == [9, 10]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_hold_every_token_and_target_once(size):
    random = np.random.RandomState(0)
    documents = [(random.randint(3, 259, length), random.randint(3, 259, length)) for length in (9, 1, 14, 2)]
    batch = build(documents, CPU)
    parts = parts_of(batch, size)
    assert len({part.ids_1T.shape for part in parts}) == 1
    for name in ("ids_1T", "pos_1T"):
        joined = torch.cat([getattr(part, name)[0] for part in parts])
        assert torch.equal(joined[:26], getattr(batch, name)[0])
    assert sum(parts[0].layout.seq_lens) == -(-26 // size) * size
    assert torch.equal(torch.cat([part.targets_N for part in parts]), batch.targets_N)
    assert torch.equal(torch.cat([part.predict_N + part.start for part in parts]), batch.predict_N)


def test_scored_continuations_keep_their_number_in_each_part():
    ids = np.arange(3, 13)
    scored = build_scored([(ids, [ids[-6:], ids[-1:], ids[-2:]])], CPU)
    parts = parts_of(scored, 2)
    assert [part.num_sources for part in parts] == [3, 3]
    counts = sum(part.source_N.bincount(minlength=3) for part in parts)
    assert counts.tolist() == [6, 1, 2]
    assert parts[0].source_N.tolist() == [0]


def test_where_packs_are_not_shared_a_batch_is_as_it_was():
    batch = build([(np.arange(3, 8), np.arange(3, 8))], CPU)
    assert own_part(batch, NOT_SHARED) is batch


@pytest.mark.parametrize(
    ("size", "heads", "groups"), [(1, 5, 5), (2, 4, 2), (4, 4, 2), (4, 8, 1), (8, 32, 8), (3, 6, None)]
)
def test_heads_that_can_be_divided(size, heads, groups):
    check_heads(size, {"num_attention_heads": heads, "num_key_value_heads": groups})


@pytest.mark.parametrize(("size", "heads", "groups"), [(3, 4, 4), (8, 4, 4), (4, 12, 6), (4, 12, 3)])
def test_heads_that_cannot_be_divided_are_told(size, heads, groups):
    with pytest.raises(
        UserError, match=f"batch.sequence_parallel {size} does not divide the model's heads \\({heads} "
    ):
        check_heads(size, {"num_attention_heads": heads, "num_key_value_heads": groups})


def test_ranks_that_cannot_be_divided_are_told():
    assert data_ranks(8, 4) == 2
    for world_size, size in ((4, 3), (2, 4), (1, 2)):
        remedy = f"use a divisor of {world_size}, or a multiple of {size} ranks"
        with pytest.raises(UserError, match=f"does not divide the {world_size} ranks; {remedy}"):
            data_ranks(world_size, size)


@pytest.mark.parametrize(
    ("world_size", "size", "message"),
    [
        (4, 3, "batch.sequence_parallel 3 does not divide the 4 ranks"),
        (3, 3, "batch.sequence_parallel 3 does not divide the model's heads"),
        (4, 2, "rows_per_step 7 is no multiple of 4 ranks / 2 per pack"),
    ],
)
def test_bad_numbers_are_told_before_any_process_group(base_model, prepared, tmp_path, world_size, size, message):
    rows = {3: 12, 2: 7}[size]
    config = RunConfig(
        model=ModelSection(path=str(base_model)),
        data=DataSection(train=str(prepared / "train")),
        batch=BatchSection(rows_per_step=rows, sequence_parallel=size),
        out=str(tmp_path),
    )
    with pytest.raises(UserError, match=message) as caught:
        inputs.open_inputs(config, world_size)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def load(folder):
    return load_model(
        str(folder), dtype=torch.float32, attention=register("sdpa"), checkpointing=False, liger=False
    ).train()


def test_tiles_never_hold_more_than_their_part_of_the_activations(base_model, monkeypatch):
    """What the MLPs' linear layers are given, and never the whole; the gradient is tested in tests/dist."""
    from sft import tiled_mlp

    seen = []
    original = tiled_mlp.linear

    def noted(x, *args):
        seen.append(x.shape[1])
        return original(x, *args)

    monkeypatch.setattr(tiled_mlp, "linear", noted)
    model = load(base_model)
    names = [name for name, _ in model.named_parameters()]
    assert all(isinstance(mlp, TiledMLP) for mlp in tile_mlps(model.hf, 4))
    assert [name for name, _ in model.named_parameters()] == names
    loss, _ = model(build([(np.arange(3, 45), np.arange(3, 45))], CPU))
    assert set(seen) == {11, 9}, "42 tokens"
    forward = len(seen)
    loss.backward()
    assert len(seen) == 2 * forward, "once more in backward"


def test_a_frozen_weight_in_a_tiled_mlp_gets_no_gradient(base_model):
    model = load(base_model)
    mlp = tile_mlps(model.hf, 2)[0]
    mlp.up_proj.weight.requires_grad_(False)
    model(build([(np.arange(3, 20), np.arange(3, 20))], CPU))[0].backward()
    assert mlp.up_proj.weight.grad is None
    assert mlp.gate_proj.weight.grad.norm() > 0
