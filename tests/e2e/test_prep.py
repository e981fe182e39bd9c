"""The commands as a user starts them, and the proof on real data where it is at hand."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.shards import open_shards, verify_digests
from data_prep.template import alpaca_prompt
from tests.prep_support import alpaca_rows, documents, flags, prepare, write_json
from tests.tiny import SHARED, make_tokenizer

pytestmark = pytest.mark.e2e


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)


def test_prep_then_show_then_a_mistake(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = tmp_path / "prep.yaml"
    source = write_json(tmp_path / "rows.json", alpaca_rows(300))
    config.write_text(
        json.dumps({"sources": [{"path": str(source)}], "tokenizer": str(tokenizer), "seq_len": 700, "heldout": 0.1})
    )
    out = tmp_path / "out"
    made = run("data_prep", "--config", str(config), "--out", str(out), "--workers", "2")
    assert made.returncode == 0, made.stderr
    assert "content key" in made.stdout
    assert sorted(path.name for path in out.iterdir()) == ["heldout", "report.json", "train"]
    for split in ("train", "heldout"):
        verify_digests(open_shards(out / split))
    again = run("data_prep", "--config", str(config), "--out", str(out))
    assert (again.returncode, "up to date" in again.stdout) == (0, True)
    shown = run("data_prep.show", str(out), "--rows", "1")
    assert shown.returncode == 0, shown.stderr
    assert "⟦answer " in shown.stdout
    source.write_text("[{}]")
    refused = run("data_prep", "--config", str(config), "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()


ENDLESS = """
import itertools, sys
from data_prep import build
from sft.errors import run_command
raw_blocks = build._raw_blocks
build._raw_blocks = lambda config: itertools.cycle(raw_blocks(config))
sys.exit(run_command(build.main))
"""
STUCK_WHILE_WRITING = """
import sys, time
from data_prep import build
from sft.errors import run_command
build.write_json = lambda *_: time.sleep(600)
sys.exit(run_command(build.main))
"""


def state(pid: int) -> tuple[str, int]:
    """(state letter, parent) of a process; Z where it has ended or is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[1])


def children(pid: int) -> list[int]:
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [child for child in found if state(child)[1] == pid]


def wait_until(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end_s, "waited 60 s in vain"
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a job with three workers from a script; what is left of it is killed at the end."""
    given = flags(
        sources=write_json(tmp_path / "rows.json", alpaca_rows(300)),
        tokenizer=make_tokenizer(tmp_path / "tokenizer"),
        seq_len=700,
        workers=3,
        out=tmp_path / "out",
    )
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *given]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        return started[0]

    yield start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started[0].pid, signal.SIGKILL)
    started[0].communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find workers in")
@pytest.mark.parametrize(
    ("kill", "number", "code"),
    [
        (os.kill, signal.SIGKILL, -9),
        (os.kill, signal.SIGTERM, 143),
        (os.killpg, signal.SIGTERM, 143),
        (os.killpg, signal.SIGINT, 130),
    ],
)
def test_workers_end_with_the_job(
    job: Callable[[str], subprocess.Popen[str]], kill: Callable[[int, int], None], number: int, code: int
) -> None:
    process = job(ENDLESS)
    wait_until(lambda: len(children(process.pid)) == 3)
    workers = children(process.pid)
    kill(process.pid, number)
    assert process.wait(60) == code
    wait_until(lambda: all(state(worker)[0] == "Z" for worker in workers))


def test_a_terminated_job_leaves_no_folder(job: Callable[[str], subprocess.Popen[str]], tmp_path: Path) -> None:
    process = job(STUCK_WHILE_WRITING)
    wait_until(lambda: any(tmp_path.glob("out.tmp-*/train/*.arrow")))
    process.terminate()
    assert process.wait(60) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "tokenizer"]
    assert "Traceback" not in process.communicate()[1]


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no ../shared: real Alpaca rows and the Llama-2 tokenizer")
def test_real_rows_have_sentencepiece_ids_and_exact_labels(tmp_path: Path) -> None:
    """Every row of three data sets: ids of sentencepiece, and supervised tokens that decode to the response and eos."""
    from sentencepiece import SentencePieceProcessor

    paths = [SHARED / "data" / f"{name}.json" for name in ("alpaca_en_1k", "alpaca_zh_1k", "code_alpaca_2k")]
    folder = SHARED / "tokenizers" / "llama2"
    shards = prepare(
        tmp_path / "out", sources=",".join(map(str, paths)), tokenizer=folder, seq_len=4096, dedup="none", workers=2
    )
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
    found = documents(shards)
    for doc_id, ids, labels in found:
        row = rows[doc_id]
        prompt = alpaca_prompt(row["instruction"], row["input"])
        assert ids == [1, *reference.encode(prompt + row["output"]), 2]
        num_prefix = labels.count(-100)
        assert ids[:num_prefix] == [1, *reference.encode(prompt)]
        assert labels == [-100] * num_prefix + ids[num_prefix:]
        assert reference.decode(ids[1:-1]) == reference.decode(ids[1:num_prefix]) + row["output"]
    sources = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]
    assert [source["dropped"].keys() - {"empty_output"} for source in sources] == [set(), set(), set()]
    assert len({doc_id for doc_id, _, _ in found}) == len(found) == sum(bool(row["output"].strip()) for row in rows)
    reading = shards.manifest["tokenizer"]["reference"]
    assert reading["used"] == "sentencepiece"
    assert reading["equal"] < reading["texts"], "transformers' own conversion differs on rows with runs of spaces"


def test_flags_and_file_give_the_same_key(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    source = write_json(tmp_path / "rows.json", alpaca_rows(20))
    given = flags(sources=source, tokenizer=tokenizer, seq_len=700)
    one = run("data_prep", *given, "--out", str(tmp_path / "one"))
    config = tmp_path / "prep.yaml"
    config.write_text(
        json.dumps(
            {"sources": [str(source)], "tokenizer": str(tokenizer), "seq_len": 700, "out": str(tmp_path / "two")}
        )
    )
    two = run("data_prep", "--config", str(config))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert open_shards(tmp_path / "one/train").manifest == open_shards(tmp_path / "two/train").manifest
