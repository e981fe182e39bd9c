"""What stands beside exported weights. Run: pytest tests/unit/test_hf_folder.py"""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from sft.errors import UserError
from sft.hf_folder import _plan_files, _write_generation_config, export_checkpoint, prove_export, write_config
from sft.model_shards import same_ids
from sft.tokenizer import load_tokenizer
from tests.tiny import SHARED


def generation(tmp_path, base_model, settings, stop_id=2):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base_model, base)
    out.mkdir()
    (base / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings))
    _write_generation_config(base, out, stop_id)
    GenerationConfig.from_pretrained(out).validate(strict=True)
    return json.loads((out / "generation_config.json").read_text())


def test_llama2s_sampling_values_do_not_lose_the_run(tmp_path, base_model):
    """temperature and top_p without do_sample: transformers refuses to save that."""
    written = generation(
        tmp_path, base_model, {"temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": 2}
    )
    assert "temperature" not in written
    assert written["max_length"] == 4096
    assert written["eos_token_id"] == 2


IDENTITY = {"chat_template": None, "stop_id": 2}


def base_with(tmp_path, base_model, file, content):
    base = shutil.copytree(base_model, tmp_path / "base")
    (base / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return base


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "bos_token_id": 1, "eos_token_id": 2},
        {"temperature": 0.6, "top_p": 0.9, "max_length": 4096, "pad_token_id": 0},
        {"temperature": 0.6, "do_sample": True},
        {},
    ],
)
def test_published_generation_settings_can_be_exported(tmp_path, base_model, settings):
    prove_export(base_with(tmp_path, base_model, "generation_config.json", settings), IDENTITY)


def test_control_transformers_refuses_to_save_llama2s_settings(tmp_path):
    settings = GenerationConfig(temperature=0.9, top_p=0.6, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        settings.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", "{"),
        ("generation_config.json", [1, 2]),
        ("generation_config.json", {"eos_token_id": [[7]]}),
        ("generation_config.json", {"max_new_tokens": -5}),
        ("generation_config.json", {"cache_implementation": "no such"}),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("config.json", "{"),
        ("config.json", {"model_type": "no such"}),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, base_model, file, content):
    base = base_with(tmp_path, base_model, file, content)
    with pytest.raises(UserError) as refused:
        prove_export(base, IDENTITY)
    message = str(refused.value)
    assert "\n" not in message
    assert str(base) in message
    assert len(message) < 600


def test_control_an_untouched_base_can_be_exported(base_model):
    before = {path.name: path.read_bytes() for path in base_model.iterdir()}
    prove_export(base_model, IDENTITY)
    assert {path.name: path.read_bytes() for path in base_model.iterdir()} == before


def test_a_bare_sentencepiece_folder_can_be_exported(tmp_path, base_model):
    """Llama-2 as Meta ships it: tokenizer.model alone, beside a config that says what it cannot."""
    if not (SHARED / "tokenizers" / "llama2" / "tokenizer.model").is_file():
        pytest.skip("needs ../shared/tokenizers/llama2/tokenizer.model")
    base = shutil.copytree(base_model, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    shutil.copyfile(SHARED / "tokenizers" / "llama2" / "tokenizer.model", base / "tokenizer.model")
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    prove_export(base, IDENTITY)
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say whether texts start with BOS"):
        prove_export(base, IDENTITY)


def test_sampling_values_stay_where_they_are_used(tmp_path, base_model):
    written = generation(tmp_path, base_model, {"temperature": 0.6, "do_sample": True})
    assert written["temperature"] == 0.6


@pytest.mark.parametrize(
    ("before", "after"), [(None, 2), ({}, 2), ({"eos_token_id": 7}, [2, 7]), ({"eos_token_id": [7, 2]}, [2, 7])]
)
def test_the_trained_stop_token_comes_first(tmp_path, base_model, before, after):
    assert generation(tmp_path, base_model, before)["eos_token_id"] == after


def test_config_names_the_dtype_once(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"torch_dtype": "float16", "hidden_size": 4}))
    write_config(tmp_path / "base", tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "bfloat16", "hidden_size": 4}


def test_files_are_filled_up_to_the_limit_in_order():
    shapes = {"a": [4], "b": [4], "c": [100], "d": [2], "e": [2]}
    assert _plan_files(shapes, itemsize=2, max_bytes=16) == [["a", "b"], ["c"], ["d", "e"]]


def test_an_existing_folder_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        export_checkpoint(tmp_path / "step-00000001", tmp_path, tmp_path / "out")


def test_a_tokenizer_with_other_bytes_but_equal_ids_is_the_same(base_model):
    tokenizer = load_tokenizer(base_model)
    made_with = {"vocab_size": 259, "bos_id": 1, "eos_id": 2, "probe": [{"text": "ab", "ids": [100, 101]}]}
    assert same_ids(made_with, tokenizer)
    assert not same_ids({**made_with, "probe": [{"text": "ab", "ids": [101, 100]}]}, tokenizer)
    assert not same_ids({**made_with, "bos_id": None}, tokenizer)


def test_a_chat_templates_stop_token_comes_before_eos(tmp_path, base_model):
    assert generation(tmp_path, base_model, None, stop_id=7)["eos_token_id"] == [7, 2]
