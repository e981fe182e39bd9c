"""Models between two: every tensor by hand, and what is refused before anything is written.

Run: pytest tests/unit/test_merge.py
"""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft import hf_folder
from sft.errors import UserError, run_command
from sft.interpolation import interpolate
from sft.merge import main
from tests import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models base and tuned (fp32, untied), tied-base and tied-tuned; their weights differ."""
    folder = tmp_path_factory.mktemp("merge")
    for index, name in enumerate(("base", "tuned")):
        tiny.make_model(folder / name, seed=index)
        tiny.make_model(folder / f"tied-{name}", seed=index, tie_word_embeddings=True)
    (folder / "tuned" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def copies(world, tmp_path):
    """Folders base and tuned that a test may change."""
    return tuple(shutil.copytree(world / name, tmp_path / name) for name in ("base", "tuned"))


def merge(base, tuned, alpha, out, **options):
    flags = {"base": base, "tuned": tuned, "alpha": alpha, "out": out, **options}
    main([text for name, value in flags.items() for text in (f"--{name}", str(value))])


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_dtype(folder, out, dtype):
    """A copy with weights and config in another dtype."""
    shutil.copytree(folder, out)
    save_file({name: tensor.to(dtype) for name, tensor in weights(folder).items()}, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return out


def largest_error(found, base, tuned, alpha):
    """Largest difference from (1 - alpha) base + alpha tuned in fp64."""
    assert found.keys() == tuned.keys()
    expected = {name: (1 - alpha) * base[name].double() + alpha * tuned[name].double() for name in base}
    return max(float((found[name].double() - expected[name]).abs().max()) for name in expected)


# The numbers


def test_by_hand():
    base, tuned = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 2.0, 0.5])
    assert interpolate(base, tuned, 0.25).tolist() == [1.5, -1.0, 0.5]
    assert interpolate(base, tuned, 0.75).tolist() == [2.5, 1.0, 0.5]


def test_the_ends_and_equal_weights_are_exact():
    base, tuned = torch.tensor([0.1, -0.0, float("inf")]), torch.tensor([-0.0, 0.3, 1.0])
    for alpha, expected in ((0.0, base), (1.0, tuned)):
        found = interpolate(base, tuned, alpha)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), alpha
    same = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    alphas = [index / 97 for index in range(98)]
    assert all(torch.equal(interpolate(same, same, alpha), same) for alpha in alphas)
    assert not all(torch.equal((1 - alpha) * same + alpha * same, same) for alpha in alphas), "control"


def test_bf16_weights_are_computed_in_fp32_and_rounded_once():
    base, tuned = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    exact = 0.7 * base.double() + 0.3 * tuned.double()

    def worst(found):
        return float(((found.bfloat16().double() - exact) / exact).abs().max())

    rounding = 2**-8 * 1.001
    assert worst(interpolate(base, tuned, 0.3)) < rounding
    assert worst(0.7 * base + 0.3 * tuned) > rounding, "control: computed in bf16"


def test_what_is_no_floating_point_tensor_is_the_tuned_models():
    assert interpolate(torch.tensor([1]), torch.tensor([4]), 0.5).tolist() == [4]


# The folder


@pytest.mark.parametrize("kind", ["", "tied-"], ids=["untied", "tied"])
def test_a_merged_folder(world, tmp_path, kind):
    base, tuned = world / f"{kind}base", world / f"{kind}tuned"
    merge(base, tuned, 0.7, tmp_path / "out")
    ends = weights(base), weights(tuned)
    assert largest_error(weights(tmp_path / "out"), *ends, 0.7) < 1e-7
    assert largest_error(weights(tmp_path / "out"), *ends, 0.3) > 0.01, "control: alpha the wrong way round"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_config_tokenizer_and_template_are_the_tuned_models(world, tmp_path, copies):
    base, tuned = copies
    config = json.loads((tuned / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "generation_config.json").write_text('{"eos_token_id": [7, 2], "temperature": 0.6}')
    merge(base, tuned, 0.5, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    (tuned / "generation_config.json").unlink()
    merge(base, tuned, 0.5, tmp_path / "without")
    assert not (tmp_path / "without" / "generation_config.json").exists()


def test_what_it_is_made_of_is_written_down(world, tmp_path, copies):
    base, tuned = copies
    (tuned / "export.json").write_text('{"what": "weights", "run": "alpaca"}')
    merge(base, tuned, 0.5, tmp_path / "out", dtype="bf16")
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (told["what"], told["alpha"], told["dtype"]) == ("merge", 0.5, "bfloat16")
    assert told["base"] == {"folder": "base", "of": None}
    assert told["tuned"] == {"folder": "tuned", "of": {"what": "weights", "run": "alpaca"}}
    assert set(told["versions"]) == {"sft", "torch", "transformers"}
    assert str(tmp_path) not in json.dumps(told), "no path of this disk"


def test_a_sweep_has_base_and_tuned_at_its_ends(world, tmp_path, capsys):
    merge(world / "base", world / "tuned", "0,0.25,1", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpha-0", "alpha-0.25", "alpha-1"]
    base, tuned = weights(world / "base"), weights(world / "tuned")
    for name, expected in (("alpha-0", base), ("alpha-1", tuned)):
        found = weights(tmp_path / "out" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].view(torch.int32), expected[key].view(torch.int32)) for key in expected)
    assert largest_error(weights(tmp_path / "out" / "alpha-0.25"), base, tuned, 0.25) < 1e-7
    out, told = tmp_path / "out", capsys.readouterr().out
    assert f"merged 0.75 x {world}/base + 0.25 x {world}/tuned into {out}/alpha-0.25" in told
    models = f"{out}/alpha-0,{out}/alpha-0.25,{out}/alpha-1,{world}/tuned"
    assert f"sft drift --base {world}/base --tuned {models} --out {out}-drift --data" in told
    assert f"sft eval --model {out}/alpha-0 --out {out}-eval --data" in told


def test_several_files_on_both_sides(world, tmp_path, copies):
    """Read through an index, whose files are cut elsewhere than those that are written."""
    base, tuned = copies
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="60KB")
    (base / "model.safetensors").unlink()
    merge(base, tuned, 0.7, tmp_path / "out", max_shard_gb=4e-5)
    assert len(list(base.glob("*.safetensors"))) > 2
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in found.values())
    assert index["weight_map"].keys() == found.keys()
    assert largest_error(found, weights(world / "base"), weights(tuned), 0.7) < 1e-7


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype", "wanted", "expected"),
    [
        (torch.bfloat16, torch.float32, "auto", torch.float32),
        (torch.float32, torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, "fp32", torch.float32),
        (torch.float16, torch.float16, "auto", torch.float16),
    ],
)
def test_dtypes(world, tmp_path, base_dtype, tuned_dtype, wanted, expected):
    base = in_dtype(world / "base", tmp_path / "b", base_dtype)
    tuned = in_dtype(world / "tuned", tmp_path / "t", tuned_dtype)
    merge(base, tuned, 0.7, tmp_path / "out", dtype=wanted)
    found, ends = weights(tmp_path / "out"), (weights(base), weights(tuned))
    assert {tensor.dtype for tensor in found.values()} == {expected}
    for name in found:
        once = torch.lerp(ends[0][name].float(), ends[1][name].float(), 0.7).to(expected)
        assert torch.equal(found[name], once), name


def test_control_a_changed_tensor_is_not_published(world, tmp_path, monkeypatch):
    def damaged(tensors, path, metadata):
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] + 1e-3}, path, metadata=metadata)

    monkeypatch.setattr(hf_folder, "save_file", damaged)
    with pytest.raises(UserError, match=r"loads back different from 0\.3 x .*base \+ 0\.7 x .*tuned"):
        merge(world / "base", world / "tuned", 0.7, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(world, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf_folder, "save_file", full)
    with pytest.raises(UserError, match=r"out.partial/model.safetensors: .*No space left on device.*free disk space"):
        merge(world / "base", world / "tuned", 0.7, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_told_as_such(world, tmp_path, copies):
    tensors = weights(copies[1])
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copies[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight of .* holds NaN"):
        merge(world / "base", copies[1], 0.7, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", ["true", "[true]"])
def test_yes_is_no_alpha(world, tmp_path, alpha):
    with pytest.raises(UserError, match="--alpha"):
        merge(world / "base", world / "tuned", alpha, tmp_path / "out")


def test_one_file_is_held_at_a_time(world, tmp_path, monkeypatch):
    sizes = []

    def measured(tensors, path, metadata):
        sizes.append(sum(tensor.numel() * 4 for tensor in tensors.values()))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(hf_folder, "save_file", measured)
    merge(world / "base", world / "tuned", 0.7, tmp_path / "out", max_shard_gb=4e-5)
    assert max(sizes) <= 40_000
    assert sum(sizes) > 120_000, "control: the model does not fit into one file"


# What is refused


def refused(tmp_path, base, tuned, alpha=0.5, out="out", **options):
    """The one line that the command ends with, code 2; nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        merge(base, tuned, alpha, tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "0.2,1.01", "nan", "half", "", "0.5,0.50"])
def test_alpha_outside_0_to_1(world, tmp_path, alpha):
    line = refused(tmp_path, world / "base", world / "tuned", alpha)
    assert "alpha" in line
    assert alpha in ("", "0.5,0.50") or alpha.split(",")[-1] in line


def test_the_exit_code_is_2(world, tmp_path, capsys):
    flags = ["--base", str(world / "base"), "--tuned", str(world / "tuned"), "--out", str(tmp_path / "out")]
    assert run_command(main, [*flags, "--alpha", "2"]) == 2
    assert capsys.readouterr().err == "error: --alpha.0: got 2, must be less than or equal to 1\n"
    assert run_command(main, [*flags, "--alpha", "1"]) == 0, "control"


def test_one_folder_for_both(world, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(world / "base")
    assert "is the folder of --base, too" in refused(tmp_path, world / "base", link)


@pytest.mark.parametrize("alpha", ["0.5", "0.25,0.5"])
def test_an_existing_out(world, tmp_path, alpha):
    (tmp_path / "out" / "alpha-0.5").mkdir(parents=True)
    assert "exists; remove it or choose another --out" in refused(tmp_path, world / "base", world / "tuned", alpha)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"intermediate_size": 48}, "model.layers.0.mlp.gate_proj.weight is [48, 32], and [64, 32] in --base"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is [300, 32], and [259, 32] in --base"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is [32, 32], and missing in --base"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight is missing, and [32, 32] in --base"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_attention_heads is 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True by its config.json, and False by that of --base"),
        ({"rope_theta": 5e5}, "rope_parameters is {'rope_theta': 500000.0"),
    ],
)
def test_another_architecture(world, tmp_path, changed, said):
    line = refused(tmp_path, world / "base", tiny.make_model(tmp_path / "other", **changed))
    assert said in line
    assert "give the folder that training started from as --base" in line


def rewrite(folder, change):
    """Change the dictionary of tensors in place."""
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "its weights lack model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "its weights hold extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            "model.norm.weight is [31] in the weights and [32] by config.json",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
@pytest.mark.parametrize("side", [0, 1], ids=["base", "tuned"])
def test_weights_that_are_not_whole(tmp_path, copies, change, said, side):
    rewrite(copies[side], change)
    line = refused(tmp_path, *copies)
    assert f"--{('base', 'tuned')[side]} {copies[side]}: {said}" in line


def test_old_conversions_and_second_copies_are_passed_over(world, tmp_path):
    base = shutil.copytree(world / "tied-base", tmp_path / "base")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(base, lambda tensors: tensors.update(frequencies))
    rewrite(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    merge(base, world / "tied-tuned", 0, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(world / "tied-base").keys()
    rewrite(base, lambda tensors: tensors["lm_head.weight"].add_(1))
    line = refused(tmp_path, base, world / "tied-tuned", out="other")
    assert "lm_head.weight is not model.embed_tokens.weight, though config.json ties them" in line


def test_another_vocabulary_of_the_same_size(tmp_path, copies):
    base, tuned = copies
    content = json.loads((tuned / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    line = refused(tmp_path, base, tuned)
    assert f"its tokenizer has id {vocab['a']} for 'a', and that of --base {base} {vocab['b']}" in line


def test_further_tokens_of_the_tuned_model_are_no_other_vocabulary(tmp_path):
    base, tuned = (tiny.make_model(tmp_path / name, seed=index, vocab_size=264) for index, name in enumerate("bt"))
    content = json.loads((tuned / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 259, "content": "<|im_end|>"})
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    merge(base, tuned, 0.5, tmp_path / "out")
    assert "<|im_end|>" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_too_small_a_disk(world, tmp_path, monkeypatch):
    num_bytes = sum(4 * tensor.numel() for tensor in weights(world / "tuned").values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("sft.interpolation.shutil.disk_usage", lambda _: usage(0, 0, 2 * num_bytes - 1))
    line = refused(tmp_path, world / "base", world / "tuned", "0.2,0.5")
    assert "2 merged models" in line
    merge(world / "base", world / "tuned", 0.2, tmp_path / "one")  # control: there is room for one
    monkeypatch.setattr("sft.interpolation.shutil.disk_usage", lambda _: usage(0, 0, 2 * num_bytes))
    merge(world / "base", world / "tuned", "0.2,0.5", tmp_path / "both")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_folder_that_is_no_whole_model(tmp_path, copies, file, damage):
    base, tuned = copies
    if damage == "gone":
        (tuned / file).unlink()
    else:
        content = (tuned / file).read_bytes()
        (tuned / file).write_bytes(content[: len(content) // 2])
    assert str(tuned) in refused(tmp_path, base, tuned)


def test_a_torn_index_is_told_by_the_option_that_named_it(tmp_path, copies):
    base, tuned = copies
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text("{}")
    assert refused(tmp_path, base, tuned).startswith(f"--base {base}/model.safetensors.index.json: is no index")


def test_files_are_written_as_torch_writes_them(world, tmp_path):
    merge(world / "base", world / "tuned", 0.5, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
