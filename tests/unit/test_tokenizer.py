"""One tokenizer for every job, and sentencepiece's own ids where the folder holds nothing else.

Run: pytest tests/unit/test_tokenizer.py
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sft import tokenizer as module
from sft.errors import UserError
from sft.tokenizer import load_sentencepiece, load_tokenizer
from tests import tiny
from tests.prep_support import byte_bpe_tokenizer, sentencepiece_tokenizer


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


NONSENSE = {
    "config.json": ["{", "[]", '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "llama", "dtype": "x"}'],
    "tokenizer_config.json": ["{", "[]", "[" * 5000, '{"tokenizer_class": 5}', '{"model_max_length": "x"}'],
    "special_tokens_map.json": ["[]"],
    "tokenizer.json": ["{", "{}", "[]"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in NONSENSE for content in NONSENSE[name]])
def test_a_nonsense_file_is_one_line(base_model, tmp_path, name, content):
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    load_tokenizer(copy)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match="cannot load it, check its tokenizer files") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_neither_run_nor_offered(base_model, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    (copy / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(UserError, match="custom code"):
        load_tokenizer(copy)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def bare(tmp_path):
    """A folder with a tokenizer.model alone, as Meta ships Llama-2."""
    folder = sentencepiece_tokenizer(tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    "config", [None, {}, {"bos_token": "<s>", "eos_token": "</s>"}, {"add_bos_token": None}, {"add_bos_token": "yes"}]
)
def test_a_bare_model_must_say_whether_texts_start_with_bos(bare, config):
    if config is not None:
        (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match='write {"add_bos_token": true}') as caught:
        load_tokenizer(bare)
    assert str(bare / "tokenizer_config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_model_starts_texts_as_it_says(bare):
    config = bare / "tokenizer_config.json"
    config.write_text('{"add_bos_token": true}')  # what the error says to write is enough
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos, tokenizer.eos_id) == ((1,), 2)
    assert tokenizer.sentencepiece is not None
    config.write_text('{"add_bos_token": false}')
    assert load_tokenizer(bare).bos == ()
    config.write_text('{"add_bos_token": true, "bos_token": null}')
    with pytest.raises(UserError, match="bos_token names no token"):
        load_tokenizer(bare)


def test_a_torn_sentencepiece_model_is_one_line(bare):
    model = bare / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:50])
    with pytest.raises(UserError, match="sentencepiece cannot read it"):
        load_sentencepiece(model)


@pytest.mark.skipif(not tiny.SHARED.is_dir(), reason="the shared tokenizers are not beside this checkout")
def test_llama2s_bare_model_gives_sentencepieces_ids():
    tokenizer = load_tokenizer(tiny.SHARED / "tokenizers" / "llama2")
    text = "def f():\n    return 1"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.sentencepiece.encode(text)
    assert ids != tokenizer.hf.encode(text, add_special_tokens=False), "control: transformers' conversion differs here"


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """An empty cache; its entries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache").rglob("*.facts"))


@pytest.fixture
def loads(monkeypatch):
    """Folders that transformers has loaded."""
    load, seen = module._load_hf, []
    monkeypatch.setattr(module, "_load_hf", lambda path: seen.append(path) or load(path))
    return seen


LOAD = """
import sys
from sft.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
assert tokenizer.encode("ab") == [100, 101]
print("transformers" in sys.modules)
"""


def test_the_second_process_does_not_import_transformers(base_model, entries):
    def started():
        return subprocess.run([sys.executable, "-c", LOAD, str(base_model)], capture_output=True, text=True, check=True)

    assert started().stdout.strip() == "True"
    assert len(entries()) == 1
    assert started().stdout.strip() == "False"


def facts(tokenizer):
    names = ("digest", "vocab_size", "bos", "eos_id", "unk_id", "special_ids")
    text = "a </s> b\n\n<s>é🙂 \u3000x"
    ids = tokenizer.encode(text)
    backend = (tokenizer.backend.to_str(), tokenizer.backend.encode_special_tokens)
    return [*(getattr(tokenizer, name) for name in names), ids, tokenizer.decode(ids), backend]


@pytest.mark.parametrize("make", [tiny.make_tokenizer, byte_bpe_tokenizer, sentencepiece_tokenizer])
def test_what_is_kept_equals_a_fresh_load(tmp_path, entries, loads, make):
    folder = make(tmp_path / "tokenizer")
    fresh = load_tokenizer(folder)
    again = load_tokenizer(folder)
    assert len(loads) == 1
    assert facts(again) == facts(fresh)
    hf = again.hf
    assert hf.backend_tokenizer.to_str() == again.backend.to_str()
    assert (hf.eos_token_id, hf.unk_token_id, len(hf)) == (again.eos_id, again.unk_id, again.vocab_size)
    assert set(hf.all_special_ids) == again.special_ids
    assert again.bos == ((hf.bos_token_id,) if hf.encode("a")[0] == hf.bos_token_id else ())
    text = "a </s> b\n\n<|end|>é🙂"
    assert again.sentencepiece or again.encode(text) == hf.encode(text, add_special_tokens=False)


def test_a_changed_file_is_another_entry(base_model, tmp_path, entries, loads):
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    load_tokenizer(copy)
    load_tokenizer(base_model)
    assert (len(entries()), len(loads)) == (1, 1), "equal files in another folder are the same entry"
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "</s>"', '"eos_token": "<unk>"'))
    assert load_tokenizer(copy).eos_id == 0
    assert load_tokenizer(base_model).eos_id == 2
    assert (len(entries()), len(loads)) == (2, 2)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"null", b"{}", b'{"bos": 3}', b"\xff\xfe", "half", "other"]
)
def test_a_corrupt_entry_is_made_again(base_model, entries, loads, content):
    expected = facts(load_tokenizer(base_model))
    [entry] = entries()
    whole = entry.read_bytes()
    made = {"half": whole[: len(whole) // 2], "other": whole.replace(b'"eos_id": 2', b'"eos_id": 1')}
    assert made["other"] != whole
    entry.write_bytes(made[content] if isinstance(content, str) else content)
    assert facts(load_tokenizer(base_model)) == expected
    assert len(loads) == 2
    assert entry.read_bytes() == whole
    load_tokenizer(base_model)
    assert len(loads) == 2, "control: a whole entry is used"


def test_a_cache_that_cannot_be_written_is_no_error(base_model, tmp_path, monkeypatch, loads):
    """A file stands where the folder should be: not even root can write there."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_tokenizer(base_model).eos_id == 2
    assert load_tokenizer(base_model).eos_id == 2
    assert len(loads) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_cache_is_no_error(base_model, tmp_path, monkeypatch, loads):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_tokenizer(base_model).eos_id == 2
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(loads) == 1


def test_tests_keep_out_of_the_users_cache(cache):
    assert os.environ["XDG_CACHE_HOME"] == str(cache)
    assert Path.home() not in cache.parents
