"""Shards on disk: what was written comes back, counts recomputed from the arrays, and torn sets are refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.pack import pack
from data_prep.shard_writer import Documents, write_shards
from data_prep.shards import Shards, open_shards, verify_digests
from sft.errors import UserError
from tests.prep_support import file_bytes

SEQ_LEN = 40
KEY = "0123456789abcdef" * 4
NEEDED = ("content_key", "seq_len", "template", "totals", "shards", "sources", "tokenizer")


def make_documents(count: int = 60, seed: int = 0, mean_length: int = SEQ_LEN // 2) -> Documents:
    """With no to three supervised runs each, some of them from the first token on."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 2 * mean_length + 1, size=count).astype(np.int32)
    runs = []
    for length in lengths.tolist():
        borders = np.sort(
            random.choice(length + 1, size=min(2 * random.integers(0, 4), length // 2 * 2), replace=False)
        )
        runs.append(borders.reshape(-1, 2))
    num_runs = np.array([len(of_document) for of_document in runs], dtype=np.int32)
    return Documents(
        ids=random.integers(3, 30_000, size=int(lengths.sum())).astype(np.int32),
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        runs=np.concatenate(runs).astype(np.int32),
        first_run=np.cumsum(num_runs, dtype=np.int64) - num_runs,
        num_runs=num_runs,
        doc_ids=np.arange(count, dtype=np.int64) + 2**40,
        source_ids=random.integers(0, 3, size=count).astype(np.int16),
    )


def write(folder: Path, documents: Documents, seq_len: int = SEQ_LEN, **options: int) -> Path:
    made_with = {"path": "x", "digest": "x", "vocab_size": 3, "bos_id": None, "eos_id": 2, "stop_id": 2, "probe": []}
    manifest = {
        "content_key": KEY,
        "seq_len": seq_len,
        "template": "x",
        "sources": [{"name": "a"}],
        "tokenizer": made_with,
    }
    write_shards(folder, documents, pack(documents.lengths, seq_len), manifest, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "train", make_documents(), tokens_per_shard=300)


def recount(input_ids: np.ndarray, labels: np.ndarray, seq_lens: np.ndarray) -> int:
    """Targets after the shift, one document at a time."""
    total, start = 0, 0
    for length in seq_lens.tolist():
        total += sum(label != -100 for label in labels[start : start + length].tolist()[1:])
        start += length
    assert start == len(input_ids) == len(labels)
    return total


def expected_labels(documents: Documents, number: int) -> list[int]:
    """By hand, one run at a time."""
    start = int(documents.starts[number])
    labels = [-100] * int(documents.lengths[number])
    for run in range(int(documents.num_runs[number])):
        first, end = documents.runs[int(documents.first_run[number]) + run].tolist()
        for position in range(first, end):
            labels[position] = int(documents.ids[start + position])
    return labels


def test_every_document_comes_back(folder: Path) -> None:
    documents, shards = make_documents(), open_shards(folder)
    assert len(shards.manifest["shards"]) > 2
    seen = []
    for index in range(len(shards)):
        row = shards.pack(index)
        dtypes = (row.input_ids.dtype, row.labels.dtype, row.seq_lens.dtype, row.doc_ids.dtype, row.source_ids.dtype)
        assert dtypes == (np.int32, np.int32, np.int32, np.int64, np.int16)
        assert row.num_labels == shards.num_labels[index] == recount(row.input_ids, row.labels, row.seq_lens)
        assert len(row.input_ids) == shards.num_tokens[index] <= SEQ_LEN
        starts = np.cumsum(row.seq_lens) - row.seq_lens
        for start, length, doc_id, source_id in zip(starts, row.seq_lens, row.doc_ids, row.source_ids, strict=True):
            number = int(doc_id) - 2**40
            seen.append(number)
            ids = documents.ids[documents.starts[number] :][: documents.lengths[number]].tolist()
            assert length == len(ids)
            assert source_id == documents.source_ids[number]
            assert row.input_ids[start : start + length].tolist() == ids
            assert row.labels[start : start + length].tolist() == expected_labels(documents, number)
    assert sorted(seen) == list(range(60))
    totals = shards.manifest["totals"]
    assert totals["documents"] == 60
    assert totals["packs"] == len(shards)
    assert totals["tokens"] == len(documents.ids) == int(shards.num_tokens.sum())
    assert totals["labels"] == int(shards.num_labels.sum())
    assert shards.manifest["fill"] == pytest.approx(totals["tokens"] / (len(shards) * SEQ_LEN))


def test_control_labels_by_hand_tell_runs_apart() -> None:
    documents = make_documents()
    assert set(documents.num_runs.tolist()) == {0, 1, 2, 3}
    assert (documents.runs[:, 0] == 0).any()
    shorter = replace(documents, runs=documents.runs + np.array([1, 0], dtype=np.int32))
    number = int(documents.num_runs.argmax())
    assert expected_labels(shorter, number) != expected_labels(documents, number)


def test_repeated_documents_stand_as_often_as_they_are_used(tmp_path: Path) -> None:
    documents = make_documents().take(np.array([3, 3, 7, 3, 0]))
    shards = open_shards(write(tmp_path / "train", documents))
    found = np.concatenate([shards.pack(index).doc_ids for index in range(len(shards))]) - 2**40
    assert sorted(found.tolist()) == [0, 3, 3, 3, 7]
    one = make_documents().take(np.array([3]))
    alone = open_shards(write(tmp_path / "one", one))
    labels = sum(int(open_shards(tmp_path / "train").num_labels[index]) for index in range(len(shards)))
    others = open_shards(write(tmp_path / "others", make_documents().take(np.array([7, 0]))))
    assert labels == 3 * int(alone.num_labels.sum()) + int(others.num_labels.sum())


def test_threads_do_not_change_the_bytes(tmp_path: Path, folder: Path) -> None:
    expected = file_bytes(folder)
    assert len(expected) > 5
    for threads in (2, 5):
        again = write(tmp_path / str(threads), make_documents(), tokens_per_shard=300, threads=threads)
        assert file_bytes(again) == expected
    other = write(tmp_path / "other", make_documents(seed=1), tokens_per_shard=300)
    assert file_bytes(other) != expected, "control"


def test_disk_is_at_most_eight_and_a_half_bytes_per_token(tmp_path: Path) -> None:
    """Ids and labels take 8; the rest is what each document and each file cost, so documents must not be tiny."""
    documents = make_documents(3000, mean_length=150)
    content = file_bytes(write(tmp_path / "train", documents, seq_len=2048))
    per_token = sum(map(len, content.values())) / int(documents.lengths.sum())
    assert 8 < per_token <= 8.5
    tiny = make_documents(3000, mean_length=4)
    content = file_bytes(write(tmp_path / "tiny", tiny, seq_len=2048))
    assert sum(map(len, content.values())) / int(tiny.lengths.sum()) > 8.5, "control: the bound is not met by itself"


def test_the_count_differs_where_first_tokens_are_supervised(folder: Path) -> None:
    """Control: counting every label, first tokens of documents included, gives another number."""
    shards = open_shards(folder)
    assert int(shards.num_labels.sum()) < sum(int((shards.pack(i).labels != -100).sum()) for i in range(len(shards)))


def test_reading_a_pack_copies_nothing(folder: Path) -> None:
    row = open_shards(folder).pack(0)
    for array in (row.input_ids, row.labels, row.seq_lens, row.doc_ids, row.source_ids):
        assert not array.flags.owndata
        assert not array.flags.writeable


@pytest.mark.parametrize("index", [-1, 10_000])
def test_no_such_pack(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        open_shards(folder).pack(index)


def test_datasets_reads_the_same_rows(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded, shards = datasets.load_from_disk(str(folder)), open_shards(folder)
    lists = {"input_ids": "int32", "labels": "int32", "seq_lens": "int32", "doc_ids": "int64", "source_ids": "int16"}
    expected = {name: datasets.List(datasets.Value(dtype)) for name, dtype in lists.items()}
    assert loaded.features == {**expected, "num_labels": datasets.Value("int32")}
    assert list(loaded.features) == ["input_ids", "labels", "seq_lens", "num_labels", "doc_ids", "source_ids"]
    assert len(loaded) == len(shards)
    for index in (0, len(shards) // 2, len(shards) - 1):
        row = shards.pack(index)
        assert loaded[index]["input_ids"] == row.input_ids.tolist()
        assert loaded[index]["doc_ids"] == row.doc_ids.tolist()
        assert loaded[index]["num_labels"] == row.num_labels


def test_reading_imports_neither_torch_nor_datasets(folder: Path) -> None:
    code = (
        "import sys; from data_prep.shards import open_shards; open_shards(sys.argv[1]).pack(0); "
        "sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.arrow"))[0]


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def swap_shards(folder: Path) -> None:
    one, two = sorted(folder.glob("*.arrow"))[:2]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def claim_one_pack_less(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards=[{**shards[0], "packs": shards[0]["packs"] - 1}, *shards[1:]])


def forget_last_shard(folder: Path) -> None:
    edit_manifest(folder, shards=json.loads((folder / "manifest.json").read_text())["shards"][:-1])


def forget(key: str) -> Callable[[Path], None]:
    def tear(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[key]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return tear


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"no {key}": (forget(key), f"'{key}': field required") for key in NEEDED},
    "shards is text": (lambda f: edit_manifest(f, shards="x"), "'shards': input should be a valid list"),
    "a shard is text": (lambda f: edit_manifest(f, shards=["x"]), "'shards.0': input should be"),
    "a shard without digest": (
        lambda f: edit_manifest(f, shards=[{"file": "a", "packs": 1, "bytes": 1}]),
        "'shards.0.sha256': field required",
    ),
    "totals is a number": (lambda f: edit_manifest(f, totals=7), "'totals': input should be"),
    "seq_len is text": (lambda f: edit_manifest(f, seq_len="40"), "'seq_len': input should be a valid integer"),
    "tokenizer is a list": (lambda f: edit_manifest(f, tokenizer=[]), "'tokenizer': input should be"),
    "a source without name": (lambda f: edit_manifest(f, sources=[{}]), "'sources.0.name': field required"),
    "manifest nested deep": (lambda f: (f / "manifest.json").write_text("[" * 5000), "cannot be read"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text('{"schema'), "cannot be read"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "schema_version"),
    "another schema": (lambda f: edit_manifest(f, schema_version=99), "schema_version 99"),
    "shard lost": (lambda f: first_shard(f).unlink(), "missing"),
    "shard cut": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-100]), "bytes"),
    "shard empty": (lambda f: first_shard(f).write_bytes(b""), "0 bytes"),
    "shard zeroed": (lambda f: first_shard(f).write_bytes(bytes(first_shard(f).stat().st_size)), "shard"),
    "shards swapped": (swap_shards, "manifest says"),
    "pack count": (claim_one_pack_less, "packs"),
    "shard not listed": (forget_last_shard, "packs"),
}


@pytest.mark.parametrize("name", TEARS)
def test_a_torn_set_is_refused(folder: Path, name: str) -> None:
    open_shards(folder)
    tear, words = TEARS[name]
    tear(folder)
    with pytest.raises(UserError) as caught:
        open_shards(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_the_folder_above_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_shards(folder / "none")
    with pytest.raises(UserError, match="did you mean its train/"):
        open_shards(folder.parent)


def test_one_changed_byte_is_found_by_its_digest(folder: Path) -> None:
    verify_digests(open_shards(folder))
    path = first_shard(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shards: Shards = open_shards(folder)
    with pytest.raises(UserError, match="sha256"):
        verify_digests(shards)
