"""The content key: it changes with everything that changes bytes, and with nothing else. The same job twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import blocks, build, identity, template
from sft.prep_options import PrepConfig, Source
from sft.settings import walk_options
from sft.tokenizer import load_tokenizer
from tests.prep_support import alpaca_rows, file_bytes, flags, prepare, refused, write_json, write_jsonl
from tests.tiny import make_tokenizer

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer")
    write_json(tmp_path / "rows.json", alpaca_rows(30))
    write_json(tmp_path / "old.json", alpaca_rows(30, seed=1))
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "refusals.txt").write_text("sorry\n")
    item = {"subject": "letters", "question": "a b c d e f g h i j", "choices": ["k", "l", "m", "n"]}
    write_jsonl(tmp_path / "items.jsonl", [item])
    return tmp_path


def key_of(world: Path, **options: Any) -> str:
    base = {"sources": [{"path": str(world / "rows.json")}], "tokenizer": str(world / "tokenizer"), "out": "out"}
    config = PrepConfig.model_validate({**base, **options})
    encoder = blocks.make_encoder(config, load_tokenizer(config.tokenizer))
    return identity.content_key(config, encoder, identity.find_inputs(config))


OTHER: dict[str, Callable[[Path], Any]] = {
    "tokenizer": lambda world: str(make_tokenizer(world / "other", merges=[("a", "b")])),
    "template": lambda world: str(world / "chat.jinja"),
    "seq_len": lambda _: 777,
    "overlong": lambda _: "truncate",
    "on_error": lambda _: "drop",
    "filters.garbled": lambda _: False,
    "filters.refusals": lambda world: str(world / "refusals.txt"),
    "filters.max_repetition": lambda _: 0.3,
    "filters.min_response_tokens": lambda _: 2,
    "filters.max_response_tokens": lambda _: 99,
    "heldout": lambda _: 3,
    "dedup": lambda _: "none",
    "near.threshold": lambda _: 0.7,
    "near.ngram": lambda _: 4,
    "near.seed": lambda _: 1,
    "decontaminate": lambda world: [str(world / "items.jsonl")],
    "decontaminate_ngram": lambda _: 8,
    "seed": lambda _: 1,
}
"""By the option: another value than its default; the output may change with it."""
NOT_CONTENT: dict[str, Any] = {"workers": 3, "engine": "ray", "dry_run": True, "out": "elsewhere"}
OF_SOURCES: dict[str, dict[str, Any]] = {
    "name": {"name": "other"},
    "format": {"format": "text"},
    "columns": {"columns": {"output": "answer"}},
    "train_on": {"train_on": "last"},
    "weight": {"weight": 2.0},
    "balance_by": {"balance_by": "input"},
    "role": {"role": "replay", "ratio": 0.5},
    "ratio": {"role": "replay", "ratio": 0.25},
}


def test_no_option_is_forgotten() -> None:
    options = {name for name, _ in walk_options(PrepConfig)}
    assert options == {*OTHER, *NOT_CONTENT, "sources"}
    assert set(Source.model_fields) == {*OF_SOURCES, "path"}
    assert {name.split(".")[0] for name in options} == set(PrepConfig.model_fields)


def test_every_option_that_changes_the_output_changes_the_key(world: Path) -> None:
    keys = [key_of(world)]
    for name, value in OTHER.items():
        section, _, option = name.partition(".")
        keys.append(key_of(world, **{section: {option: value(world)} if option else value(world)}))
    first = {"path": str(world / "rows.json")}
    second = {"path": str(world / "old.json")}
    keys.append(key_of(world, sources=[first, second]))
    keys.append(key_of(world, sources=[second, first]))
    keys += [key_of(world, sources=[first, {**second, **change}]) for change in OF_SOURCES.values()]
    assert len(set(keys)) == len(keys) == 1 + len(OTHER) + 2 + len(OF_SOURCES)


def test_options_that_do_not_change_the_output_keep_the_key(world: Path) -> None:
    key = key_of(world)
    assert [name for name, value in NOT_CONTENT.items() if key_of(world, **{name: value}) != key] == []


def everything(world: Path) -> dict[str, Any]:
    """A job that uses every kind of file."""
    return {
        "sources": [{"path": str(world / "rows.json")}],
        "tokenizer": str(world / "tokenizer"),
        "template": str(world / "chat.jinja"),
        "filters": {"refusals": str(world / "refusals.txt")},
        "decontaminate": [str(world / "items.jsonl")],
    }


def test_files_count_by_their_bytes_not_by_their_place(world: Path) -> None:
    key = key_of(world, **everything(world))
    moved = world / "moved"
    moved.mkdir()
    for name in ("rows.json", "chat.jinja", "refusals.txt", "items.jsonl"):
        shutil.copy(world / name, moved)
    shutil.copytree(world / "tokenizer", moved / "tokenizer")
    assert key_of(world, **everything(moved)) == key


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rows.json", "Task 1", "Task !"),
        ("chat.jinja", "m.role", "m.role "),
        ("refusals.txt", "sorry", "Sorry|alas"),
        ("items.jsonl", "a b c", "a b b"),
        ("tokenizer/tokenizer_config.json", "{", "{ "),
    ],
)
def test_another_byte_of_a_file_is_another_job(world: Path, name: str, old: str, new: str) -> None:
    key = key_of(world, **everything(world))
    file = world / name
    before = file.read_bytes()
    file.write_text(before.decode().replace(old, new, 1))
    assert key_of(world, **everything(world)) != key
    file.write_bytes(before)
    assert key_of(world, **everything(world)) == key


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (template, "ALPACA_WITH_INPUT", "other"),
        (template, "ALPACA_WITHOUT_INPUT", "other"),
        (identity, "CODE_VERSION", 99),
    ],
)
def test_another_version_of_the_code_is_another_job(
    world: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any
) -> None:
    key = key_of(world)
    monkeypatch.setattr(module, name, value)
    assert key_of(world) != key


def test_the_order_of_the_files_of_a_folder_counts(world: Path) -> None:
    folder = world / "folder"
    folder.mkdir()
    shutil.copy(world / "rows.json", folder / "a.json")
    shutil.copy(world / "old.json", folder / "b.json")
    key = key_of(world, sources=[{"path": str(folder)}])
    (folder / "a.json").rename(folder / "c.json")
    assert key_of(world, sources=[{"path": str(folder)}]) != key


def test_the_same_job_again_is_up_to_date(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = world / "out"
    given = {"sources": world / "rows.json", "tokenizer": world / "tokenizer", "heldout": 5}
    prepare(out, **given)
    before = file_bytes(out)
    capsys.readouterr()
    prepare(out, **given, workers=2)
    assert "up to date" in capsys.readouterr().out
    assert file_bytes(out) == before
    argv = flags(**given, seq_len=1024, out=out)
    assert "other input or settings" in refused(capsys, build.main, [*argv, "--seed", "1"])
    assert file_bytes(out) == before
    for name in ("report.json", "heldout"):
        (out / name).rename(world / "aside")
        line = refused(capsys, build.main, argv)
        assert f"{name} is missing, so it is not the whole output" in line
        (world / "aside").rename(out / name)
    prepare(out, **given)
    next((out / "heldout").glob("*.arrow")).unlink()
    assert "missing" in refused(capsys, build.main, argv)


def test_an_empty_folder_is_used_and_a_foreign_one_is_not(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "empty").mkdir()
    given = {"sources": world / "rows.json", "tokenizer": world / "tokenizer"}
    prepare(world / "empty", **given)
    for out in (world, world / "rows.json"):
        assert "no output of sft prep" in refused(capsys, build.main, flags(**given, out=out))


def test_the_manifest_describes_the_build(world: Path) -> None:
    options = {"sources": world / "rows.json", "tokenizer": world / "tokenizer"}
    manifest = prepare(world / "out", **options).manifest
    loaded = load_tokenizer(world / "tokenizer")
    [source] = manifest["sources"]
    assert (source["name"], source["path"], source["rows"]) == ("rows", str(world / "rows.json"), 30)
    told = manifest["tokenizer"]
    assert (told["digest"], told["vocab_size"], told["bos_id"], told["eos_id"]) == (loaded.digest, 259, 1, 2)
    assert all(loaded.encode(item["text"]) == item["ids"] for item in told["probe"])
    assert manifest["special_ids"] == [0, 1, 2]
    assert manifest["template"] == [template.ALPACA_WITH_INPUT, template.ALPACA_WITHOUT_INPUT]
    assert manifest["content_key"] == key_of(world, seq_len=1024)
    assert manifest["settings"]["seq_len"] == 1024
    report = json.loads((world / "out" / "report.json").read_text())
    assert manifest["fill"] == report["splits"]["train"]["fill"]
