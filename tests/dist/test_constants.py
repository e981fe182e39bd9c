"""Frozen parameters, persistent buffers, and parameters smaller than the number of ranks: saved, loaded, exported.
Run: pytest tests/dist/test_constants.py (all cases at once; see constants_worker)"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.models.llama import modeling_llama

from sft.checkpoint import Pieces, newest_complete, rank_file, read_meta
from sft.hf_folder import export_checkpoint
from sft.zero_state import STATES
from tests.dist import forked
from tests.dist.constants_worker import BUFFERS, CASES, FROZEN, LOADED_ON, SAVED_ON, Norm

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FROZEN_NAMES = {"model.embed_tokens.weight", *(f"{FROZEN[1]}{name}" for name in ("weight", "gain", "tilt"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("constants")
    done = forked.run("tests.dist.constants_worker", str(folder), str(prepared), timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def checkpoint_of(folder, case, name="saved"):
    return newest_complete(folder / case / name / "checkpoints")


def whole(saved):
    """(name, state) -> the whole flattened tensor; a constant has the state "constant" alone."""
    pieces, shapes = Pieces(saved), read_meta(saved)["shapes"]
    constant = {name for name in shapes if name in FROZEN_NAMES or name.endswith(BUFFERS)}
    return {
        (name, state): pieces.read(name, state, 0, torch.Size(shape).numel())
        for name, shape in shapes.items()
        for state in (("constant",) if name in constant else STATES)
    }


def live(folder, case, name, when, rank):
    return load_file(folder / case / name / f"{when}-{rank}.safetensors")


def differing(one, other):
    assert one.keys() == other.keys()
    return {key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])}


def constants_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name in FROZEN_NAMES or name.endswith(BUFFERS)}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_what_training_left(folder, case):
    saved = {name: tensor for (name, state), tensor in whole(checkpoint_of(folder, case)).items() if state != "fp32"}
    base, dtype = load_file(folder / "base" / "model.safetensors"), DTYPES[CASES[case][1]]
    after = live(folder, case, "saved", "after", 0)
    for name in FROZEN_NAMES:
        assert torch.equal(saved[name], base[name].to(dtype).flatten()), name
    for name in constants_of(after):
        assert saved[name].dtype == after[name].dtype, name
        assert torch.equal(saved[name], after[name].flatten()), name
    seen = [name for name in after if name.endswith("seen")]
    assert len(seen) == 5
    assert all(saved[name].dtype == torch.int64 and saved[name].min() > 0 for name in seen), "training changed them"


@pytest.mark.parametrize("ranks", LOADED_ON)
@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_on_other_ranks_is_saved_again_bit_for_bit(folder, case, ranks):
    saved, again = (whole(checkpoint_of(folder, case, name)) for name in ("saved", f"on-{ranks}"))
    assert {state for _, state in saved} == {*STATES, "constant"}
    assert not differing(saved, again)
    steps = [read_meta(checkpoint_of(folder, case, name))["optimizer_step"] for name in ("saved", f"on-{ranks}")]
    assert steps == [2, 2]


@pytest.mark.parametrize("ranks", LOADED_ON)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_computes_with_what_was_saved(folder, case, ranks):
    expected = live(folder, case, "saved", "after", 0)
    for rank in range(ranks):
        assert not differing(live(folder, case, f"on-{ranks}", "after", rank), expected), rank
        before = live(folder, case, f"on-{ranks}", "before", rank)
        control = differing(constants_of(before), constants_of(expected))
        assert control == constants_of(expected).keys(), "control: the changed base has other values of all of them"
    assert not differing(live(folder, case, "saved", "after", 1), expected)


@pytest.mark.parametrize("ranks", LOADED_ON)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_begins_with_the_buffers_of_the_base(folder, case, ranks):
    first = live(folder, case, f"on-{ranks}", "before", 0)
    for rank in range(1, ranks):
        assert not differing(live(folder, case, f"on-{ranks}", "before", rank), first), rank


@pytest.mark.parametrize("case", CASES)
def test_some_ranks_own_nothing_of_the_small_parameters(folder, case):
    saved = checkpoint_of(folder, case, "on-4")
    owners = {name: 0 for name in read_meta(saved)["shapes"]}
    for rank in range(4):
        with safe_open(saved / rank_file(rank, 4), "pt") as file:
            for name in {key.partition("|")[0] for key in file.keys()}:  # noqa: SIM118
                owners[name] += 1
    assert owners["model.norm.gain"] == 1
    assert 1 <= owners["model.norm.tilt"] <= 3
    assert SAVED_ON == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_an_export_holds_them_too(folder, case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", Norm)
    export_checkpoint(checkpoint_of(folder, case), folder / "base", tmp_path / "export", dtype=dtype)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    shapes = read_meta(checkpoint_of(folder, case))["shapes"]
    expected = {
        name: (tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor).reshape(shapes[name])
        for (name, state), tensor in whole(checkpoint_of(folder, case)).items()
        if state in ("fp32", "constant")
    }
    assert not differing(exported, expected)
