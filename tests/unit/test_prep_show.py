"""`sft show`: the marks stand exactly around the supervised text, on a terminal, in a pipe and on the page."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import show
from data_prep.page import render_page, token_texts
from data_prep.shards import Shards, open_shards
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.prep_support import byte_ids, documents, flags, prepare, refused, sentencepiece_tokenizer, write_json
from tests.tiny import BOS, EOS, make_tokenizer

ROWS = [
    {"instruction": "Sing.", "input": "", "output": " la [bold]é[/bold]"},
    {"instruction": "Add.", "input": "1 2", "output": "3\n"},
]
NASTY = [
    {
        "instruction": "<script>alert(1)</script> & \"b\" 'c'",
        "input": "a\tb   c\u202e",
        "output": "</pre></div>🙂é\r\n",
    },
    {"instruction": "&lt;b&gt; ]]> <!--", "input": "", "output": "<b data-t='1'>x</b>"},
]


@pytest.fixture(params=["bytes", "pieces"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make = make_tokenizer if request.param == "bytes" else sentencepiece_tokenizer
    tokenizer = make(tmp_path / "tokenizer")
    prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", ROWS), tokenizer=tokenizer)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows used twice in training, over several packs, and one row held out."""
    base = tmp_path_factory.mktemp("split")
    rows = [{"instruction": f"Say {number}", "input": "", "output": "x" * 300} for number in range(8)]
    config = {
        "sources": [{"path": str(write_json(base / "a.json", rows)), "weight": 2.0}],
        "tokenizer": str(make_tokenizer(base / "tokenizer")),
        "heldout": 1,
    }
    prepare(base / "out", config=write_json(base / "prep.yaml", config))
    return base / "out"


def output_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    show.main([str(word) for word in argv])
    return capsys.readouterr().out


def edit_labels(split: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first pack in place."""
    (path,) = split.glob("*.arrow")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        schema, rows = reader.schema, reader.read_all().to_pylist()
    change(rows[0])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


@pytest.mark.parametrize("below", ["", "train"])
def test_supervised_text_is_marked(out: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys, out / below)
    assert "### Response:\n⟦ la [bold]é[/bold]</s>⟧\n── doc 1 · a · " in shown
    assert "### Input:\n1 2\n\n### Response:\n⟦3\n</s>⟧" in shown
    assert shown.count("<s>Below is an instruction") == 2
    assert shown.startswith("━━ pack 0 · ")
    assert "/1024 tokens · 2 documents · " in shown


def test_colours_on_a_terminal(out: Path) -> None:
    shards = show.open_shards(out / "train")
    lines = list(show.render_pack(shards, 0, [0, 1], load_tokenizer(out.parent / "tokenizer"), coloured=True))
    text = lines[2]
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "bold green")
    assert green == " la [bold]é[/bold]</s>"
    assert "⟦" not in text.plain


def test_several_supervised_runs_in_a_document(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels decide, not a prefix: here the model also learns BOS and the next three tokens."""

    def change(row: dict[str, Any]) -> None:
        row["labels"][:4] = row["input_ids"][:4]

    edit_labels(out / "train", change)
    shown = output_of(capsys, out)
    first, second = re.findall("⟦(.*?)⟧", shown.split("── doc 1 ")[0], flags=re.DOTALL)
    assert first.startswith("<s>Bel"[: len(first)])
    assert len(first) > len("<s>")
    assert second == " la [bold]é[/bold]</s>"


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
    assert "No such file" in refused(capsys, show.main, [str(out), *flags(html=tmp_path / "none" / "page.html")])
    (out / "train" / "manifest.json").unlink()
    assert "no manifest.json" in refused(capsys, show.main, [str(out)])


# One document


def test_a_document_is_found_and_shown_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys, out, "--doc", 1)
    assert shown.startswith(f"document 1: in pack 0 of {out / 'train'}\n━━ pack 0 · ")
    assert "── doc 1 · a · " in shown
    assert "Sing." not in shown
    assert shown.endswith("⟦3\n</s>⟧\n")


def test_a_repeated_document_is_shown_once(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_shards(split / "train")
    doc_id = documents(shards)[0][0]
    packs = {index for index in range(len(shards)) if doc_id in shards.pack(index).doc_ids}
    shown = output_of(capsys, split, "--doc", doc_id)
    word = "packs" if len(packs) > 1 else "pack"
    assert shown.startswith(f"document {doc_id}: 2 times in {len(packs)} {word} of {split / 'train'}, shown once\n")
    assert shown.count("── doc ") == 1


def test_a_document_of_either_split_is_found(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((doc_id, _, _),) = documents(open_shards(split / "heldout"))
    shown = output_of(capsys, split, "--doc", doc_id)
    assert f"document {doc_id}: in pack 0 of {split / 'heldout'}\n" in shown
    assert f"Say {doc_id}" in shown
    assert f"no pack of {split / 'train'} holds it" in refused(
        capsys, show.main, [str(split / "train"), *flags(doc=doc_id)]
    )
    assert "holds it" in refused(capsys, show.main, [str(split), *flags(doc=8)])


# The page


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    make = make_tokenizer if request.param == "bytes" else sentencepiece_tokenizer
    return load_tokenizer(make(tmp_path_factory.mktemp("tokens") / "tokenizer"))


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_token_texts_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(each or "" for each in texts) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 258), max_size=40))
def test_any_ids_have_texts(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Random bytes are no UTF-8; special tokens may stand inside a character."""
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    named = {position: text for position, text in enumerate(texts) if ids[position] in tokenizer.special_ids}
    assert all(text == tokenizer.token(ids[position]) for position, text in named.items())


def test_a_character_of_several_tokens_stands_at_its_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    ids = [BOS, *byte_ids("é🙂x"), EOS]
    assert token_texts(ids, tokenizer) == ["<s>", "é", None, "🙂", None, None, None, "x", "</s>"]
    assert token_texts(byte_ids("é")[:1], tokenizer) == ["\ufffd"]
    assert token_texts([*byte_ids("é")[:1], EOS], tokenizer) == ["\ufffd", "</s>"]


class Page(HTMLParser):
    """Documents of a page as lists of (id, supervised, text as it is copied)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.notes: list[str] = []
        self.documents: list[list[tuple[int, bool, str]]] = []
        self.packs: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag not in ("meta",):
            self._open.append(tag)
        if values.get("class") == "doc":
            self.documents.append([])
            self.notes.append(str(values["style"]))
        if tag in ("b", "i") and "data-t" in values:
            self.documents[-1].append((int(str(values["data-t"])), tag == "b", ""))
        assert not {"src", "href", "onload", "onclick"} & set(values)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open and self._open[-1] != "u":
            token, supervised, text = self.documents[-1][-1]
            self.documents[-1][-1] = (token, supervised, text + data)
        if self._open[-1:] == ["h2"]:
            self.packs.append(data.strip())


def page_of(shards: Shards, tokenizer: Tokenizer) -> str:
    return "".join(render_page(shards, show.choose_packs(shards, 0, 100), tokenizer))


def test_the_page_holds_every_token_and_its_label(split: Path) -> None:
    shards = open_shards(split / "train")
    text = page_of(shards, load_tokenizer(split.parent / "tokenizer"))
    page = Page(text)
    wanted = documents(shards)
    assert len(page.documents) == len(wanted) == shards.manifest["totals"]["documents"]
    for found, (_, ids, labels) in zip(page.documents, wanted, strict=True):
        assert [token for token, _, _ in found] == ids
        assert [supervised for _, supervised, _ in found] == [label != -100 for label in labels]
    assert page.packs == [f"pack {index}" for index in range(len(shards))]
    totals = shards.manifest["totals"]
    assert f"<td>{totals['documents']:,}</td>" in text
    assert f"{shards.manifest['fill']:.2%} full" in text
    assert f"{totals['tokens']:,}, of which {totals['labels']:,} are targets" in text


def test_the_page_brings_nothing_from_the_data_to_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": str(write_json(tmp_path / "a.json", NASTY)), "name": "\"'><script>\\é\n"}
    config = {"sources": [source], "tokenizer": str(make_tokenizer(tmp_path / "tokenizer"))}
    prepare(tmp_path / "out", config=write_json(tmp_path / "prep.yaml", config))
    target = tmp_path / "page.html"
    target.write_text("old")
    assert output_of(capsys, tmp_path / "out", "--html", target) == f"wrote {target}: 1 of 1 packs\n"
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    tags = "html head meta title style body h1 table tr td p b i u s section h2 small div span h3 pre"
    assert page.tags <= set(tags.split())
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'\">" in text
    shown = ["".join(text for _, _, text in document) for document in page.documents]
    assert shown[0].endswith("a\tb   c\n\n### Response:\n</pre></div>🙂é\n</s>")
    assert "<script>alert(1)</script> & \"b\" 'c'\n" in shown[0]
    assert shown[1].endswith("<b data-t='1'>x</b></s>")
    assert ">a</i>" in text
    assert "<u>→</u>\t</i>" in text
    assert "<u>U+202E</u></i>" in text
    assert "🙂</b>" in text
    assert "<u>▪</u></b>" in text
    assert "<u>U+000D</u></b>" in text
    assert "<u>↵</u>\n</b>" in text
    # the name of the source, read back as a browser reads a CSS string
    css = re.fullmatch(r'--d:"([^"]*)"', page.notes[0])
    assert css is not None
    assert re.sub(r"\\([0-9a-f]+) ", lambda found: chr(int(found[1], 16)), css[1]) == " · \"'><script>\\é\n · doc 0"
    assert list(tmp_path.glob("page.html*")) == [target]


def test_a_page_of_one_document(split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doc_id = documents(open_shards(split / "train"))[2][0]
    output_of(capsys, split, "--doc", doc_id, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.documents) == 1
    assert f"doc {doc_id}" in page.notes[0]


def test_a_failed_page_leaves_the_old_one(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Tokenizer, _ids: object) -> str:
        raise RuntimeError("broken tokenizer")

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(Tokenizer, "decode", fail)
    with pytest.raises(RuntimeError, match="broken tokenizer"):
        show.main([str(split), *flags(html=tmp_path / "page.html")])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]


def test_several_runs_on_the_page(out: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row["labels"][:4] = row["input_ids"][:4]

    edit_labels(out / "train", change)
    shards = open_shards(out / "train")
    page = Page(page_of(shards, load_tokenizer(out.parent / "tokenizer")))
    marks = np.array([supervised for _, supervised, _ in page.documents[0]])
    assert (np.diff(np.flatnonzero(np.diff(marks.astype(int)))) > 0).all()
    assert marks[:4].all()
    assert not marks[4]
    assert marks[-1]
