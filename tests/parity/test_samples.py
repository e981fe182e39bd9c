"""The files that lm_eval itself saves, read as records: nothing about their form is taken from memory."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.eval.earlier import check_same_items, kind_of, read_scored
from sft.eval.results import Scored
from sft.eval.tasks import data, hellaswag, mmlu

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
BOTH = ("mmlu", "hellaswag")
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(scope="module")
def saved(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/ and chat/, as lm_eval writes them; one process, no network."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install .[dev])")
    out = tmp_path_factory.mktemp("samples")
    chat = shutil.copytree(world / "bos", out / "model")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(world / "hf"), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "save_samples.py"), str(out), str(world / "bos"), str(chat)],
        cwd=world / "hub",
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return out


def read(saved: Path, name: str) -> Scored:
    assert kind_of(saved / name) == "lm_eval"
    return read_scored(saved / name, BOTH)


def test_the_records_are_those_of_our_own_items(saved, world):
    scored = read(saved, "plain")
    [anatomy] = [subject for subject in data.load_mmlu(world / "hub")[0] if subject.name == "anatomy"]
    validation, train, _ = data.load_hellaswag(world / "hub", need_train=True)
    items = {
        "mmlu": mmlu.build_items(anatomy, 2, 10),
        "hellaswag": hellaswag.build_items(validation, train, 2, 10),
    }
    for task, records in scored.records.items():
        for item, record in zip(items[task], records, strict=True):
            assert (record.subject, record.doc_id, record.gold) == (item.subject, item.doc_id, item.gold)
            assert record.prompt_sha256 == hashlib.sha256(item.context.encode()).hexdigest()
            assert record.chars == tuple(map(len, item.choices))
            assert record.cluster == item.cluster
        assert len({record.prompt_sha256 for record in records}) == len(records)


def test_the_header_is_what_the_run_was(saved, world):
    plain, chat = read(saved, "plain").header, read(saved, "chat").header
    for header, model in ((plain, world / "bos"), (chat, saved / "model")):
        facts = [header[fact] for fact in ("model", "engine", "dtype", "score_dtype", "max_length")]
        assert facts == [str(model), "lm_eval", "float32", "fp32", 2048]
    assert (plain["chat"], plain["chat_template_sha256"]) == ("none", None)
    assert (chat["chat"], chat["chat_template_sha256"]) == (
        "multi_turn",
        hashlib.sha256(TEMPLATE.encode()).hexdigest(),
    )
    assert plain["compat"] == "lm_eval>=0.4.9.2"
    assert plain["tasks"]["mmlu"]["shots"] == plain["tasks"]["hellaswag"]["shots"] == 2


def test_equal_runs_compare_and_other_prompts_do_not(saved):
    plain, chat = read(saved, "plain"), read(saved, "chat")
    assert check_same_items(plain, plain, "a", "b") == plain
    with pytest.raises(UserError, match="chat: a has 'none', b 'multi_turn'"):
        check_same_items(plain, chat, "a", "b")


def test_a_changed_score_is_found(saved, tmp_path):
    shutil.copytree(saved / "plain", tmp_path / "plain")
    [file] = (tmp_path / "plain").rglob("samples_hellaswag_*.jsonl")
    first, *others = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["resps"][row["doc"]["gold"] if not row["acc"] else (row["doc"]["gold"] + 1) % 4][0][0] = "-0.001"
    file.write_text(json.dumps(row) + "\n" + "".join(others))
    with pytest.raises(UserError, match=r"line 1: doc_id 0 has acc"):
        read_scored(tmp_path / "plain", BOTH)
