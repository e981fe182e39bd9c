"""Loading models: what transformers would fill in at random is refused. Run: pytest tests/unit/test_pretrained.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.errors import UserError, run_command
from sft.pretrained import choose_dtype, load_causal_lm


def load(folder):
    return load_causal_lm(folder, dtype=torch.float32, attention="sdpa")


def damaged(tmp_path, base_model, change):
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    change(folder)
    return folder


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_the_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def leave_a_layer_out(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))


def name_no_activation(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "nonsense"}))


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_tensor, "lack 1 tensors of the architecture, first model.norm.weight"),
        (change_the_width, r"mlp.down_proj.weight is \[32, 64\] in the weights and \[32, 128\] by config.json"),
        (leave_a_layer_out, "tensors that config.json leaves out, first model.layers.1.*is num_hidden_layers right"),
        (name_no_activation, "cannot be loaded: KeyError: 'nonsense'; check config.json"),
        (cut_short, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .*safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, base_model, change, message, capsys):
    with pytest.raises(UserError, match=message) as caught:
        load(damaged(tmp_path, base_model, change))
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capsys.readouterr().err


def test_control_the_undamaged_folder_loads(base_model):
    assert load(base_model).model.norm.weight.shape == (32,)


def test_out_of_memory_is_no_mistake_of_the_user(monkeypatch, base_model):
    def fail(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(base_model)


def test_explicit_precision_is_taken_as_it_is():
    cpu = torch.device("cpu")
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    assert choose_dtype("fp32", cpu) == torch.float32


def test_file_system_errors_are_one_line(tmp_path, capsys):
    def main(_argv):
        (tmp_path / ("x" * 300)).write_text("")

    assert run_command(main, []) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert len(error.splitlines()) == 1
