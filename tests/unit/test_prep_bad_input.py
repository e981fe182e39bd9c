"""What users and their files get wrong, each found by running `sft prep` on it."""

import signal
from pathlib import Path

import pytest

from data_prep import chat
from data_prep.chat import load_chat_template
from data_prep.decontaminate import Decontaminator, Item
from data_prep.example import Turn
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import make_tokenizer

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


# Options


def test_more_words_than_any_item_has() -> None:
    """Once this computed a power for each of them."""
    known = Decontaminator([Item("item", "one two three four five six")], 10**10)
    hit = known.find("zero one two three four five six seven")
    assert hit is not None
    assert hit.overlap_text == "one two three four five six"
    assert known.find("zero one two three four five seven") is None
