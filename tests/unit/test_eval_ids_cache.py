"""Token requests in the user's cache. Run: pytest tests/unit/test_eval_ids_cache.py"""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sft.errors import UserError
from sft.eval import ids_cache
from sft.eval.ids_cache import read_or_build
from sft.eval.requests import Prompting, build_requests
from sft.eval.tasks.item import Item
from sft.tokenizer import load_tokenizer
from tests import tiny

SHOTS = (("One?", "yes"), ("Zwei?", "größer"))
ITEMS = [
    Item("mmlu", "anatomy", number, "About.\n\n", SHOTS, f"Question {number}? ", ("A", "B b", " c", "é"), 0, "anatomy")
    for number in range(5)
]
PLAIN = Prompting()
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}é{% endfor %}[assistant]"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sft" / "requests"


@pytest.fixture
def folder(tmp_path):
    return tiny.make_tokenizer(tmp_path / "tok")


@pytest.fixture
def builds(monkeypatch):
    """Calls of the slow way."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return build_requests(*arguments)

    monkeypatch.setattr(ids_cache, "build_requests", counted)
    return calls


def contents(found):
    return (
        found.prompts,
        found.system_dropped,
        [(request.ctx_ids.tolist(), request.cont_ids.tolist()) for request in found.requests],
    )


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("chat", ["none", "multi_turn", "single_turn"])
def test_the_second_time_nothing_is_tokenised_and_all_is_equal(folder, cache, builds, chat):
    tokenizer = with_template(folder, CHAT)
    prompting = Prompting(chat=chat, system_instruction="Be brief.")
    expected = contents(build_requests(ITEMS, tokenizer, 500, prompting))
    first = read_or_build(ITEMS, tokenizer, 500, prompting)
    second = read_or_build(ITEMS, tokenizer, 500, prompting)
    assert len(builds) == 1
    assert contents(first) == contents(second) == expected
    assert len(list(cache.iterdir())) == 1
    assert {request.ctx_ids.dtype for request in second.requests} == {np.dtype(np.int32)}


def test_a_refused_system_message_is_remembered(folder, builds):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    tokenizer = with_template(folder, refuses)
    for _ in range(2):
        found = read_or_build(ITEMS, tokenizer, 500, Prompting(chat="multi_turn"))
        assert found.system_dropped
        assert "About." not in found.prompts[0]
    assert len(builds) == 1


def test_an_items_context_is_one_array(folder):
    tokenizer = load_tokenizer(folder)
    for _ in range(2):
        requests = read_or_build(ITEMS, tokenizer, 500, PLAIN).requests
        for start in range(0, len(requests), 4):
            assert len({id(request.ctx_ids) for request in requests[start : start + 4]}) == 1


def test_whatever_decides_the_ids_decides_the_entry(folder, tmp_path, builds):
    tokenizer = load_tokenizer(folder)
    without_bos = tiny.make_tokenizer(tmp_path / "plain")
    state = json.loads((without_bos / "tokenizer.json").read_text())
    (without_bos / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
    asked = [
        (ITEMS, tokenizer, PLAIN),
        (ITEMS[:4], tokenizer, PLAIN),
        ([replace(ITEMS[0], gold=1), *ITEMS[1:]], tokenizer, PLAIN),
        ([replace(ITEMS[0], shots=SHOTS[:1]), *ITEMS[1:]], tokenizer, PLAIN),
        (ITEMS, tokenizer, replace(PLAIN, compat="lm_eval<=0.4.9.1")),
        (ITEMS, tokenizer, replace(PLAIN, system_instruction="Be brief.")),
        (ITEMS, load_tokenizer(without_bos), PLAIN),
    ]
    for number, (items, tokens, prompting) in enumerate(asked * 2):
        found = read_or_build(items, tokens, 500, prompting)
        assert contents(found) == contents(build_requests(items, tokens, 500, prompting))
        assert len(builds) == min(number + 1, len(asked))


def test_a_copy_of_the_tokenizer_elsewhere_uses_the_same_entry(folder, tmp_path, builds):
    read_or_build(ITEMS, load_tokenizer(folder), 500, PLAIN)
    shutil.copytree(folder, tmp_path / "tuned")
    read_or_build(ITEMS, load_tokenizer(tmp_path / "tuned"), 500, PLAIN)
    assert len(builds) == 1


def test_what_config_json_makes_of_the_same_files_counts(folder, builds):
    """The facts that transformers found are other ones although no file of the tokenizer changed."""
    tokenizer = load_tokenizer(folder)
    read_or_build(ITEMS, tokenizer, 500, PLAIN)
    from tokenizers import Tokenizer, normalizers

    other = Tokenizer.from_str(tokenizer.backend.to_str())
    other.normalizer = normalizers.Lowercase()
    changed = replace(tokenizer, backend=other)
    assert changed.digest == tokenizer.digest
    found = read_or_build(ITEMS, changed, 500, PLAIN)
    assert contents(found) == contents(build_requests(ITEMS, changed, 500, PLAIN))
    assert len(builds) == 2


def test_the_context_length_is_checked_anew(folder, builds):
    tokenizer = load_tokenizer(folder)
    read_or_build(ITEMS, tokenizer, 500, PLAIN)
    with pytest.raises(UserError, match=r"anatomy item 0, choice 1: 5 tokens to score; need 1 to 3"):
        read_or_build(ITEMS, tokenizer, 3, PLAIN)
    assert len(builds) == 1


def alter_an_id(file):
    with np.load(file) as entry:
        arrays = dict(entry)
    arrays["ids"] = arrays["ids"] + (np.arange(len(arrays["ids"])) == 7)
    with file.open("wb") as stream:
        np.savez(stream, **arrays)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def pickled(file):
    with file.open("wb") as stream:
        np.savez(stream, sha256=np.array([{}], dtype=object), ids=np.zeros(1))


DAMAGES = {
    "torn": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("nothing"),
    "no digest": lambda file: np.savez(file, ids=np.zeros(3, dtype=np.int32)),
    "an array, no archive": lambda file: file.write_bytes(b"\x93NUMPY\x01\x00v\x00"),
    "altered with its checksums": alter_an_id,
    "a flipped bit": flip_a_byte,
    "pickle": pickled,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_anew(folder, cache, builds, damage):
    tokenizer = load_tokenizer(folder)
    expected = contents(read_or_build(ITEMS, tokenizer, 500, PLAIN))
    [file] = cache.iterdir()
    damage(file)
    assert contents(read_or_build(ITEMS, tokenizer, 500, PLAIN)) == expected
    assert len(builds) == 2
    assert contents(read_or_build(ITEMS, tokenizer, 500, PLAIN)) == expected
    assert len(builds) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(folder, tmp_path, builds, cache):
    tokenizer = load_tokenizer(folder)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file where the folder should be")
    for _ in range(2):
        assert contents(read_or_build(ITEMS, tokenizer, 500, PLAIN)) == contents(
            build_requests(ITEMS, tokenizer, 500, PLAIN)
        )
    assert len(builds) == 2


def test_an_interrupted_write_leaves_no_entry(folder, cache, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    read_or_build(ITEMS, load_tokenizer(folder), 500, PLAIN)
    assert list(cache.iterdir()) == []


def test_old_entries_go_those_in_use_stay(folder, cache, builds, monkeypatch):
    monkeypatch.setattr(ids_cache, "MAX_ENTRIES", 3)
    tokenizer = load_tokenizer(folder)
    for count in (1, 2, 3):
        read_or_build(ITEMS[:count], tokenizer, 500, PLAIN)
        for file in cache.iterdir():  # as if an hour had passed
            seconds = file.stat().st_mtime - 3600
            os.utime(file, (seconds, seconds))
    read_or_build(ITEMS[:1], tokenizer, 500, PLAIN)
    read_or_build(ITEMS[:4], tokenizer, 500, PLAIN)
    assert len(list(cache.iterdir())) == 3
    read_or_build(ITEMS[:1], tokenizer, 500, PLAIN)
    assert len(builds) == 4
    read_or_build(ITEMS[:2], tokenizer, 500, PLAIN)
    assert len(builds) == 5
