"""One tokenizer for every job, and sentencepiece's own ids where the folder holds nothing else.

Run: pytest tests/unit/test_tokenizer.py
"""

import json
import shutil

import pytest

from sft.errors import UserError
from sft.tokenizer import load_tokenizer
from tests import tiny


def test_ids_are_those_of_transformers_without_special_tokens(base_model):
    tokenizer = load_tokenizer(base_model)
    text = "aé b\n"
    assert tokenizer.encode(text) == tokenizer.hf.encode(text, add_special_tokens=False)
    assert tokenizer.encode_batch(["a", "", "bb"]) == [[100], [], [101, 101]]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_document_starts_and_ends_with(base_model, tmp_path):
    tokenizer = load_tokenizer(base_model)
    assert (tokenizer.bos, tokenizer.eos_id, tokenizer.vocab_size) == ((1,), 2, 259)
    shutil.copytree(base_model, tmp_path / "no-bos")
    description = json.loads((tmp_path / "no-bos" / "tokenizer.json").read_text())
    description["post_processor"] = None
    (tmp_path / "no-bos" / "tokenizer.json").write_text(json.dumps(description))
    assert load_tokenizer(tmp_path / "no-bos").bos == (), "a tokenizer that adds no BOS gets none from us"


def test_the_digest_covers_names_and_bytes(base_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    assert load_tokenizer(copy).digest == load_tokenizer(base_model).digest
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    assert load_tokenizer(copy).digest != load_tokenizer(base_model).digest


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "holds no tokenizer.json")])
def test_a_folder_without_tokenizer(tmp_path, make, message):
    if make:
        (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "folder")


def test_a_broken_file_is_one_line(base_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load it") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not tiny.SHARED.is_dir(), reason="the shared tokenizers are not beside this checkout")
def test_llama2s_bare_model_gives_sentencepieces_ids():
    tokenizer = load_tokenizer(tiny.SHARED / "tokenizers" / "llama2")
    text = "def f():\n    return 1"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.sentencepiece.encode(text)
    assert ids != tokenizer.hf.encode(text, add_special_tokens=False), "control: transformers' conversion differs here"
