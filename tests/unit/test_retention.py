"""Which checkpoints are kept, and whether the disk holds them. Run: pytest tests/unit/test_retention.py"""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sft import checkpoint
from sft.config import CheckpointSection, OptimSection, RunConfig
from sft.errors import UserError
from sft.inputs import open_inputs
from sft.retention import (
    GIB,
    best_checkpoint,
    bytes_per_parameter,
    check_disk,
    exported_bytes_per_parameter,
    kept,
    most_checkpoints,
    num_parameters,
    superfluous,
)
from tests import saved

KEEPS = st.builds(
    CheckpointSection,
    every=st.integers(1, 12),
    keep_last=st.integers(1, 4),
    keep_best=st.booleans(),
    keep_every=st.none() | st.integers(1, 20),
)
LOSSES = st.dictionaries(
    st.integers(1, 60), st.none() | st.just(math.nan) | st.just(math.inf) | st.integers(0, 4).map(float), min_size=1
)


@given(LOSSES, KEEPS)
def test_the_newest_the_best_and_the_multiples_stay_and_nothing_else(losses, keep):
    found = kept(losses, keep)
    newest = sorted(losses)[-keep.keep_last :]
    finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = [step for step in finite if finite[step] == min(finite.values())]
    multiples = [step for step in losses if keep.keep_every and step % keep.keep_every == 0]
    assert max(losses) in found
    assert found.issuperset(newest)
    assert found.issuperset(multiples)
    assert not (keep.keep_best and finite) or max(best) in found
    allowed = {*newest, *multiples, *([max(best)] if keep.keep_best and finite else [])}
    assert found == allowed


@pytest.mark.parametrize("unmeasured", [None, math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(unmeasured):
    keep = CheckpointSection(keep_last=1)
    assert kept({1: unmeasured, 2: 5.0, 3: 9.0}, keep) == {2, 3}
    assert kept({1: unmeasured, 2: unmeasured, 3: unmeasured}, keep) == {3}


def test_of_equal_losses_the_newer_one_is_kept():
    assert kept({1: 2.0, 2: 2.0, 3: 3.0}, CheckpointSection(keep_last=1)) == {2, 3}


def simulated_peak(keep, total_steps, stops, losses, present):
    """Most folders at once in one process of a run, which saves every `every` steps, at `stops` and at the end.

    `present` is updated to what it leaves.
    """
    peak = len(present)
    for step in range(max(present, default=0) + 1, total_steps + 1):
        asked_to_stop = step in stops
        if asked_to_stop or step % keep.every == 0 or step == total_steps:
            peak = max(peak, len(present) + 1)  # being written; then published, then older ones go
            present[step] = losses[step % len(losses)] if step % keep.every == 0 or step == total_steps else None
            wanted = kept(present, keep)
            for superfluous_step in present.keys() - wanted:
                del present[superfluous_step]
        if asked_to_stop:
            break
    return peak


RUNS = st.tuples(
    KEEPS,
    st.integers(1, 60),
    st.sets(st.integers(1, 60), max_size=4),
    st.lists(st.none() | st.integers(0, 9).map(float), min_size=1, max_size=7),
)


@settings(max_examples=300)
@given(RUNS, st.integers(1, 4))
def test_no_process_of_a_run_has_more_folders_than_were_planned_for(run, keep_last_at_first):
    keep, total_steps, stops, losses = run
    present: dict[int, float | None] = {}
    for process in range(len(stops) + 1):
        now = keep.model_copy(update={"keep_last": keep_last_at_first}) if process == 0 else keep
        planned = most_checkpoints(now, total_steps, heldout=True, present=set(present))
        assert simulated_peak(now, total_steps, stops - {max(present, default=0)}, losses, present) <= planned
    assert max(present) == total_steps


def test_control_the_plan_is_reached():
    """A bound that is never met would refuse runs that fit."""
    for keep, total_steps, losses in [
        (CheckpointSection(every=5, keep_last=2, keep_best=False), 50, [None]),
        (CheckpointSection(every=5, keep_last=2, keep_best=True), 50, [9.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]),
        (CheckpointSection(every=5, keep_last=2, keep_best=False, keep_every=50), 120, [None]),
        (CheckpointSection(every=100, keep_last=3), 50, [1.0]),
    ]:
        planned = most_checkpoints(keep, total_steps, heldout=losses != [None])
        assert simulated_peak(keep, total_steps, set(), losses, {}) == planned


@pytest.mark.parametrize(
    ("keep", "total_steps", "present", "expected"),
    [
        ({"every": 500}, 100, [], 1),
        ({"every": 500}, 100, [40], 2),
        ({"every": 500}, 1000, [500], 2),
        ({"every": 500}, 1000, [500, 1000], 2),
        ({"every": 10}, 1000, [], 4),
        ({"every": 10, "keep_best": False}, 1000, [], 3),
        ({"every": 10, "keep_best": False, "keep_every": 100}, 1000, [], 13),
        ({"every": 10, "keep_last": 1, "keep_best": False}, 1000, [10, 20, 30, 40, 50], 6),
    ],
)
def test_most_checkpoints_by_hand(keep, total_steps, present, expected):
    assert most_checkpoints(CheckpointSection(**keep), total_steps, heldout=True, present=present) == expected


def test_without_heldout_data_nothing_is_best():
    keep = CheckpointSection(every=10)
    assert most_checkpoints(keep, 1000, heldout=False) == most_checkpoints(keep, 1000, heldout=True) - 1


# On the disk


def test_nothing_goes_before_its_successor_is_complete(tmp_path):
    keep = CheckpointSection(keep_last=1, keep_best=False)
    saved.save(tmp_path, 1)
    saved.write_files(tmp_path, 2)
    assert superfluous(tmp_path, keep) == [], "only half written"
    newer = saved.save(tmp_path, 2)
    assert [path.name for path in superfluous(tmp_path, keep)] == ["step-00000001"]
    (newer / "COMPLETE").unlink()
    assert superfluous(tmp_path, keep) == [], "torn"


def test_a_run_keeps_the_newest_the_best_and_every_fourth(tmp_path):
    keep = CheckpointSection(keep_last=2, keep_every=4)
    for step, loss in enumerate([5.0, None, 1.0, math.nan, 2.0, 3.0, None, 4.0, 6.0], start=1):
        saved.save_and_prune(tmp_path, step, keep, loss)
        assert saved.steps(tmp_path)[-1] == step
    assert saved.steps(tmp_path) == [3, 4, 8, 9]
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []
    saved.assert_holds(checkpoint.step_folder(tmp_path, 3), 3)


def test_the_best_checkpoint_is_that_of_the_lowest_loss_on_the_disk(tmp_path):
    for step, loss in enumerate([3.0, 2.0, 2.0, math.nan, None], start=1):
        saved.save(tmp_path, step, loss)
    assert best_checkpoint(tmp_path).name == "step-00000003"
    (tmp_path / "step-00000003" / "COMPLETE").unlink()
    assert best_checkpoint(tmp_path).name == "step-00000002"


def test_without_any_loss_the_newest_is_the_best(tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        best_checkpoint(tmp_path)
    for step in (1, 2):
        saved.save(tmp_path, step, None)
    assert best_checkpoint(tmp_path).name == "step-00000002"


def test_a_checkpoint_that_cannot_be_deleted_is_told_of(tmp_path, monkeypatch):
    first = saved.save(tmp_path, 1)

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.unlink", refuse)
    with pytest.raises(PermissionError):
        checkpoint.delete(first)
    assert checkpoint.newest_complete(tmp_path) is None, "it has lost its name, and is no checkpoint any more"


# Disk need


def write_model(folder, files, index=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, shapes in files.items():
        save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}, folder / name)
    if index is not None:
        weight_map = {key: name for name in index for key in files[name]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


SHARDS = {"model-1-of-2.safetensors": {"a": [3, 5], "b": [7]}, "model-2-of-2.safetensors": {"c": [2, 2, 2], "d": []}}


def test_parameters_of_every_shard_are_counted(tmp_path):
    assert num_parameters(write_model(tmp_path, SHARDS, index=SHARDS)) == 15 + 7 + 8 + 1
    single = write_model(tmp_path / "single", {"model.safetensors": {"a": [3, 5], "b": [7]}})
    assert num_parameters(single) == 22


def test_the_same_weights_in_another_file_count_once(tmp_path):
    """Mistral's folders hold consolidated.safetensors beside the shards; transformers does not read it."""
    whole = {key: shape for shapes in SHARDS.values() for key, shape in shapes.items()}
    write_model(tmp_path, {**SHARDS, "consolidated.safetensors": whole}, index=SHARDS)
    assert num_parameters(tmp_path) == 31
    write_model(tmp_path, {"model.safetensors": {"a": [3, 5]}})
    assert num_parameters(tmp_path) == 15, "transformers prefers the single file, too"


def test_a_real_model_folder_is_counted(base_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model)
    assert num_parameters(base_model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model-2-of-2.safetensors").unlink(), "model-2-of-2.safetensors: no such file"),
        (lambda folder: (folder / "model-1-of-2.safetensors").write_bytes(b"\xff" * 100), "no whole safetensors file"),
        (lambda folder: (folder / "model-1-of-2.safetensors").write_text("version https://git-lfs"), "no whole"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "is no index of safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'), "is no index"),
    ],
)
def test_a_torn_model_folder_is_one_line(tmp_path, harm, message):
    folder = write_model(tmp_path, SHARDS, index=SHARDS)
    harm(folder)
    with pytest.raises(UserError, match=message) as refused:
        num_parameters(folder)
    assert "\n" not in str(refused.value)


KEEP = CheckpointSection(every=10, keep_last=2, keep_best=False)
ELEMENTS = 10**6


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """(check(exported_itemsize=2), set_free(bytes), out) for a model of 10^6 parameters."""
    model = write_model(tmp_path / "model", {"model.safetensors": {"a": [1000, 1000]}})
    out = tmp_path / "runs" / "new"
    free = SimpleNamespace(bytes=0, asked=None)

    def disk_usage(folder):
        free.asked = folder
        return SimpleNamespace(free=free.bytes)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return SimpleNamespace(
        check=lambda keep=KEEP: check_disk(
            out, model, keep, 1000, heldout=False, saved_itemsize=12, exported_itemsize=2
        ),
        free=free,
        out=out,
    )


NEED = 3 * 12 * ELEMENTS + 2 * ELEMENTS


def test_the_edge(disk, tmp_path):
    disk.free.bytes = NEED
    facts = disk.check()
    assert facts == {
        "checkpoint_gib": round(12 * ELEMENTS / GIB, 3),
        "checkpoints": 3,
        "need_gib": round(NEED / GIB, 3),
        "free_gib": round(NEED / GIB, 3),
    }
    assert disk.free.asked == tmp_path, "the nearest folder that exists"
    assert not disk.out.exists()
    disk.free.bytes = NEED - 1
    with pytest.raises(UserError):
        disk.check()


def test_the_refusal_names_the_numbers(disk, monkeypatch):
    monkeypatch.setattr("sft.retention.GIB", 10**6)
    disk.free.bytes = 20_000_000
    with pytest.raises(UserError) as refused:
        disk.check()
    message = str(refused.value)
    assert f"--out {disk.out}: 3 checkpoints of 12.0 GiB and exports of 2.0 GiB need 38.0 GiB" in message
    assert "but 20.0 GiB are free" in message
    assert "keep_last (2)" in message
    assert "\n" not in message
    disk.free.bytes = 26_000_000
    disk.check(CheckpointSection(every=10, keep_last=1, keep_best=False))


def test_a_moving_average_is_exported_too():
    assert [exported_bytes_per_parameter(precision, None) for precision in ("auto", "bf16", "fp32")] == [2, 2, 4]
    assert [exported_bytes_per_parameter(precision, 0.999) for precision in ("auto", "bf16", "fp32")] == [4, 4, 8]


@pytest.fixture
def room_of(base_model, prepared, tmp_path, monkeypatch):
    """need_gib of a run with these options, from open_inputs, with GiB that show a tiny model."""
    asked = {}

    def check(*args, **options):
        asked.update(check_disk(*args, **options))

    monkeypatch.setattr("sft.retention.GIB", 1)
    monkeypatch.setattr("sft.inputs.check_disk", check)

    def of(**options):
        config = RunConfig(
            model={"path": str(base_model)}, data={"train": str(prepared / "train")}, out=str(tmp_path / "run"),
            train={"max_steps": 1, **options},
        )  # fmt: skip
        open_inputs(config, world_size=1)
        return asked["need_gib"]

    return of


def test_a_moving_average_needs_room_in_the_checkpoint_and_as_an_export(room_of, base_model):
    assert room_of() == 14 * num_parameters(base_model)
    assert room_of(ema_decay=0.999) == (16 + 2 * 2) * num_parameters(base_model)


def put(folder, num_bytes):
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(num_bytes))


@pytest.mark.parametrize(
    ("where", "counts"),
    [
        ("checkpoints/step-00000010", True),
        ("checkpoints/step-00000020.partial", True),
        ("checkpoints/step-00000020.deleted", True),
        ("export", True),
        ("export.partial", True),
        ("export-ema", True),
        ("export-ema.partial", True),
        ("checkpoints/step-00000010.damaged", False),
        ("export-step-00000010", False),
        ("wandb", False),
    ],
)
def test_what_the_run_replaces_counts_as_room(disk, where, counts):
    put(disk.out / where, 1000)
    disk.free.bytes = NEED - 1000
    if counts:
        disk.check()
    else:
        with pytest.raises(UserError, match="are free"):
            disk.check()


def test_checkpoints_that_a_lower_keep_last_will_drop_still_need_their_place(disk):
    """Five are there, and none goes before the sixth is complete."""
    for step in (10, 20, 30, 40, 50):
        saved.save(disk.out / "checkpoints", step)
    there = sum(file.stat().st_size for file in (disk.out / "checkpoints").rglob("*"))
    disk.free.bytes = 6 * 12 * ELEMENTS + 2 * ELEMENTS
    assert disk.check(CheckpointSection(every=10, keep_last=1, keep_best=False))["checkpoints"] == 6
    disk.free.bytes = NEED - there
    with pytest.raises(UserError, match=re.escape("6 checkpoints")):
        disk.check(CheckpointSection(every=10, keep_last=1, keep_best=False))


def test_a_checkpoint_is_as_large_as_predicted(tmp_path):
    """Three fp32 tensors of each parameter; the rest is headers."""
    elements = sum(saved.NUMEL.values())
    size = sum(path.stat().st_size for path in saved.save(tmp_path, 1).iterdir())
    each = bytes_per_parameter(OptimSection(), None)
    assert each == 12
    assert 0 < size - each * elements < 4000
