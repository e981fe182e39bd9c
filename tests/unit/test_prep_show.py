"""`sft show`: the marks stand exactly around the supervised text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import show
from sft.tokenizer import load_tokenizer
from tests.prep_support import flags, prepare, refused, sentencepiece_tokenizer, write_json
from tests.tiny import make_tokenizer

ROWS = [
    {"instruction": "Sing.", "input": "", "output": " la [bold]é[/bold]"},
    {"instruction": "Add.", "input": "1 2", "output": "3\n"},
]


@pytest.fixture(params=["bytes", "pieces"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make = make_tokenizer if request.param == "bytes" else sentencepiece_tokenizer
    tokenizer = make(tmp_path / "tokenizer")
    prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", ROWS), tokenizer=tokenizer)
    return tmp_path / "out"


@pytest.mark.parametrize("below", ["", "train"])
def test_supervised_text_is_marked(out: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    show.main([str(out / below)])
    shown = capsys.readouterr().out
    assert "### Response:\n⟦ la [bold]é[/bold]</s>⟧\n── doc 1 · a · " in shown
    assert "### Input:\n1 2\n\n### Response:\n⟦3\n</s>⟧" in shown
    assert shown.count("<s>Below is an instruction") == 2
    assert shown.startswith("━━ pack 0 · ")
    assert "/1024 tokens · 2 documents · " in shown


def test_colours_on_a_terminal(out: Path) -> None:
    shards = show.open_shards(out / "train")
    lines = list(show.render_pack(shards, 0, load_tokenizer(out.parent / "tokenizer"), coloured=True))
    text = lines[2]
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "bold green")
    assert green == " la [bold]é[/bold]</s>"
    assert "⟦" not in text.plain


def test_text_that_the_output_cannot_encode_is_escaped(out: Path) -> None:
    """In a log with ASCII output, as under LC_ALL=C."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "data_prep.show", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u27e6 la [bold]\\xe9[/bold]</s>\\u27e7" in done.stdout


def test_bad_requests_are_refused(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has 1 packs" in refused(capsys, show.main, [str(out), *flags(start=1)])
    assert "no such folder" in refused(capsys, show.main, [str(tmp_path / "none")])
    other = make_tokenizer(tmp_path / "other", merges=[("a", "b")])
    assert "not the one these shards" in refused(capsys, show.main, [str(out), *flags(tokenizer=other)])
    (out / "train" / "manifest.json").unlink()
    assert "no manifest.json" in refused(capsys, show.main, [str(out)])
