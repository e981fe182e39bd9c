"""Exports of a moving average and of the mean of checkpoints, by hand; without any ranks.

Run: pytest tests/unit/test_weight_sources.py
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft import checkpoint
from sft.checkpoint import CONSTANT, Piece
from sft.config import RunConfig
from sft.errors import UserError, run_command
from sft.export import main
from sft.hf_folder import export_checkpoint, verify_export
from sft.settings import to_yaml
from sft.weight_sources import from_mean
from sft.zero_state import EMA
from tests import tiny

FROZEN = "model.norm.weight"
TOTAL_STEPS = 4
IDENTITY = {"chat_template": None, "stop_id": 2, "total_steps": TOTAL_STEPS}
NUMBER = 7
"""Of a whole-number buffer, beside the model's own tensors."""


def values(step: int, name: str, shape: list[int], state: str) -> torch.Tensor:
    """What a checkpoint of this step holds of a tensor: random, another for every state."""
    generator = torch.Generator().manual_seed(len(name) * 1000 + step * 10 + (state == EMA))
    return torch.randn(shape, generator=generator)


def save(run, step: int, shapes: dict[str, list[int]], states: list[str], identity: dict) -> None:
    """A checkpoint of two ranks, cut in the middle of every tensor; FROZEN is a constant, the same at every step."""
    partial = checkpoint.partial_folder(run / "checkpoints", step)
    partial.mkdir(parents=True)
    pieces: list[list[Piece]] = [[], []]
    for name, shape in shapes.items():
        frozen = name == FROZEN
        for state in [CONSTANT] if frozen else states:
            flat = values(0 if frozen else step, name, shape, "fp32" if frozen else state).flatten()
            cut = flat.numel() // 2
            pieces[0].append(Piece(name, state, 0, flat[:cut]))
            pieces[1].append(Piece(name, state, cut, flat[cut:]))
    names = [checkpoint.rank_file(rank, 2) for rank in range(2)]
    files = {
        name: checkpoint.write_pieces(partial / name, of_rank) for name, of_rank in zip(names, pieces, strict=True)
    }
    meta = {"shapes": shapes, "identity": identity, "dtype": "float32", "heldout_loss": None, "files": files}
    checkpoint.publish(run / "checkpoints", step, meta)


def make_run(folder, base, steps=(1, 2, 4), states=("fp32", EMA), change_identity_at=None):
    """A run folder whose checkpoints are crafted."""
    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    run = folder / "run"
    for step in steps:
        identity = IDENTITY | ({"data_seed": 1} if step == change_identity_at else {})
        save(run, step, shapes, list(states), identity)
    config = RunConfig.model_validate({"model": {"path": str(base)}, "data": {"train": "x"}, "out": str(run)})
    (run / "config.yaml").write_text(to_yaml(config))
    return run, shapes


@pytest.fixture(scope="module")
def made(tmp_path_factory, base_model):
    return make_run(tmp_path_factory.mktemp("sources"), base_model)


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may write to."""
    return shutil.copytree(made[0], tmp_path / "run")


def exported(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def mean(steps, shapes):
    """The mean over these steps in fp64."""
    found = {}
    for name, shape in shapes.items():
        parts = [values(0 if name == FROZEN else step, name, shape, "fp32").double() for step in steps]
        found[name] = (sum(parts) / len(steps)).float()
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def made_of(folder):
    return json.loads((folder / "export.json").read_text())


def refused(capsys, *flags):
    """The one line of a command that ends with code 2."""
    assert run_command(main, [str(flag) for flag in flags]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_the_weights_as_before(run, made):
    main([str(run)])
    assert_equal(exported(run / "export"), mean([4], made[1]))
    assert made_of(run / "export")["what"] == "weights"


def test_the_moving_average(run, made, capsys):
    main([str(run), "--ema"])
    shapes = made[1]
    expected = {name: values(4, name, shape, EMA) for name, shape in shapes.items()}
    expected[FROZEN] = values(0, FROZEN, shapes[FROZEN], "fp32")
    assert_equal(exported(run / "export-ema"), expected)
    assert not torch.equal(expected["lm_head.weight"], values(4, "lm_head.weight", shapes["lm_head.weight"], "fp32"))
    assert (
        f"exported the moving average in {run}/checkpoints/step-00000004 to {run}/export-ema" in capsys.readouterr().out
    )
    AutoModelForCausalLM.from_pretrained(run / "export-ema")


@pytest.mark.parametrize(("count", "steps"), [(2, [2, 4]), (3, [1, 2, 4])])
def test_the_mean_of_the_last_checkpoints(run, made, count, steps, capsys):
    main([str(run), "--average", str(count)])
    found = exported(run / f"export-average-{count}")
    assert_equal(found, mean(steps, made[1]))
    others = mean([1, 4] if count == 2 else [2, 4], made[1])
    assert not torch.equal(found["lm_head.weight"], others["lm_head.weight"]), "control: other checkpoints"
    assert f"the mean of the weights after steps {', '.join(map(str, steps))} to" in capsys.readouterr().out
    assert [entry["step"] for entry in made_of(run / f"export-average-{count}")["checkpoints"]] == steps


def test_what_it_is_made_of_is_written_down(run):
    main([str(run), "--average", "2", "--dtype", "bf16"])
    told = made_of(run / "export-average-2")
    digests = [checkpoint.digests(checkpoint.step_folder(run / "checkpoints", step))["meta.json"] for step in (2, 4)]
    assert (told["what"], told["run"], told["dtype"]) == ("mean", "run", "bfloat16")
    assert [entry["xxh3_128"] for entry in told["checkpoints"]] == digests
    assert set(told["versions"]) == {"sft", "torch", "transformers"}
    assert str(run.parent) not in json.dumps(told), "no path of this disk"


def test_a_mean_is_rounded_once_at_its_end(run, made):
    main([str(run), "--average", "3", "--dtype", "bf16", "--max_shard_gb", "4e-5"])
    expected = {name: tensor.bfloat16() for name, tensor in mean([1, 2, 4], made[1]).items()}
    assert_equal(exported(run / "export-average-3"), expected)
    parts = [values(step, "lm_head.weight", made[1]["lm_head.weight"], "fp32").bfloat16() for step in (1, 2, 4)]
    assert not torch.equal(sum(parts) / 3, expected["lm_head.weight"]), "control: rounded before"


def test_before_the_end_the_name_says_the_step(run):
    middle = run / "checkpoints" / "step-00000002"
    main([str(middle), "--ema"])
    main([str(middle), "--average", "2"])
    main([str(middle)])
    names = ["export-average-2-step-00000002", "export-ema-step-00000002", "export-step-00000002"]
    assert sorted(path.name for path in run.glob("export*")) == names
    told = made_of(run / "export-average-2-step-00000002")
    assert [entry["step"] for entry in told["checkpoints"]] == [1, 2], "none after the one that was named"


def test_an_earlier_export_is_verified_as_what_it_is(run, base_model, tmp_path):
    """What sft.train does with the average at the end of a run, and when it is started once more."""
    last = run / "checkpoints" / "step-00000004"
    export_checkpoint(last, base_model, tmp_path / "ema", ema=True)
    export_checkpoint(last, base_model, tmp_path / "weights")
    verify_export(last, tmp_path / "ema", ema=True)
    verify_export(last, tmp_path / "weights")
    with pytest.raises(UserError, match="loads back different from the moving average in"):
        verify_export(last, tmp_path / "weights", ema=True)
    with pytest.raises(UserError, match="loads back different"):
        verify_export(last, tmp_path / "ema")


def test_whole_numbers_are_the_last_checkpoints(tmp_path):
    """A mean of counters is none."""
    run = tmp_path / "run"
    for step in (1, 2):
        partial = checkpoint.partial_folder(run / "checkpoints", step)
        partial.mkdir(parents=True)
        counter = Piece("counter", CONSTANT, 0, torch.tensor([NUMBER * step]))
        files = {
            "rank-00000-of-00001.safetensors": checkpoint.write_pieces(partial / checkpoint.rank_file(0, 1), [counter])
        }
        checkpoint.publish(run / "checkpoints", step, {"shapes": {"counter": [1]}, "identity": {}, "files": files})
    source = from_mean(checkpoint.list_checkpoints(run / "checkpoints"))
    assert source.read("counter").tolist() == [2 * NUMBER]
    assert source.read("counter").dtype == torch.int64


# What is refused


def test_an_average_that_was_not_kept(tmp_path, base_model, capsys):
    run, _ = make_run(tmp_path, base_model, steps=(4,), states=("fp32",))
    line = refused(capsys, run, "--ema")
    assert "holds no moving average; train with train.ema_decay" in line
    assert not list(run.glob("export*"))
    main([str(run)])  # control


def test_more_checkpoints_than_there_are(run, capsys):
    line = refused(capsys, run, "--average", "4")
    assert "has 3 complete checkpoints up to step 4 (of steps 1, 2, 4)" in line
    assert "checkpoint.keep_last 4" in line
    (run / "checkpoints" / "step-00000002" / "COMPLETE").unlink()
    line = refused(capsys, run, "--average", "3")
    assert "has 2 complete checkpoints up to step 4 (of steps 1, 4)" in line
    assert "has 1 complete" in refused(capsys, run / "checkpoints" / "step-00000001", "--average", "2")
    assert not list(run.glob("export*"))


def test_both_at_once(run, capsys):
    assert "--ema with --average 2" in refused(capsys, run, "--ema", "--average", "2")
    assert "--average" in refused(capsys, run, "--average", "1")


def test_a_damaged_one_among_them(run, capsys):
    file = run / "checkpoints" / "step-00000002" / "rank-00000-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(capsys, run, "--average", "2")
    assert "step-00000002: rank-00000-of-00002.safetensors has digest" in line
    assert not list(run.glob("export*"))
    main([str(run)])  # control: the last one is whole


def test_one_of_another_run(tmp_path, base_model, capsys):
    run, _ = make_run(tmp_path, base_model, steps=(2, 4), change_identity_at=2)
    line = refused(capsys, run, "--average", "2")
    assert "step-00000002 has another run behind it than" in line
    assert "identity in meta.json differs" in line


def test_one_of_the_run_by_a_version_that_did_not_know_an_option(tmp_path, base_model, capsys):
    run, _ = make_run(tmp_path, base_model, steps=(2,))
    shapes = checkpoint.read_meta(run / "checkpoints" / "step-00000002")["shapes"]
    save(run, 3, shapes, ["fp32"], IDENTITY | {"optim.name": "adamw", "train.ema_decay": None})
    main([str(run), "--average", "2"])
    save(run, 4, shapes, ["fp32"], IDENTITY | {"optim.name": "lion", "train.ema_decay": None})
    assert "identity in meta.json differs" in refused(capsys, run, "--average", "2"), "control"


def test_one_of_another_model(tmp_path, base_model, capsys):
    run, _ = make_run(tmp_path, base_model, steps=(4,))
    other = tiny.make_model(tmp_path / "other", num_hidden_layers=1)
    smaller, _ = make_run(tmp_path / "elsewhere", other, steps=(2,))
    shutil.copytree(smaller / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002")
    assert "has another model behind it (shapes" in refused(capsys, run, "--average", "2").replace(
        f" than {run}/checkpoints/step-00000004", ""
    )


def test_an_existing_folder_is_told_before_anything_is_read(run, capsys):
    (run / "export-average-9").mkdir()
    assert "export-average-9: exists" in refused(capsys, run, "--average", "9")
