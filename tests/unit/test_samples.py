"""Prompts of the samples: shown as the training data show them; every mistake in one line. And what people see."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.chat import PROBES, compile_chat_template, question_ids
from data_prep.encode import reference_document
from data_prep.example import Turn
from data_prep.template import render_alpaca
from sft.config import SamplesSection
from sft.errors import UserError
from sft.sample_prompts import MAX_PROMPTS, open_samples
from sft.sampling import count_fitting, cut_line, forget_after, put
from sft.tokenizer import load_tokenizer
from tests import tiny
from tests.unit.test_prep_chat import CHATML, TEMPLATES, tokenizer_with_template

ALPACA = {"template": ["with input", "without input"], "tokenizer": {"stop_id": tiny.EOS}}
ROWS = [{"instruction": "Name a river."}, {"instruction": "Translate.", "input": "good\nmorning"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.make_tokenizer(tmp_path_factory.mktemp("samples")))


def asked(path, content, tokenizer, manifest=ALPACA, context=512, max_new_tokens=16):
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    settings = SamplesSection(prompts=str(path), max_new_tokens=max_new_tokens)
    return open_samples(settings, tokenizer, manifest, context)


def shown_in_training(render, tokenizer, row, response="Seven."):
    """What stands before the answer of a training row with this question."""
    question = Turn("user", row["instruction"], row.get("input", ""))
    document = reference_document(tokenizer, render([question, Turn("assistant", response, "", True)]))
    return document.ids[: document.runs[0][0]]


def test_no_file_means_no_samples(tokenizer):
    assert open_samples(SamplesSection(), tokenizer, ALPACA, 512) is None


def test_prompts_are_what_stands_before_the_answer_of_a_training_row(tmp_path, tokenizer):
    samples = asked(tmp_path / "a.json", ROWS, tokenizer)
    assert [ids.tolist() for ids in samples.ids] == [shown_in_training(render_alpaca, tokenizer, row) for row in ROWS]
    assert samples.ids[0][0] == tiny.BOS
    assert samples.ids[0].dtype == np.int32
    assert samples.shown == ["Name a river.", "Translate.\n\ngood\nmorning"]
    assert samples.stops == {tiny.EOS}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("starts_with_bos", [True, False])
def test_chat_prompts_too_in_every_template(tmp_path, name, starts_with_bos):
    """Also where the template would write the date of the day, had it one: the training rows were made without.

    A reasoning model's template leaves it to the model to think first.
    """
    own = tokenizer_with_template(tmp_path / "tokenizer", starts_with_bos=starts_with_bos)
    template = compile_chat_template(TEMPLATES[name], "test", own)
    manifest = {"template": TEMPLATES[name], "tokenizer": {"stop_id": own.backend.token_to_id(template.stop)}}
    samples = asked(tmp_path / "a.json", ROWS, own, manifest, context=4096)
    response = PROBES[name == "qwen3"][-1].text
    expected = [shown_in_training(template.render, own, row, response) for row in ROWS]
    assert [ids.tolist() for ids in samples.ids] == expected
    assert samples.stops == {manifest["tokenizer"]["stop_id"], own.eos_id}


def test_a_template_that_refuses_a_question_is_one_line_with_its_own_words(tmp_path):
    own = tokenizer_with_template(tmp_path / "tokenizer")
    picky = "{% if 'river' in messages[0]['content'] %}{{ raise_exception('No rivers') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="prompt 1: chat template .*: cannot render this question: No rivers; change"):
        asked(tmp_path / "a.json", ROWS, own, {"template": picky, "tokenizer": {"stop_id": 1}})
    assert question_ids(compile_chat_template(picky, "test", own), own, "Translate.")


MISTAKES = {
    "none.txt": (None, "no such file"),
    "prompts.csv": ("a", "no known kind"),
    "empty.txt": (" \n", "holds no instruction"),
    "torn.jsonl": ('{"instruction": "a"}\n{"instru', "line 2: not valid JSON"),
    "blank.json": ([{"input": "x"}], "row 1: has no instruction"),
    "many.txt": ("Say it\n" * (MAX_PROMPTS + 1), "holds 65 prompts, .*; keep 64 at most"),
    "long.txt": ("Say it\n" + "x" * 500, r"prompt 2 has \d+ tokens and eval.samples.max_new_tokens is 16, .* to 512"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_that_names_option_and_file(tmp_path, tokenizer, name):
    content, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as raised:
        asked(tmp_path / name, content, tokenizer)
    assert str(raised.value).startswith(f"eval.samples.prompts {tmp_path / name}")
    assert "\n" not in str(raised.value)
    assert "none" not in str(raised.value).replace("none.txt", ""), "what sft drift offers"


def test_the_longest_that_fits_is_taken(tmp_path, tokenizer):
    text, ids = tmp_path / "a.txt", asked(tmp_path / "a.txt", "Say it", tokenizer).ids[0]
    assert asked(text, "Say it", tokenizer, context=len(ids) + 16)
    assert asked(text, "Say it", tokenizer, context=None, max_new_tokens=10**6)
    with pytest.raises(UserError, match="shorten"):
        asked(text, "Say it", tokenizer, context=len(ids) + 15)


def test_as_many_texts_as_fit_have_a_forward_together_and_a_longer_one_has_its_own():
    texts = [np.zeros(length) for length in (3, 4, 5)]
    assert [count_fitting(texts, room) for room in (1, 6, 7, 11, 12, 99)] == [1, 1, 2, 2, 3, 3]
    assert count_fitting([], 7) == 0


def test_a_line_for_the_terminal_is_one_line():
    assert cut_line("a\n b\x1b[31m\tc", 80) == "a b [31m c"
    assert cut_line("abcdef", 6) == "abcdef"
    assert cut_line("abcdefg", 6) == "abcde…"


def test_answers_of_later_steps_and_torn_lines_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.resume.on_first_rank", lambda act: act())
    run = SimpleNamespace(out=tmp_path)
    forget_after(run, 2)
    assert not list(tmp_path.iterdir()), "nothing to drop from"
    lines = [{"step": step, "prompt": "a", "answer": "é", "finished": True, "tokens": 1} for step in (0, 2, 4)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '7\n{"step": 1}\n{"step": 2, "pro')
    forget_after(run, 2)
    assert tiny.read_jsonl(path) == lines[:2]
    forget_after(run, -1)
    assert tiny.read_jsonl(path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


def test_other_prompts_at_a_later_start_leave_the_answers_of_other_steps(tmp_path):
    def line(step, prompt):
        return {"step": step, "prompt": prompt, "answer": "", "finished": True, "tokens": 0}

    path, old = tmp_path / "samples.jsonl", [line(step, "old") for step in (0, 250, 500)]
    put(path, 0, old[:1])
    path.write_text("".join(json.dumps(one) + "\n" for one in old))
    put(path, 0, [line(0, "new"), line(0, "newer")])
    put(path, 500, [line(500, "new")])
    found = [(one["step"], one["prompt"]) for one in tiny.read_jsonl(path)]
    assert found == [(0, "new"), (0, "newer"), (250, "old"), (500, "new")]
