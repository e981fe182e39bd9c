"""Offline augmentation with tiny models made here. Run: pytest tests/unit/test_augment.py"""

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft import augment, augment_output
from sft.augment_models import generate, load_seq2seq
from sft.augment_options import AugmentConfig
from sft.augment_rows import (
    BLANK,
    DUPLICATE,
    EMPTY,
    INVALID_UNICODE,
    MEANING,
    SEVERAL_LINES,
    TOO_LONG,
    UNCHANGED,
    UNFINISHED,
    UNKNOWN_CHARACTERS,
    Dropped,
    to_line,
    written_variants,
)
from sft.errors import UserError, run_command
from tests import tiny
from tests.prep_support import flags, refused, write_jsonl

WORDS = ["say", "item", "red", "green", "two", "paraphrase:", "0 1 2 3 4 5 6 7 8 9"]
ENDS_SOON = {"exponential_decay_length_penalty": (4, 1.5)}
"""Random weights hardly ever choose the end token by themselves."""


def train_pieces(folder: Path, name: str, words: list[str]) -> Path:
    import sentencepiece

    corpus = folder / f"{name}.txt"
    corpus.write_text("\n".join(f"{a} {b}" for a in words for b in words))
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / name), vocab_size=60, hard_vocab_limit=False, minloglevel=2, **ids
    )
    corpus.unlink()
    return folder / f"{name}.model"


def save(model, folder: Path, unknown: int, pad: int) -> Path:
    model.generation_config.update(**ENDS_SOON, suppress_tokens=[unknown, pad])
    model.save_pretrained(folder)
    return folder


def make_t5(folder: Path, seed: int = 0) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True)
    train_pieces(folder, "spiece", WORDS)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, decoder_start_token_id=0, tie_word_embeddings=False, initializer_factor=3.0, **sizes)
    )
    # ids without a piece decode to nothing
    model.lm_head.weight.data[37:] = 0
    return save(model, folder, unknown=2, pad=0)


def make_marian(folder: Path, words: list[str], target_words: list[str], seed: int = 0) -> Path:
    """Laid out like Helsinki-NLP's opus-mt: source.spm, target.spm, one vocab.json, forced_eos_token_id."""
    from sentencepiece import SentencePieceProcessor
    from transformers import MarianConfig, MarianMTModel

    folder.mkdir(parents=True)
    pieces = ["</s>", "<unk>"]
    for name, own in (("source", words), ("target", target_words)):
        spm = train_pieces(folder, name, own).rename(folder / f"{name}.spm")
        processor = SentencePieceProcessor(model_file=str(spm))
        new = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
        pieces += [piece for piece in new if piece not in [*pieces, "<pad>"]]
    pad = len(pieces)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate([*pieces, "<pad>"])}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "forced_eos_token_id": 0}
    torch.manual_seed(seed)
    model = MarianMTModel(
        MarianConfig(
            vocab_size=pad + 1,
            d_model=16,
            max_position_embeddings=64,
            scale_embedding=True,
            init_std=0.5,
            **sizes,
            **ids,
        )
    )
    return save(model, folder, unknown=1, pad=pad)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5") / "tiny-t5")


@pytest.fixture(scope="module")
def marians(tmp_path_factory):
    """There and back: small letters to capitals, and the reverse."""
    folder = tmp_path_factory.mktemp("marian")
    capitals = [word.upper() for word in WORDS]
    # pieces of either side in both, as the vocabulary is shared in any case
    return [
        make_marian(folder / "there", WORDS + capitals, capitals, seed=1),
        make_marian(folder / "back", capitals + WORDS, WORDS, seed=2),
    ]


@pytest.fixture
def rows(tmp_path):
    """Twenty rows of unequal length; every third has an id."""
    rows = [
        {
            **({"id": f"x{index}"} if index % 3 == 0 else {}),
            "instruction": "say item " + " two red" * (index % 4) + f" {index}",
            "input": "",
            "output": f"def f(x):\n    return {index}",
        }
        for index in range(20)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def run(rows: Path, out: Path, **options) -> list[dict]:
    augment.main(flags(input=rows, out=out, **{"max_new_tokens": 40, "batch_size": 2, **options}))
    return tiny.read_jsonl(out)


def job(out: Path) -> dict:
    return json.loads(Path(f"{out}.job").read_text())


def test_paraphrases_keep_every_field_and_name_their_original(rows, t5, tmp_path):
    found = run(rows, tmp_path / "out.jsonl", models=t5, variants=3)
    originals = {row.get("id", number): row for number, row in enumerate(tiny.read_jsonl(rows), start=1)}
    assert len(found) > 20
    for row in found:
        original = originals[row["augmented_from"]]
        assert row["augmentation"] == "paraphrase:tiny-t5"
        assert row["variant"] in (0, 1, 2)
        assert row["instruction"].strip()
        assert row["instruction"] != original["instruction"]
        added = {"instruction", "augmented_from", "augmentation", "variant"}
        assert {**original, **{key: row[key] for key in added}} == row
    places = [(list(originals).index(row["augmented_from"]), row["variant"]) for row in found]
    assert places == sorted(set(places))


@pytest.mark.parametrize("method", ["paraphrase", "back_translation"])
def test_every_variant_is_accounted_for(method, rows, t5, marians, tmp_path, capsys):
    models = t5 if method == "paraphrase" else ",".join(map(str, marians))
    found = run(rows, tmp_path / "out.jsonl", method=method, models=models, variants=4)
    counts = job(tmp_path / "out.jsonl")
    assert len(found) == counts["variants"] > 0
    assert counts["variants"] + sum(counts["dropped"].values()) == 4 * 20
    assert f"20 rows in, {len(found)} variants out, {80 - len(found)} dropped" in capsys.readouterr().out


def alone(folder: Path, text: str, mask_padding: bool = True, pad_to: int = 0) -> str | None:
    """What transformers itself answers to one text, greedily; None where it does not end."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = tokenizer([text], return_tensors="pt", padding="max_length" if pad_to else False, max_length=pad_to or None)
    mask = batch["attention_mask"] if mask_padding else torch.ones_like(batch["attention_mask"])
    model.generation_config.forced_eos_token_id = None
    ids = model.generate(input_ids=batch["input_ids"], attention_mask=mask, do_sample=False, max_new_tokens=40)[0]
    if model.generation_config.eos_token_id not in ids[1:].tolist():
        return None
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def greedy(seq2seq, texts: list[str], variants: int = 1, beams: int = 1) -> list[list[str | Dropped]]:
    config = AugmentConfig(input="", models=["m"], temperature=0, beams=beams, max_new_tokens=40, out="o.jsonl")
    return generate(seq2seq, texts, variants, config)


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_a_batch_gives_what_each_text_gives_alone(kind, t5, marians):
    folder = t5 if kind == "t5" else marians[0]
    texts = ["say item 1", "red two green say item two two red 5 7", "say", "green item 7 say 3"]
    expected = [alone(folder, text) for text in texts]
    found = [row[0] for row in greedy(load_seq2seq(str(folder), torch.device("cpu")), texts)]
    assert found == expected
    assert len(set(expected) - {None, ""}) > 2, "the model must listen to its input"
    # control: without the mask, padding changes the answer
    assert [alone(folder, text, mask_padding=False, pad_to=20) for text in texts] != expected


def test_back_translation_is_the_second_model_on_the_first_ones_text(rows, marians, tmp_path):
    found = run(
        rows, tmp_path / "out.jsonl", method="back_translation", models=",".join(map(str, marians)), temperature=0
    )
    originals = {row.get("id", number): row for number, row in enumerate(tiny.read_jsonl(rows), start=1)}
    assert len(found) > 2
    for row in found[:4]:
        assert row["augmentation"] == "back_translation:there,back"
        assert row["instruction"] == alone(
            marians[1], alone(marians[0], originals[row["augmented_from"]]["instruction"])
        )


def test_beams_give_different_variants_without_sampling(t5):
    seq2seq = load_seq2seq(str(t5), torch.device("cpu"))
    [several] = greedy(seq2seq, ["say item 1"], variants=3, beams=3)
    assert len(set(several)) == 3
    assert greedy(seq2seq, ["say item 1"], variants=3, beams=3) == [several]


def test_several_fields_and_blank_ones(t5, tmp_path):
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"instruction": "say", "input": "red 1"},
            {"instruction": "say", "input": " "},
            {"instruction": "", "input": ""},
        ],
    )
    found = run(rows, tmp_path / "out.jsonl", models=t5, fields="instruction,input", variants=4)
    first, second = ([row for row in found if row["augmented_from"] == number] for number in (1, 2))
    assert first[0]["input"] not in ("red 1", "")
    assert first[0]["instruction"] != "say"
    assert {row["input"] for row in second} == {" "}
    assert job(tmp_path / "out.jsonl")["dropped"][BLANK] == 4


def test_the_prefix_is_part_of_what_the_model_reads(rows, t5, tmp_path):
    default = run(rows, tmp_path / "a.jsonl", models=t5)
    assert run(rows, tmp_path / "b.jsonl", models=t5, prefix="paraphrase: ") == default
    assert run(rows, tmp_path / "c.jsonl", models=t5, prefix="") != default


def test_equal_seeds_give_equal_bytes_and_others_do_not(rows, t5, tmp_path):
    names = {"a": 0, "b": 0, "c": 1}
    for name, seed in names.items():
        torch.manual_seed(len(name) + seed)  # what came before must not matter
        run(rows, tmp_path / f"{name}.jsonl", models=t5, seed=seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in names)
    assert a == b != c


def interrupt(monkeypatch, save: int, *, before: bool) -> None:
    """Ctrl-C at the `save`-th window, just before or just after it is recorded."""
    saves = iter(range(1, 100))
    real = augment_output.save_progress

    def save_progress(file, *rest):
        stop = next(saves) == save
        if stop and before:
            file.flush()
            raise KeyboardInterrupt
        real(file, *rest)
        if stop:
            file.write(b'{"half a')
            file.flush()
            raise KeyboardInterrupt

    monkeypatch.setattr(augment, "save_progress", save_progress)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("save", [1, 2, 3])
def test_a_job_that_goes_on_writes_the_same_bytes(rows, t5, tmp_path, monkeypatch, capsys, save, before):
    monkeypatch.setattr(augment, "WINDOW_BATCHES", 4)  # 20 rows: windows of 8, 8 and 4
    options = {"models": t5, "variants": 2}
    run(rows, tmp_path / "whole.jsonl", **options)
    out = tmp_path / "cut.jsonl"
    with monkeypatch.context() as patch:
        interrupt(patch, save, before=before)
        with pytest.raises(KeyboardInterrupt):
            run(rows, out, **options)
    assert not out.exists()
    assert Path(f"{out}.partial").stat().st_size > 0
    capsys.readouterr()
    run(rows, out, **options)
    done = min(20, 8 * (save - before))
    assert (f"goes on after {done} of 20 rows" in capsys.readouterr().out) == (done > 0)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert job(out) == job(tmp_path / "whole.jsonl")
    assert not Path(f"{out}.partial").exists()


def test_going_on_with_windows_that_write_nothing(rows, tmp_path, hook, monkeypatch):
    name = hook("def f(rows): return [[{'output': 'x'}] if row['instruction'].endswith(' 0') else [] for row in rows]")
    monkeypatch.setattr(augment, "WINDOW_BATCHES", 1)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, before=False)
        with pytest.raises(KeyboardInterrupt):
            run_hook(rows, tmp_path / "out.jsonl", f"{name}:f")
    assert len(run_hook(rows, tmp_path / "out.jsonl", f"{name}:f")) == 1
    assert job(tmp_path / "out.jsonl")["size_bytes"] == (tmp_path / "out.jsonl").stat().st_size


def test_control_other_windows_give_other_bytes(rows, t5, tmp_path, monkeypatch):
    """Else the test above could not notice a job that goes on in the middle of a window."""
    run(rows, tmp_path / "a.jsonl", models=t5)
    monkeypatch.setattr(augment, "WINDOW_BATCHES", 3)
    assert run(rows, tmp_path / "b.jsonl", models=t5) != tiny.read_jsonl(tmp_path / "a.jsonl")


HOOK = """
import os, random, signal
from pathlib import Path

def shout(rows):
    if any(row["instruction"].endswith(" 17") for row in rows) and Path("kill").exists():
        Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [[{"instruction": row["instruction"].upper() + f" {random.random()}"}, {"output": "x"}] for row in rows]

def in_place(rows):
    for row in rows:
        row["instruction"] = row["instruction"].title()
    return [[row] for row in rows]
"""


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """Writes a module of its own name for each test: Python would remember the first."""
    name = f"hook_{tmp_path.name.replace('-', '_')}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(code: str = HOOK) -> str:
        (tmp_path / f"{name}.py").write_text(code)
        return name

    yield write
    sys.modules.pop(name, None)


def test_sigkill_in_a_hook_and_the_same_command_again(rows, tmp_path, hook):
    name = hook()
    command = [
        sys.executable,
        "-m",
        "sft.augment",
        *flags(input=rows, method="hook", hook=f"{name}:shout", batch_size=1),
    ]
    (tmp_path / "kill").touch()
    killed = tiny.run([*command, "--out", "cut.jsonl"], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut.jsonl").exists()
    again = tiny.run([*command, "--out", "cut.jsonl"], cwd=tmp_path)
    assert "goes on after 16 of 20 rows" in again.stdout, again.stderr
    run(rows, tmp_path / "whole.jsonl", method="hook", hook=f"{name}:shout", max_new_tokens=256, batch_size=1)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({row["instruction"].split()[-1] for row in tiny.read_jsonl(tmp_path / "cut.jsonl")}) > 20


def run_hook(rows: Path, out: Path, hook: str, **options) -> list[dict]:
    return run(rows, out, method="hook", hook=hook, **{"max_new_tokens": 256, **options})


def test_a_hook_replaces_the_fields_that_it_returns(rows, tmp_path, hook):
    name = hook()
    found = run_hook(rows, tmp_path / "out.jsonl", f"{name}:shout")
    assert found[0]["instruction"].startswith("SAY ITEM  0 0.")
    assert (found[0]["output"], found[0]["augmented_from"]) == ("def f(x):\n    return 0", "x0")
    assert (found[1]["output"], found[1]["variant"]) == ("x", 1)
    assert found[2]["augmented_from"] == 2
    assert found[0]["augmentation"] == f"hook:{name}:shout"


def test_a_hook_that_works_in_place_cannot_hide_the_original(rows, tmp_path, hook):
    found = run_hook(rows, tmp_path / "out.jsonl", f"{hook()}:in_place")
    assert len(found) == 20, "compared with the changed rows, every variant would equal its original"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def f(rows): return None",
            "it returned NoneType, expected a list with one list of variants for each of 2 rows",
        ),
        ("def f(rows): return [[]]", "it returned 1 items"),
        ("def f(rows): return [[{}], {}]", "for the batch from row 1 item 1 is {}, expected a list of dicts"),
        ("def f(rows): return [['a'], []]", "item 0 is ['a'], expected a list of dicts"),
        ("def f(rows): return [[{'variant': 1}], []]", "has the field 'variant'; leave it out"),
        ("def f(rows): return [[{1: 'a'}], []]", "has the field 1; leave it out"),
        ("def f(rows): return [[{'a': {1, 2}}], []]", "cannot be written as JSON"),
        ("def g(rows): return []", "has no function f"),
        ("f = 3", "has no function f"),
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    ],
)
def test_hooks_of_the_wrong_shape(rows, tmp_path, hook, capsys, code, message):
    argv = flags(input=rows, method="hook", hook=f"{hook(code)}:f", batch_size=2, out=tmp_path / "out.jsonl")
    line = refused(capsys, augment.main, argv)
    assert message in line
    assert not (tmp_path / "out.jsonl").exists()


def test_a_hooks_own_crash_keeps_its_traceback(rows, tmp_path, hook):
    with pytest.raises(ZeroDivisionError):
        run_hook(rows, tmp_path / "out.jsonl", f"{hook('def f(rows): 1 / 0')}:f")


def reasons(row: dict, variants: list) -> list[str]:
    return [out.reason if isinstance(out, Dropped) else "" for out in written_variants(1, row, variants, "test")]


def test_variants_that_are_not_worth_writing():
    row = {"instruction": "Say  it", "input": "", "n": 3}
    variants = [
        {"instruction": " Say it "},
        {"instruction": "Tell it"},
        {"instruction": "Tell  it\n"},
        {"instruction": "say it"},
        {"instruction": " \n"},
        {},
        {"instruction": "Say it", "n": 4},
        {"instruction": "Say it, all in one", "input": ""},
        {"new": "field"},
        Dropped(UNFINISHED),
    ]
    assert reasons(row, variants) == [UNCHANGED, "", DUPLICATE, "", EMPTY, BLANK, "", "", "", UNFINISHED]


def test_a_null_id_is_no_id():
    [kept] = written_variants(7, {"id": None, "a": "b"}, [{"a": "c"}], "test")
    assert kept["augmented_from"] == 7


def test_lines_are_readable_and_hold_any_text():
    assert to_line({"a": "中 é"}, "") == '{"a": "中 é"}\n'.encode()
    assert json.loads(to_line({"a": "\ud800"}, "")) == {"a": "\ud800"}
    with pytest.raises(UserError, match="row 3: cannot be written as JSON"):
        to_line({"a": float("nan")}, "row 3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("say\ntwo", SEVERAL_LINES),
        ("say {two}", UNKNOWN_CHARACTERS),
        ("say \ud800", INVALID_UNICODE),
        ("say two red " * 40, TOO_LONG),
        ("say two", None),
        ("say two\n", None),
    ],
)
def test_texts_that_the_model_cannot_rewrite_are_counted(marians, tmp_path, text, reason):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": text}, {"instruction": "say item 1"}])
    run(rows, tmp_path / "out.jsonl", method="back_translation", models=",".join(map(str, marians)), temperature=0)
    dropped = job(tmp_path / "out.jsonl")["dropped"]
    before = {SEVERAL_LINES, UNKNOWN_CHARACTERS, INVALID_UNICODE, TOO_LONG}
    assert before & set(dropped) == ({reason} if reason else set())


def test_a_text_that_was_cut_is_no_variant(marians, tmp_path):
    """Marian folders force the end token at the last position, which would make every cut text look whole."""
    assert json.loads((marians[0] / "generation_config.json").read_text())["forced_eos_token_id"] == 0
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "say item 1"}] * 3)
    models = ",".join(map(str, marians))
    assert run(rows, tmp_path / "out.jsonl", method="back_translation", models=models, max_new_tokens=2) == []
    assert job(tmp_path / "out.jsonl")["dropped"] == {UNFINISHED: 3}


def test_unknown_tokens_in_the_output_are_no_variant(t5):
    """They decode to nothing: "say {two}" would lose its braces without a word."""
    seq2seq = load_seq2seq(str(t5), torch.device("cpu"))
    seq2seq.model.generation_config.update(forced_bos_token_id=seq2seq.tokenizer.unk_token_id, suppress_tokens=None)
    assert greedy(seq2seq, ["say item 1"]) == [[Dropped(UNKNOWN_CHARACTERS)]]


def test_every_reason_has_a_meaning():
    from sft import augment_rows

    names = {value for name, value in vars(augment_rows).items() if name.isupper() and isinstance(value, str)}
    assert names == set(MEANING)


def test_the_finished_job_is_recognised_and_nothing_else_is_overwritten(rows, t5, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(rows, out, models=t5)
    content = out.read_bytes()
    capsys.readouterr()
    run(rows, out, models=t5)
    assert "is already finished, by the same command" in capsys.readouterr().out
    argv = flags(input=rows, models=t5, max_new_tokens=40, batch_size=2, out=out)
    assert "made otherwise: seed was 0, is 5; give another" in refused(capsys, augment.main, [*argv, "--seed", "5"])
    write_jsonl(rows, tiny.read_jsonl(rows)[1:])
    assert "made otherwise: input was" in refused(capsys, augment.main, argv)
    assert out.read_bytes() == content
    out.write_bytes(content + b"\n")
    assert "is no output of sft augment" in refused(capsys, augment.main, argv)
    Path(f"{out}.job").unlink()
    assert "is no output of sft augment" in refused(capsys, augment.main, argv)
    assert "is no output of sft augment" in refused(capsys, augment.main, [*argv, "--out", str(rows)])


def test_a_changed_model_is_another_job(rows, t5, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(t5, folder)
    run(rows, tmp_path / "out.jsonl", models=folder)
    make_t5(tmp_path / "other", seed=9)
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    argv = flags(input=rows, models=folder, max_new_tokens=40, batch_size=2, out=tmp_path / "out.jsonl")
    assert "made otherwise: models was" in refused(capsys, augment.main, argv)


def test_a_partial_file_of_other_settings_damaged_or_in_use(rows, t5, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(augment, "WINDOW_BATCHES", 2)
    out = tmp_path / "out.jsonl"
    argv = flags(input=rows, models=t5, max_new_tokens=40, batch_size=2, out=out)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, before=True)
        assert run_command(augment.main, argv) == 130
    partial = Path(f"{out}.partial")
    assert "out.jsonl.partial was begun otherwise: seed was 0, is 1; delete it" in refused(
        capsys, augment.main, [*argv, "--seed", "1"]
    )
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another sft augment writes it now" in refused(capsys, augment.main, argv)
    os.truncate(partial, 10)
    assert "is shorter than it was; delete it" in refused(capsys, augment.main, argv)
    partial.unlink()
    assert run(rows, out, models=t5) == run(rows, tmp_path / "whole.jsonl", models=t5)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bin_beside_other_tensors(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 48}))


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def foreign_tokenizer(folder: Path) -> None:
    (folder / "spiece.model").unlink()
    tiny.make_tokenizer(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (only_bin, "holds no *.safetensors weights; convert other formats to safetensors first"),
        (bin_beside_other_tensors, "cannot be loaded"),
        (wider, "in the shape that config.json asks for"),
        (torn, "cannot be loaded"),
        (foreign_tokenizer, "are all files of the folder of one model?"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "spiece.model").unlink(), "its tokenizer knows no words"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_model_folders_that_cannot_be_used(rows, t5, tmp_path, capsys, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(t5, folder)
    damage(folder)
    line = refused(capsys, augment.main, flags(input=rows, models=folder, out=tmp_path / "out.jsonl"))
    assert message in line
    assert str(folder) in line


def test_a_causal_model_is_no_paraphraser(rows, base_model, tmp_path, capsys):
    line = refused(capsys, augment.main, flags(input=rows, models=base_model, out=tmp_path / "out.jsonl"))
    assert "is a llama model, not an encoder-decoder" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "say"}\n{"text": "a"}\n', "row 2: field 'instruction' is missing"),
        ('{"instruction": "say"}\n{"instruction": null}\n', "row 2: field 'instruction' is None, not text"),
        ('{"instruction": "say"}\n[1]\n', "row 2: is [1], expected an object"),
        ('{"instruction": "say"}\n{"instruction"\n', "row 2: "),
        ('{"instruction": "say", "augmented_from": 1}\n', "row 1: has a field 'augmented_from'"),
    ],
)
def test_rows_that_cannot_be_augmented_are_named_before_any_work(t5, tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setattr(augment, "load_seq2seq", lambda *_: pytest.fail("no model may be loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content)
    line = refused(capsys, augment.main, flags(input=rows, models=t5, out=tmp_path / "out.jsonl"))
    assert message in line
    assert str(rows) in line
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method paraphrase takes 1 model folders, got 0"),
        ({"models": "a,b"}, "method paraphrase takes 1 model folders, got 2"),
        ({"models": "a", "method": "back_translation"}, "method back_translation takes 2 model folders, got 1"),
        ({"models": "a", "method": "hook", "hook": "m:f"}, "method hook takes 0 model folders, got 1"),
        ({"method": "hook"}, "method hook and --hook module:function go together"),
        ({"models": "a", "hook": "m:f"}, "method hook and --hook module:function go together"),
        ({"method": "hook", "hook": "m:f", "variants": 2}, "variants: method hook does not use it"),
        ({"models": "a", "variants": 2, "temperature": 0}, "variants: got 2, needs as many beams"),
        ({"models": "a", "variants": 3, "beams": 2}, "variants: got 3, needs as many beams"),
        ({"models": "a", "out": "x.json"}, "must be the name of a .jsonl file"),
        ({"method": "hook", "hook": "nonsense"}, "--hook nonsense: must be module:function"),
        ({"models": "a", "input": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_options_that_do_not_fit(rows, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, augment.main, flags(**{"input": rows, "out": "out.jsonl", **options}))


def test_several_input_files_are_refused(t5, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        write_jsonl(tmp_path / "rows" / f"{name}.jsonl", [{"instruction": "say"}])
    argv = flags(input=tmp_path / "rows", models=t5, out=tmp_path / "out.jsonl")
    assert "is 2 files; give one" in refused(capsys, augment.main, argv)
