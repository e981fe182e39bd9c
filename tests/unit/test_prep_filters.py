"""Which rows are left out, and why: damaged text, refusals, repetition, length; each with texts that must pass."""

import pickle
import time

import numpy as np
import pytest

from data_prep import filters, garbled
from data_prep.example import Example
from data_prep.filters import MEANING, load_refusals, make_text_filter, repetition
from sft.errors import UserError
from sft.prep_options import FilterSection
from tests.prep_support import prepare, write_json
from tests.tiny import make_tokenizer


def is_garbled_text(text):
    return garbled.is_garbled(text, text.encode())


def example(response: str, prompt: str = "Say it.") -> Example:
    end = len(prompt) + len(response)
    return Example((prompt + response,), (((len(prompt), end),) if response else (),), True)


def reason(response: str, prompt: str = "Say it.", **options: object) -> str | None:
    return make_text_filter(FilterSection(**options))(example(response, prompt))


def misread(text: str, encoding: str = "cp1252") -> str:
    """The text's UTF-8 read in another encoding; bytes that it leaves out become control characters."""
    return "".join(
        bytes([byte]).decode(encoding, errors="ignore") or bytes([byte]).decode("latin-1") for byte in text.encode()
    )


@pytest.mark.parametrize("response", ["", " ", " \n\t", "\u3000\xa0"])
def test_an_output_of_white_space_is_empty(response):
    assert reason(response) == "empty_output"
    assert reason(response + ".") is None


def test_one_response_with_text_is_enough():
    both = Example(("q", " ", "q", "a"), ((), ((0, 1),), (), ((0, 1),)), True)
    assert make_text_filter(FilterSection())(both) is None
    assert make_text_filter(FilterSection())(both._replace(texts=("q", " ", "q", "\n"))) == "empty_output"


@pytest.mark.parametrize("garbled", [True, False])
def test_half_a_surrogate_pair_cannot_be_encoded(garbled):
    assert reason("fine \ud83d", garbled=garbled) == "invalid_unicode"
    assert reason("fine", prompt="\udc00", garbled=garbled) == "invalid_unicode"
    assert reason("fine \U0001f600", garbled=garbled) is None


@pytest.mark.parametrize(
    "text",
    ["a \ufffd b", "null \x00", "bell\x07", "\x1b[31mred", "form\x0cfeed", "del\x7f", "next\x85line", "é\x00"],
)
def test_damage_is_found_in_prompt_and_response_and_can_be_switched_off(text):
    assert reason(text) == "garbled"
    assert reason("fine", prompt=text) == "garbled"
    assert reason(text, garbled=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "café au lait, s'il vous plaît",
        "It’s a “quote” – and a dash",
        "naïve coöperation über alles, Straße",
        "São Paulo e a irmã de João",
        "10 °C costs £5 or €6, © 2020, 5 m²",
        "bullet • point … done",
        "Привет, как дела?",
        "Γειά σου Κόσμε",
        "你好，世界",
        "こんにちは、世界",
        "안녕하세요 여러분",
        "नमस्ते दुनिया",
        "łódź, błąd, więc",
        "příliš žluťoučký kůň",
        "şimdi ağaç ılık",
        "smile 😀 please",
        "a → b ≤ c ✓ done",
    ],
)
def test_utf8_read_as_windows_1252_is_garbled_text(text):
    assert is_garbled_text(misread(text))
    assert not is_garbled_text(text)


@pytest.mark.parametrize(
    ("text", "encoding"), [("Привет, мир", "cp1251"), ("it’s “so”", "cp1251"), ("it’s “so”", "mac_roman")]
)
def test_other_encodings(text, encoding):
    assert is_garbled_text(misread(text, encoding))
    assert not is_garbled_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "SÃO PAULO, IRMÃ, MANHÃ… «IRMÃ» “AMANHÃ” MANHÃ—e",
        "Â, Ã e Ê são letras; A Ă Â B",
        "CAFÉ… “CAFÉ” É—È «VOILÀ» CITTÀ’",
        "André’s, déjà… voilà»… «à» “â”",
        "Daß… “Spaß” GRÖßE–x 3×½, 2×³",
        "ÅNGSTRÖM 5 Å… DÅ“x” 3 eVÅ²",
        "РСФСР, СССР, ЁЛКА. Съешь ещё этих мягких французских булок",
        "Її в’їзд, Ґанок; Ђурђевдан, Сёма, С™",
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 zero\u200bwidth \u200e\u200f\ufeff",
        "锟 斤 拷 中文，标点。全角ＡＢＣ",
        "tab\tnew\nline\r\n",
        "x = {'é': 1}  # naïve, \\x00 \\ufffd",
        "ðe Þing, mæður og börn",
        "‚Ändern‘ … ‚Ärger‘",
        "ä ö ü ß – „Anführung“ ‚einfach‘",
        "Τι κάνεις; Ω≈ç√∫ √© µ≤",
    ],
)
def test_what_people_write_passes(text):
    assert not is_garbled_text(text)


REFUSALS = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I cannot provide that.",
    "Sorry, but I am unable to generate images.",
    "As an AI language model, I do not have personal opinions.",
    "As an AI assistant, I don't have emotions.",
    "I am an AI, and I have no body.",
    "I cannot help you with that.",
    "Sure! But as an AI language model, I must warn you.",
    "<nooutput>",
    "N/A",
    "Lo siento, pero no puedo ayudar con eso.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
    "Desculpe, mas não posso ajudar com isso.",
    "Mi dispiace, ma non posso aiutarti.",
    "Извините, но я не могу помочь с этим.",
    "Как языковая модель, я не имею мнения.",
    "抱歉，我无法提供这些信息。",
    "很抱歉，但我不能回答这个问题。",
    "作为一个人工智能助手，我没有感情。",
    "申し訳ありませんが、そのご要望にはお答えできません。",
    "죄송하지만 도와드릴 수 없습니다.",
]
NO_REFUSALS = [
    "A polite refusal is: \"I'm sorry, but I can't assist with that.\"",
    "Dear Ann, I'm sorry, but I can't make it to your party.",
    "I'm sorry, but I can't come on Friday.",
    "I'm sorry for your loss.",
    "As an AI researcher, I study models.",
    "As an airline, I would refund it.",
    "I cannot believe it!",
    "None of these is prime.",
    "Chatbots often say that they cannot answer.",
    "Sorry, the shop is closed.",
    "Izvinite, ne mogu. Извините за опоздание.",
    "人工智能是计算机科学的一个分支。",
    "抱歉，我来晚了。",
    "作为一名教师，我喜欢读书。",
]


@pytest.mark.parametrize("response", REFUSALS)
def test_refusals_are_dropped_only_where_asked(response):
    assert reason(response, refusals="default") == "refusal"
    assert reason(response) is None
    assert reason("Fine.", prompt=response, refusals="default") is None


@pytest.mark.parametrize("response", NO_REFUSALS)
def test_texts_about_refusals_pass(response):
    assert reason(response, refusals="default") is None


def test_a_list_of_ones_own_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# mine\n\n^sorry\nbuy NOW$\r\n", encoding="utf-8-sig")
    options = {"refusals": str(path)}
    assert [reason(r, **options) for r in ("Sorry, no.", "You must buy now")] == ["refusal"] * 2
    assert [reason(r, **options) for r in ("We are sorry.", "buy now or later", REFUSALS[0])] == [None] * 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"fine\n(open\n", "line 2"),
        (b"fine\n*x\n", "line 2"),
        (b"# nothing\n\n", "holds no expression"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (None, "No such file"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path, content, part):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        make_text_filter(FilterSection(refusals=str(path)))
    assert str(path) in str(error.value)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_repetition_is_the_share_of_repeated_word_4_grams():
    assert repetition("a b c d e f g") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("A b, c. D! a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("no no no") == repetition("") == 0
    assert repetition("no " * 103) == pytest.approx(1 - 1 / 100)
    assert repetition("哈" * 103) == pytest.approx(1 - 1 / 100)
    assert repetition("a" * 103) == pytest.approx(1 - 1 / 100)
    assert repetition("| --- " * 50) == 0
    assert repetition("天地玄黄宇宙洪荒日月盈昃") == 0


def test_max_repetition_is_the_largest_share_that_stays():
    text = "a b c d a b c d"
    assert reason(text) is None
    assert reason(text, max_repetition=0.1) == "repetitive"
    assert reason(text, max_repetition=repetition(text)) is None
    assert reason("Fine, thanks.", prompt="no " * 100, max_repetition=0.1) is None


@pytest.mark.parametrize(
    ("bounds", "kept"), [({}, [1, 2, 4, 5]), ({"min": 2}, [2, 4, 5]), ({"min": 2, "max": 4}, [2, 4])]
)
def test_bounds_count_supervised_text_tokens(tmp_path, bounds, kept):
    """A byte is a token there; the stop token does not count."""
    rows = [{"instruction": f"say {n}", "output": "x" * n} for n in (1, 2, 4, 5)]
    options = {f"filters.{side}_response_tokens": count for side, count in bounds.items()}
    source = write_json(tmp_path / "rows.json", rows)
    shards = prepare(tmp_path / "out", sources=source, tokenizer=make_tokenizer(tmp_path / "t"), **options)
    found = np.concatenate([shards.pack(index).doc_ids for index in range(len(shards))])
    assert sorted(found.tolist()) == [(1, 2, 4, 5).index(n) for n in kept]


def test_every_reason_has_a_meaning():
    names = {value for name, value in vars(filters).items() if name.isupper() and isinstance(value, str)}
    assert names == set(MEANING)


def test_the_filter_travels_to_other_processes():
    made = make_text_filter(FilterSection(refusals="default", max_repetition=0.3))
    sent = pickle.loads(pickle.dumps(made))
    for response in (*REFUSALS, "no " * 50, "fine", "\x00", " "):
        assert sent(example(response)) == made(example(response))


def test_expressions_cost_no_exponential_time():
    """The built-in list on text that is made to be searched to its end."""
    hard = ["As an AI " * 5000, "i am " * 10000, "I can't help " * 5000, "!" * 50000, "抱歉作为由" + "长" * 50000]
    started = time.process_time()
    for text in hard:
        any(pattern.search(text) for pattern in load_refusals(filters.BUILT_IN_REFUSALS))
    assert time.process_time() - started < 5
