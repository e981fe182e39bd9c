"""docs/data-preparation.md: its examples are rows, its commands run, its tables and figures are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from data_prep import build, filters, show, verify
from data_prep.formats import RowError, parse_row
from data_prep.shards import COLUMNS
from data_prep.template import render_alpaca
from sft.prep_options import PrepConfig, Source
from sft.settings import load
from tests.prep_support import alpaca_rows, write_json
from tests.tiny import REPO, make_evals, make_tokenizer

PAGE = (REPO / "docs" / "data-preparation.md").read_text(encoding="utf-8")
FORMATS = ("alpaca", "messages", "sharegpt", "text")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sft ")]


def examples(name: str) -> list[dict[str, object]]:
    section = re.split(r"\n### ", PAGE.split(f"\n### {name}")[1])[0]
    return [json.loads(line) for line in blocks("json", section)[0].splitlines()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_three_rows(name: str) -> None:
    source = Source(path="rows.jsonl", format=name)
    rows = examples(name)
    assert len(rows) == 3
    for row in rows:
        assert parse_row(row, source)


def test_control_rows_of_another_format_are_none() -> None:
    with pytest.raises(RowError, match="'messages' is missing"):
        parse_row(examples("alpaca")[0], Source(path="rows.jsonl", format="messages"))


def test_the_rendered_row_is_what_the_template_writes() -> None:
    example = render_alpaca(parse_row(examples("alpaca")[2], Source(path="rows.jsonl")))
    shown = ""
    for text, [(start, end)] in zip(example.texts, example.spans, strict=True):
        shown += f"{text[:start]}⟦{text[start:end]}</s>⟧"
    assert blocks("text") == [f"{shown}\n"]


def test_the_reasons_are_those_of_the_report() -> None:
    table = PAGE.split("| reason | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE) == list(filters.MEANING.items())


def test_the_columns_are_those_of_the_shards() -> None:
    table = PAGE.split("| column | type | meaning |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == COLUMNS


def test_the_replay_example_is_the_job_that_is_shown() -> None:
    rows = re.findall(r"^│ (\w+) +│(?:[^│]*│){4} ([\d,]+) +│ ([\d.]+)% │$", PAGE, flags=re.MULTILINE)
    tokens = {name: int(count.replace(",", "")) for name, count, _ in rows}
    assert list(tokens) == ["english", "code", "chinese"]
    others = tokens["english"] + tokens["code"]
    wanted = round(others * 0.1 / 0.9)
    assert f"{others:,} × 0.1 / 0.9 = {wanted:,} are wanted" in " ".join(PAGE.split())
    assert f"here at {tokens['chinese']:,} ({rows[2][2]} %)" in PAGE


def test_options_that_are_named_exist() -> None:
    known = set(PrepConfig.model_fields) | set(Source.model_fields)
    named = re.findall(r"`(\w+)(?:\.(\w+))?: [^`]+`", PAGE)
    assert len(named) >= 15
    for first, second in named:
        assert first in known or first in ("content", "weight", "train", "legacy"), first
        if second:
            assert second in PrepConfig.model_fields[first].annotation.model_fields, f"{first}.{second}"


def test_links_and_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPO / "docs" / target).exists(), target
    assert (REPO / "launch" / "prep.slurm").is_file()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page's commands name, in small."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("alpaca_en_1k", "code_alpaca_2k", "alpaca_zh_1k")):
        rows = alpaca_rows(200)
        for number, row in enumerate(rows):
            row["output"] = f"{name} {' '.join(f'w{seed}x{number}y{index}' for index in range(9))}"
        write_json(folder / f"{name}.json", rows)
    make_tokenizer(folder / "models" / "llama")
    make_evals(folder / "evals")
    (folder / "prep.yaml").write_text(blocks("yaml")[0])
    return folder


def test_the_commands_run_in_turn(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    assert len(commands()) >= 8
    for line in commands():
        words = shlex.split(line)[1:]
        main = {"prep": build.main, "show": show.main}[words[0]]
        if words[:2] == ["prep", "verify"]:
            main, words = verify.main, words[1:]
        main([*words[1:], *(["--workers", "1"] if main is build.main else [])])
        said = capsys.readouterr().out
        assert said or "--html" in words, line
        if "--dry-run" in words:
            assert "nothing written" in said
            assert not (world / "runs" / "mix").exists()
    assert (world / "pack.html").is_file()
    written = {path.name for path in (world / "runs" / "mix").iterdir()}
    assert written == {"train", "heldout", "report.json"}


def test_every_yaml_is_a_whole_job(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    assert len(blocks("yaml")) == 2
    for block in blocks("yaml"):
        (world / "page.yaml").write_text(block)
        config = load(PrepConfig, ["--config", "page.yaml"], prog="sft prep")
        assert config.out == yaml.safe_load(block)["out"]
