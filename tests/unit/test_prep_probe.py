"""Which encoder a build uses: gigatoken only where its ids are the reference's on every text, and it says so."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep import build
from data_prep.fast import FastTokens, count_equal, load_fast
from data_prep.probe import HARD_TEXTS, PROBE_TEXTS, compare_conversion, compare_encoders, probe_ids
from data_prep.specials import encode_with_specials
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.prep_support import byte_bpe_tokenizer, byte_ids, needs_shared, sentencepiece_tokenizer, shared_examples
from tests.tiny import SHARED, make_tokenizer

FIXED = len(PROBE_TEXTS) + len(HARD_TEXTS)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces")))


def word_level(folder: Path) -> Path:
    """A kind of tokenizer that gigatoken does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return saved(tokenizer, folder)


def unigram(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    return saved(Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0)), folder)


def saved(tokenizer: object, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (make_tokenizer, "transformers"),
        (byte_bpe_tokenizer, "transformers"),
        (sentencepiece_tokenizer, "sentencepiece"),
    ],
)
def test_gigatoken_is_used_where_it_is_equal(tmp_path: Path, make: object, reference: str) -> None:
    fast, told = compare_encoders(load_tokenizer(make(tmp_path / "tokenizer")), ["write the task", "é"])
    assert fast is not None
    assert told["used"].startswith("gigatoken ")
    assert (told["reference"], told["supported_by_gigatoken"]) == (reference, True)
    assert told["equal"] == told["texts"] == FIXED + 2


@pytest.mark.parametrize("make", [word_level, unigram])
def test_a_kind_that_gigatoken_does_not_know(tmp_path: Path, make: object) -> None:
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer"))
    assert tokenizer.encode("a b")[0] == 2
    fast, told = compare_encoders(tokenizer, ["a b"])
    assert fast is None
    assert told == {
        "used": "transformers",
        "reference": "transformers",
        "supported_by_gigatoken": False,
        "texts": FIXED + 1,
        "equal": 0,
    }


def test_a_tokenizer_that_gigatoken_reads_otherwise(tmp_path: Path) -> None:
    """It splits words before it merges, even where the tokenizer says use_regex: false."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "merges", merges=[("Ċ", "Ċ"), ("Ċ", "x")]))
    fast, told = compare_encoders(tokenizer, [])
    assert fast is None
    assert (told["used"], told["supported_by_gigatoken"]) == ("transformers", True)
    assert 0 < told["equal"] < told["texts"]


@pytest.mark.parametrize("where", ["a fixed text", "a row"])
def test_one_id_that_differs_is_enough(
    byte_level: Tokenizer, pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    encode = FastTokens.encode
    doctored = "the only row" if where == "a row" else HARD_TEXTS[-1]

    def broken(self: FastTokens, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = encode(self, texts)
        ids = ids.copy()
        if doctored in texts:
            ids[offsets[list(texts).index(doctored) + 1] - 1] += 1
        return ids, offsets

    for tokenizer in (byte_level, pieces):
        assert compare_encoders(tokenizer, ["the only row"])[0] is not None
    monkeypatch.setattr(FastTokens, "encode", broken)
    for tokenizer in (byte_level, pieces):
        fast, told = compare_encoders(tokenizer, ["the only row"])
        assert fast is None
        assert told["used"] == told["reference"]
        assert (told["texts"], told["equal"]) == (FIXED + 1, FIXED)


def test_another_split_that_spells_the_same_is_seen(pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every id spells is right then, so that only this comparison can tell."""
    fast = load_fast(pieces)
    assert fast is not None
    by_bytes = {byte: fast.pieces.to_pylist().index(bytes([byte])) for byte in range(3, 127) if byte != 32}

    def letter_by_letter(_: FastTokens, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = [[by_bytes[byte] for byte in text.encode()] for text in texts]
        return np.concatenate(found).astype(np.int32), np.cumsum([0, *map(len, found)])

    assert count_equal(fast, pieces, ["request", "task"]) == 2
    monkeypatch.setattr(FastTokens, "encode", letter_by_letter)
    assert count_equal(fast, pieces, ["request", "task"]) == 0


@needs_shared
@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_the_shared_tokenizers_are_equal(name: str) -> None:
    texts = [example.texts[0] for example in shared_examples()[::20]]
    fast, told = compare_encoders(load_tokenizer(SHARED / "tokenizers" / name), texts)
    assert fast is not None
    assert told["equal"] == told["texts"] == FIXED + len(texts)


def test_conversion_is_compared_where_there_is_a_sentencepiece_model(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    assert compare_conversion(byte_level, ["a"]) is None
    told = compare_conversion(pieces, ["write the task", "the request"])
    assert told is not None
    assert (told["used"], told["texts"]) == ("sentencepiece", 2)


def test_control_the_conversion_of_another_tokenizer(byte_level: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json of another tokenizer beside the tokenizer.model: no text agrees."""
    for source, name in [
        (byte_level, "tokenizer.json"),
        (byte_level, "tokenizer_config.json"),
        (pieces, "tokenizer.model"),
    ]:
        (tmp_path / name).write_bytes((source.path / name).read_bytes())
    told = compare_conversion(load_tokenizer(tmp_path), ["write the task", "the request"])
    assert told is not None
    assert (told["used"], told["texts"], told["equal"]) == ("transformers", 2, 0)


def test_probe_names_texts_and_ids(byte_level: Tokenizer) -> None:
    probe = probe_ids(byte_level)
    assert [item["text"] for item in probe] == list(PROBE_TEXTS)
    assert all(item["ids"] == byte_ids(str(item["text"])) for item in probe)


def test_a_chat_template_does_not_change_which_encoder_is_used(pieces: Tokenizer) -> None:
    """sentencepiece itself takes the names of special tokens for text, which is not what a chat template means."""
    texts = ["<s>write the task</s>", "the request</s><s>a response</s>"]
    fast, told = compare_encoders(pieces, texts)
    assert fast is not None
    assert told["equal"] == told["texts"] == FIXED + len(texts)
    as_text = pieces.sentencepiece.encode("<s>request</s>")
    assert as_text != encode_with_specials(pieces, "<s>request</s>")


def conversion_of_a_chat(tmp_path: Path, folder: Path) -> dict[str, object]:
    """What the report of a job with one chat row says of transformers and sentencepiece."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    turns = [{"role": "user", "content": "write the task"}, {"role": "assistant", "content": "the response"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    out = tmp_path / f"{folder.name}-out"
    config = tmp_path / "prep.yaml"
    config.write_text(
        f"sources: [{{path: {tmp_path / 'rows.jsonl'}, format: messages}}]\ntokenizer: {folder}\n"
        f"template: {template}\nseq_len: 512\nworkers: 1\nout: {out}\n"
    )
    build.main(["--config", str(config)])
    told: dict[str, object] = json.loads((out / "report.json").read_text())["tokenizer"]["conversion"]
    return told


def test_space_marks_behind_special_tokens_matter_where_the_ids_are_sentencepieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever loads a bare tokenizer.model with transformers gets other ids behind `</s>`: that is told. Where a
    tokenizer.json is beside it, the ids are transformers' own, and the turns' text alone is compared."""
    bare = sentencepiece_tokenizer(tmp_path / "bare")
    both = tmp_path / "both"
    shutil.copytree(bare, both)
    (both / "tokenizer.json").write_text(load_tokenizer(bare).backend.to_str())
    told = conversion_of_a_chat(tmp_path, both)
    assert (told["used"], told["texts"], told["equal"]) == ("transformers", 2, 2)
    assert "WARNING" not in capsys.readouterr().err
    told = conversion_of_a_chat(tmp_path, bare)
    assert (told["used"], told["texts"], told["equal"]) == ("sentencepiece", 1, 0)
    assert (
        "WARNING: transformers and sentencepiece give different ids on 1 of the first 1 texts"
        in capsys.readouterr().err
    )
