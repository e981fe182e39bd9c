"""What users and their files get wrong, each found by running `sft prep` on it."""

import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep import build, chat, progress
from data_prep.at_once import encode_at_once
from data_prep.chat import load_chat_template
from data_prep.decontaminate import Decontaminator, Item
from data_prep.encode import reference_document
from data_prep.example import Turn
from data_prep.fast import load_fast
from data_prep.source_files import source_files
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.prep_support import alpaca_rows, flags, prepare, refused, sentencepiece_tokenizer, write_json
from tests.tiny import REPO, make_tokenizer, rank_environment, run

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def template_file(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "template.jinja"
    path.write_text(text, encoding=encoding)
    return str(path)


# Chat templates


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b", "", True)]
    plain = load_chat_template(template_file(tmp_path, TEMPLATE), tokenizer).render(turns)
    marked = load_chat_template(template_file(tmp_path, TEMPLATE, "utf-8-sig"), tokenizer)
    assert (tmp_path / "template.jinja").read_bytes().startswith(b"\xef\xbb\xbf")
    assert marked.render(turns) == plain


def test_a_template_without_end(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TRY_OUT_S", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"cannot render a question with its answer within 0.2 s; take the endless"):
        load_chat_template(template_file(tmp_path, loop + TEMPLATE), tokenizer)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    load_chat_template(template_file(tmp_path, TEMPLATE), tokenizer)


def test_a_template_that_fills_the_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="it fills the memory"):
        load_chat_template(template_file(tmp_path, "{{ '%999999999999999d'|format(5) }}" + TEMPLATE), tokenizer)


def test_a_template_that_changes_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r'renders the answer "Seven." as .*SEVEN.*must write each message'):
        load_chat_template(template_file(tmp_path, TEMPLATE.replace("m.content", "m.content|upper")), tokenizer)


# Tokenizers


@pytest.mark.parametrize("nested", [False, True])
def test_ids_for_which_the_model_has_no_embedding(
    tmp_path: Path, nested: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers adds an eos_token that the vocabulary lacks, behind the last row of the embedding."""
    folder = make_tokenizer(tmp_path / "model")
    sizes = {"vocab_size": 259}
    write_json(folder / "config.json", {"model_type": "llama", **({"text_config": sizes} if nested else sizes)})
    options = {"sources": write_json(tmp_path / "a.json", alpaca_rows(3)), "tokenizer": folder, "workers": 1}
    prepare(tmp_path / "fits", **options)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "eos_token": "<|end|>"})
    line = refused(capsys, build.main, flags(**options, out=tmp_path / "out"))
    assert 'ids reach 259 ("<|end|>"), but config.json gives the model 259 embedding rows' in line
    (folder / "config.json").unlink()
    prepare(tmp_path / "out", **options)


def test_long_conversations_with_sentencepiece_are_encoded_at_once(tmp_path: Path) -> None:
    """It begins anew behind each special token; once every conversation of several turns went to the reference, which
    takes a hundred times as long."""
    pieces = load_tokenizer(sentencepiece_tokenizer(tmp_path / "pieces"))
    fast = load_fast(pieces)
    assert fast is not None
    template = load_chat_template(template_file(tmp_path, TEMPLATE.replace(": ", ":\n")), pieces)
    examples = []
    for number in (1, 2, 30):
        turns = [Turn("user", "the task"), Turn("assistant", "é response", "", True), Turn("user", "  a é")]
        examples.append(template.render([*turns * number, Turn("assistant", "a request", "", True)]))
    encoded, proved = encode_at_once(pieces, fast, examples)
    assert proved.all()
    for position, example in enumerate(examples):
        assert encoded.document(position) == reference_document(pieces, example)


# Options


def test_more_words_than_any_item_has() -> None:
    """Once this computed a power for each of them."""
    known = Decontaminator([Item("item", "one two three four five six")], 10**10)
    hit = known.find("zero one two three four five six seven")
    assert hit is not None
    assert hit.overlap_text == "one two three four five six"
    assert known.find("zero one two three four five seven") is None


def test_more_workers_than_the_system_allows(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(sources=write_json(tmp_path / "a.json", alpaca_rows(3)), tokenizer=tokenizer.path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = len(os.listdir("/dev/fd")) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(room, before[1]), before[1]))
    try:
        line = refused(capsys, build.main, [*argv, *flags(workers=200, out=tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert re.search(r"workers 200: only \d+ could be started: Too many open files; lower workers", line)
    assert multiprocessing.active_children() == []
    prepare(tmp_path / "out", sources=tmp_path / "a.json", tokenizer=tokenizer.path, workers=2)


# Folders and links


@pytest.mark.parametrize("make", ["folder", "file"])
def test_a_work_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, tokenizer: Tokenizer, make: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"sources": write_json(tmp_path / "a.json", alpaca_rows(3)), "tokenizer": tokenizer.path}
    work = tmp_path / "out.work"
    kept = work / "thesis.txt" if make == "folder" else work
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    line = refused(capsys, build.main, flags(**options, workers=1, out=tmp_path / "out"))
    assert f"{work} is needed for work" in line
    kept.rename(tmp_path / "aside")
    prepare(tmp_path / "out", **options)
    assert not work.exists() or make == "file"
    work.mkdir(exist_ok=True)
    (tmp_path / "aside").rename(work / "thesis.txt")
    prepare(tmp_path / "out", **options)
    assert (work / "thesis.txt").read_text() == "years of work", "an output that is up to date"


def test_an_output_within_its_own_input(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_json(source / "a.json", alpaca_rows(3))
    for path in (source, f"{source}/**/*.json"):
        argv = flags(sources=path, tokenizer=tokenizer.path, workers=1, out=source / "out")
        assert "lies in source" in refused(capsys, build.main, argv)
    prepare(source / "_out", sources=source, tokenizer=tokenizer.path)
    prepare(source / "out", sources=f"{source}/*.json", tokenizer=tokenizer.path)


def test_links_in_a_source_folder(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (source, elsewhere):
        folder.mkdir()
    write_json(source / "a.json", alpaca_rows(1))
    write_json(elsewhere / "b.json", alpaca_rows(1))
    (source / "more").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    (elsewhere / "back").symlink_to(tmp_path)
    (source / "notes.txt").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(source)) for path in source_files(str(source))]
    assert found == ["a.json", "more/b.json"]


@pytest.mark.parametrize("pattern", ["", "/*.json"])
def test_a_link_to_no_file_is_not_passed_over(tmp_path: Path, pattern: str) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_json(source / "a.json", alpaca_rows(1))
    (source / "b.json").symlink_to(tmp_path / "moved.json")
    with pytest.raises(UserError, match=r"b\.json is a link to no file"):
        source_files(f"{source}{pattern}")
    (source / "b.json").unlink()
    os.mkfifo(source / "b.json")
    with pytest.raises(UserError, match=r"b\.json is no regular file"):
        source_files(f"{source}{pattern}")


def test_an_interrupt_while_gigatoken_is_loaded(tokenizer: Tokenizer) -> None:
    """It imports awkward when it first returns ids, and takes an interrupt at that moment for its absence."""
    interrupted = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'awkward':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from data_prep.fast import load_fast\n"
        "from sft.tokenizer import load_tokenizer\n"
        "load_fast(load_tokenizer(sys.argv[1])).encode(['a'])\n"
    )
    ended = run([sys.executable, "-c", interrupted, str(tokenizer.path)])
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"


# Output that nobody takes


def started_job(tmp_path: Path, tokenizer: Tokenizer, **streams: Any) -> subprocess.Popen[bytes]:
    source = write_json(tmp_path / "a.json", alpaca_rows(3))
    options = flags(sources=source, tokenizer=tokenizer.path, workers=1, out=tmp_path / "out")
    environment = rank_environment()
    return subprocess.Popen([sys.executable, "-m", "data_prep", *options], env=environment, cwd=REPO, **streams)


def test_a_reader_that_leaves_is_no_failure(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for told in ("first", "up to date"):
        job = started_job(tmp_path, tokenizer, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert job.stdout is not None
        job.stdout.close()
        assert (job.stderr.read(), job.wait(60)) == (b"", 0), told  # type: ignore[union-attr]
    assert (tmp_path / "out" / "report.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open("/dev/full", "wb") as full:
        job = started_job(tmp_path, tokenizer, stdout=full, stderr=subprocess.PIPE)
        told = job.stderr.read().decode()  # type: ignore[union-attr]
    assert job.wait(60) == 2
    assert told == (
        f"error: standard output: cannot be written: No space left on device; the job itself wrote {tmp_path / 'out'}\n"
    )


def test_progress_that_nobody_reads_does_not_end_the_job(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Gone())
    prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", alpaca_rows(3)), tokenizer=tokenizer.path)


def test_no_digit_is_left_out_on_a_narrow_terminal(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", alpaca_rows(120)), tokenizer=tokenizer.path)
    tables = capsys.readouterr().out.partition("train: tokens per document")[0]
    assert "…" not in tables
    assert max(map(len, tables.splitlines())) == 40
