"""What a review of data preparation found: each test fails without its mend."""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep import build, identity, readers
from data_prep.at_once import encode_at_once
from data_prep.blocks import Block, make_encoder
from data_prep.corpus import gather
from data_prep.documents import Encoded
from data_prep.encode import encode_examples, reference_document
from data_prep.pack import pack
from data_prep.probe import compare_encoders
from data_prep.report import SourceFate
from data_prep.spill import work_folder
from sft.errors import UserError, run_command
from sft.prep_options import PrepConfig, Source
from sft.tokenizer import load_tokenizer
from tests.prep_support import WORDS, alpaca_rows, answer, documents, flags, prepare, write_json, write_jsonl
from tests.tiny import make_tokenizer

ADDED = {
    "whole words": (
        None,
        [AddedToken("zork", single_word=True, special=False)],
        ["a zork b", "azorkb", "zork_", "zork"],
    ),
    "normalised after the others": (
        None,
        [
            AddedToken("zork", normalized=False, special=False),
            AddedToken("rkx", normalized=True, special=False),
            AddedToken("xzo", normalized=False, special=False),
        ],
        ["zorkxzork", "ozörkxzork", "a rkx b"],
    ),
    "decoded to other text": (normalizers.NFC(), [AddedToken("zörk", special=False)], ["a zörk b", "zörk"]),
}


def byte_bpe(folder: Path, normalizer: normalizers.Normalizer | None, added: list[AddedToken]) -> Path:
    """A byte-level BPE with added tokens that no probe text and no first row holds."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f"{a} {b}\n" for a in WORDS for b in WORDS], trainer)
    tokenizer.add_tokens(added)
    return saved(tokenizer, folder, {"eos_token": "<|end|>"})


def saved(tokenizer: Tokenizer, folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_that_gigatoken_reads_otherwise_are_the_references_to_judge(tmp_path: Path, kind: str) -> None:
    """Their bytes are right either way, so only the reference can tell."""
    normalizer, added, texts = ADDED[kind]
    tokenizer = load_tokenizer(byte_bpe(tmp_path / "model", normalizer, added))
    fast, _ = compare_encoders(tokenizer, ["a task", "a response"])
    assert fast is not None, "the probe alone does not see it"
    examples = [answer("a task\n", text) for text in ["plain", *texts]]
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    assert proved[0]
    for number, example in enumerate(examples):
        if proved[number]:
            assert encoded.document(number) == reference_document(tokenizer, example), example
    found, reasons = encode_examples(tokenizer, fast, examples)
    expected, expected_reasons = encode_examples(tokenizer, None, examples)
    assert found.ids.tolist() == expected.ids.tolist()
    assert reasons == expected_reasons


def test_plain_added_tokens_are_still_encoded_at_once(tmp_path: Path) -> None:
    """Qwen's <think> is such a token: sending each of its rows to the reference would cost most of the speed."""
    added = [AddedToken("<think>", normalized=False, special=False), AddedToken("    ", special=False)]
    tokenizer = load_tokenizer(byte_bpe(tmp_path / "model", None, added))
    fast, _ = compare_encoders(tokenizer, ["a task"])
    assert fast is not None
    examples = [answer("a task\n", "<think>\nyes    no"), answer("a task\n<think>", "ok")]
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    assert proved.all()
    assert {tokenizer.backend.token_to_id("<think>"), tokenizer.backend.token_to_id("    ")} <= set(
        encoded.ids.tolist()
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_pieces_with_and_without_a_space_in_front_are_encoded_at_once(tmp_path: Path, scheme: str) -> None:
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    loaded = load_tokenizer(saved(tokenizer, tmp_path / "model", names))
    fast, _ = compare_encoders(loaded, ["a task"])
    assert fast is not None
    examples = [answer("a task\n", "yes"), answer("a task", " no é"), answer("", "plain")]
    encoded, proved = encode_at_once(loaded, fast, examples)
    assert proved.all()
    expected, _ = encode_examples(loaded, None, examples)
    assert np.array_equal(encoded.ids, expected.ids)


def test_packing_very_long_packs_takes_no_time_per_possible_length() -> None:
    """4,000 documents that fit nowhere together; looking through all shorter lengths for each takes half a minute."""
    lengths = np.random.default_rng(0).integers(2**23 + 1, 2**24, 4000).astype(np.int32)
    start_s = time.process_time()
    packs = pack(lengths, 2**24)
    spent_s = time.process_time() - start_s
    assert len(packs) == 4000
    assert spent_s < 10


def one_block() -> Block:
    lengths, runs = np.array([3, 4], dtype=np.int32), np.array([[1, 3], [2, 4]], dtype=np.int32)
    return Block(
        source_id=0,
        num_rows=2,
        rows=np.arange(2, dtype=np.int32),
        keys=np.arange(4, dtype=np.uint64).reshape(2, 2),
        encoded=Encoded(np.arange(7, dtype=np.int32), lengths, np.ones(2, dtype=np.int32), runs),
        truncated=np.zeros(2, dtype=np.bool_),
        signatures=None,
        groups=(),
        dropped=(),
        overlaps=(),
    )


def test_a_block_with_any_damaged_byte_is_not_used_again(tmp_path: Path) -> None:
    """A host that loses power can leave a file with its name and size and zeros in it."""
    out = tmp_path / "out"

    def num_finished() -> int:
        with suppress(OSError), work_folder(out, "key") as work:
            found.append(len(list(work.finished())))
            raise OSError("so that the work is kept")
        return found[-1]

    found: list[int] = []
    with suppress(OSError), work_folder(out, "key") as work:
        work.add(0, one_block())
        raise OSError
    [file] = (tmp_path / "out.work" / "blocks").iterdir()
    whole = file.read_bytes()
    tokens = (tmp_path / "out.work" / "tokens.bin").read_bytes()
    assert num_finished() == 1, "control: the whole block is used"
    for at in range(8, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (tmp_path / "out.work" / "tokens.bin").write_bytes(tokens)
        assert num_finished() == 0, at


def test_a_lock_whose_file_was_removed_before_it_was_taken_protects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock and taking it, the job that held it may end and remove the folder."""
    flock = fcntl.flock

    def late(file: TextIO, how: int) -> None:
        shutil.rmtree(tmp_path / "out.work")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another sft prep finished with it"), work_folder(tmp_path / "out", "key"):
        pass


def content_key_of(tmp_path: Path, rows: Path, **changes: Any) -> str:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    config = PrepConfig.model_validate({"sources": [str(rows)], "tokenizer": str(tokenizer.path), "out": "out"})
    encoder = make_encoder(config, replace(tokenizer, **changes))
    return identity.content_key(config, encoder, identity.find_inputs(config))


def test_the_content_key_counts_what_libraries_make_of_the_tokenizers_files(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(3))
    key = content_key_of(tmp_path, rows)
    other = load_tokenizer(make_tokenizer(tmp_path / "other", merges=[("i", "s")]))
    assert key == content_key_of(tmp_path, rows)
    assert key != content_key_of(tmp_path, rows, backend=other.backend), "same files, other ids"
    assert key != content_key_of(tmp_path, rows, bos=())
    assert key != content_key_of(tmp_path, rows, special_ids=frozenset({1, 2}))


def test_the_content_key_counts_how_a_file_is_read(tmp_path: Path) -> None:
    """An array on one line is rows in .json, and one malformed row in .jsonl."""
    array = write_json(tmp_path / "rows.json", alpaca_rows(3))
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(array.read_bytes())
    assert content_key_of(tmp_path, array) != content_key_of(tmp_path, lines)


def test_blocks_of_another_cut_or_of_other_packages_are_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of another size, the rows behind the finished ones would be taken from the wrong place."""
    key = identity.blocks_key("key")
    assert key == identity.blocks_key("key") != identity.blocks_key("other")
    monkeypatch.setattr(identity, "version", lambda name: "0.0")
    assert key != identity.blocks_key("key")
    monkeypatch.undo()
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(60))
    options: dict[str, Any] = {"sources": rows, "tokenizer": tokenizer}
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    expected = documents(prepare(tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_splits", broken)
        assert run_command(build.main, flags(**options, seq_len=1024, workers=1, out=tmp_path / "out")) == 2
    assert len(list((tmp_path / "out.work" / "blocks").iterdir())) > 5, "control: finished blocks are there"
    monkeypatch.setattr(readers, "BLOCK_BYTES", 3500)
    assert documents(prepare(tmp_path / "out", **options)) == expected


def broken(*_arguments: object, threads: int) -> None:
    raise OSError("the disk is full")


def test_a_lock_that_workers_of_a_killed_job_hold_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """They inherit it by fork, and end when they next look for their job: a job run again at once must not fail."""
    (tmp_path / "out.work").mkdir()
    worker = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{worker}; time.sleep(0.7)", str(tmp_path / "out.work" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as held:
        assert held.stdout is not None
        held.stdout.readline()
        start_s = time.monotonic()
        with work_folder(tmp_path / "out", "key"):
            assert time.monotonic() - start_s > 0.3, "control: it was held"


def test_one_long_value_of_balance_by_does_not_make_all_of_them_long() -> None:
    """An array of texts is as wide as its longest: 2,000 rows with one of 100,000 characters would take 800 MB."""
    block = replace(one_block(), groups=("x" * 100_000, "y"))
    fates = [SourceFate("a", Source(path="a.json", balance_by="kind"))]
    corpus = gather([block] * 1000, fates)
    assert corpus.groups[0].nbytes < 100_000
    assert len(np.unique(corpus.groups[0])) == 2
