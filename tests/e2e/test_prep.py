"""The commands as a user starts them, and the proof on real data where it is at hand."""

import json
import subprocess
import sys
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
    assert (again.returncode, "up to date" in again.stdout) == (0, True), again.stderr
    shown = run("data_prep.show", str(out), "--rows", "1")
    assert shown.returncode == 0, shown.stderr
    assert "⟦answer " in shown.stdout
    source.write_text("[{}]")
    refused = run("data_prep", "--config", str(config), "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()


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
    reading = shards.manifest["tokenizer"]["conversion"]
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
