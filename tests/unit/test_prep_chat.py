"""Chat templates: the text of transformers, spans that are derived and checked, and a reason for every other row."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.chat import ChatTemplate, load_chat_template
from data_prep.example import Rejected, Turn
from data_prep.filters import MEANING
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import make_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "[INST]", "[/INST]"]

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
                {{- content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
GENERATION = (
    "{%- for message in messages %}\n  {%- if message.role == 'assistant' %}\n    {{- '<|im_start|>assistant\n' -}}\n"
    "    {% generation %}\n    {% set ending = '<|im_end|>' %}\n    {{- message.content + ending }}\n"
    "    {% endgeneration %}\n"
    "  {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "generation": GENERATION,
}
STOPS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": "</s>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "generation": "<|im_end|>",
}


def tokenizer_with_template(folder: Path, template: object = None, starts_with_bos: bool = True) -> Tokenizer:
    """The tiny tokenizer with the special tokens of several model families and, perhaps, a chat template."""
    from tokenizers import Tokenizer as FastTokenizer

    make_tokenizer(folder)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(SPECIAL)
    fast.save(str(folder / "tokenizer.json"))
    if not starts_with_bos:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with_template(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def load(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("templates")

    def load(template: str, name: str = "own") -> ChatTemplate:
        file = folder / f"{name}.jinja"
        file.write_text(template, encoding="utf-8")
        return load_chat_template(str(file), tokenizer)

    return load


@pytest.fixture(scope="module")
def loaded(load) -> dict[str, ChatTemplate]:
    return {name: load(template, name) for name, template in TEMPLATES.items()}


def user(text: str) -> Turn:
    return Turn("user", text)


def learn(text: str) -> Turn:
    return Turn("assistant", text, "", True)


def context(text: str) -> Turn:
    return Turn("assistant", text)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def reason_of(template: ChatTemplate, *turns: Turn) -> str | None:
    """Why the conversation is rejected, or None where it is rendered."""
    try:
        template.render(turns)
    except Rejected as rejected:
        return rejected.reason
    return None


TALK = (user("Add 1 & 2."), learn("3"), user(" now <b>double</b> it"), learn("6 = 3\n* 2"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, loaded: dict[str, ChatTemplate], tokenizer: Tokenizer) -> None:
    """Also the prompt is, which inference gives; a template that asks for the date gets none here."""
    template = loaded[name]
    today = datetime.now().strftime("%d %b %Y")
    for turns in (TALK, TALK[:1], TALK[:2], (user("a"), learn("<think>\nb\n</think>\n\nc"))):
        for prompt in (False, True):
            expected = tokenizer.hf.apply_chat_template(
                messages(turns), chat_template=template.text, tokenize=False, add_generation_prompt=prompt
            )
            expected = expected.replace(f"Today Date: {today}", "Today Date: 26 Jul 2024")
            assert template.rendered(messages(turns), prompt) == expected


def test_tojson_escapes_nothing_for_html(load) -> None:
    template = load(CHATML.replace("message['content']", "(message['content'] | tojson if loop.first else 'Seven.')"))
    assert '"<b>é"' in template.render([user("<b>é"), learn("Seven.")]).texts[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_the_answers_with_their_stop_tokens(name: str, loaded: dict[str, ChatTemplate]) -> None:
    """Also in a long conversation of which only some turns are supervised. Llama-2 writes spaces around a text."""
    stop = STOPS[name]
    assert loaded[name].stop == stop
    example = loaded[name].render(TALK)
    around = " " if name == "llama2" else ""
    assert example.responses() == [f"{around}3{around}{stop}", f"{around}6 = 3\n* 2{around}{stop}"]
    assert example.stop is False
    assert len(example.texts) == 1
    turns = [*TALK, user("b"), context("c"), user("d"), learn("3"), user("e"), context("f")]
    assert loaded[name].render(turns).responses() == [*example.responses(), f"{around}3{around}{stop}"]


def test_a_span_begins_where_the_prompt_of_inference_ends(loaded: dict[str, ChatTemplate]) -> None:
    for name, template in loaded.items():
        example = template.render(TALK)
        prompt = template.rendered(messages(TALK[:3]), prompt=True).removeprefix("<s>")
        if name == "qwen3":  # a text without a thought is what it writes with thinking switched off
            prompt += "<think>\n\n</think>\n\n"
        assert example.texts[0][: example.spans[0][1][0]] == prompt


def test_stripped_text_is_accepted_and_changed_text_is_not(load, loaded: dict[str, ChatTemplate]) -> None:
    assert loaded["gemma"].render([user("a"), learn("  b\n")]).responses() == ["b<end_of_turn>"]
    assert loaded["chatml"].render([user("a"), learn("  b\n")]).responses() == ["  b\n<|im_end|>"]
    shouting = load(CHATML.replace("message['content'] +", "message['content'] | replace('no', 'NO') +"))
    assert reason_of(shouting, user("a"), learn("no")) == "template_changes_text"
    assert reason_of(shouting, user("no"), learn("yes")) is None


def test_a_turn_with_another_ending_is_refused(load) -> None:
    """Only the last turn ends as the probe's did; the model would learn two ways to stop, or none."""
    template = load(
        CHATML.replace("'<|im_end|>'", "('<|im_end|>' if loop.last or message.role == 'user' else '<|eot_id|>')")
    )
    assert reason_of(template, *TALK) == "template_changes_text"
    assert reason_of(template, user("a"), context("b"), user("c"), learn("d")) is None


def test_history_that_is_rewritten_is_refused(load, loaded: dict[str, ChatTemplate]) -> None:
    """Qwen3 drops the thoughts of earlier turns, so they cannot be learned there, but the last turn can."""
    thought = "<think>\nhm\n</think>\n\n"
    first = (user("a"), learn(f"{thought}b"))
    assert reason_of(loaded["qwen3"], *first) is None
    assert reason_of(loaded["qwen3"], *first, user("c"), learn(f"{thought}d")) == "template_changes_text"
    turns = (user("a"), context(f"{thought}b"), user("c"), learn(f"{thought}d"))
    assert loaded["qwen3"].render(turns).responses() == [f"{thought}d<|im_end|>"]
    counting = load("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}" + CHATML)
    assert reason_of(counting, *first) is None
    assert reason_of(counting, *first, user("c"), learn("d")) == "template_changes_history"
    assert reason_of(counting, user("a"), context("b"), user("c"), learn("d")) is None


def test_forgotten_turns_are_refused(load) -> None:
    """The template shows the last exchange only, so an equal earlier one would be found in its place."""
    template = load(
        CHATML.replace("in messages %}", "in (messages[-1:] if add_generation_prompt else messages[-2:]) %}")
    )
    assert reason_of(template, user("a"), learn("b")) is None
    assert reason_of(template, user("a"), context("b"), user("c"), learn("d")) is None
    assert reason_of(template, user("a"), learn("b"), user("c"), learn("d")) == "template_changes_history"
    assert reason_of(template, user("a"), learn("b"), user("a"), learn("b")) == "template_changes_history"


def test_a_template_refuses_rows_that_it_has_no_place_for(loaded: dict[str, ChatTemplate]) -> None:
    for name, refused in [("mistral", True), ("gemma", True), ("llama2", True), ("chatml", False)]:
        expected = "template_refuses_row" if refused else None
        assert reason_of(loaded[name], user("a"), user("b"), learn("c")) == expected, name
    assert reason_of(loaded["mistral"], Turn("system", "s"), user("a"), learn("b")) == "template_refuses_row"
    assert reason_of(loaded["gemma"], Turn("system", "s"), user("a"), learn("b")) == "template_refuses_row"
    assert reason_of(loaded["llama2"], Turn("system", "s"), user("a"), learn("b")) is None
    assert reason_of(loaded["llama3"], user("a"), Turn("tool", "42"), learn("b")) is None
    assert reason_of(loaded["mistral"], user("a"), Turn("tool", "42"), learn("b")) == "template_refuses_row"


def test_a_conversation_that_the_assistant_begins(loaded: dict[str, ChatTemplate]) -> None:
    """ChatML renders it; a template that looks at the first message has no prompt for it."""
    assert loaded["chatml"].render([learn("a"), user("b"), learn("c")]).responses() == ["a<|im_end|>", "c<|im_end|>"]
    assert reason_of(loaded["llama3"], learn("a"), user("b"), learn("c")) == "template_refuses_row"
    assert reason_of(loaded["llama3"], context("a"), user("b"), learn("c")) is None


@pytest.mark.parametrize("special", ["</s>", "<|im_end|>", "<unk>", "[INST]"])
def test_text_with_a_special_token_is_refused(special: str, loaded: dict[str, ChatTemplate]) -> None:
    template = loaded["chatml"]
    assert reason_of(template, user(f"what is {special}?"), learn("b")) == "special_token_in_text"
    assert reason_of(template, user("a"), learn(f"b{special}")) == "special_token_in_text"
    assert reason_of(template, Turn("user", "a", special), learn("b")) == "special_token_in_text"
    assert reason_of(template, user(f"what is {special[:-1]} {special[1:]}?"), learn(f"b{special[1:]}")) is None


def test_blank_and_unsupervised_turns(loaded: dict[str, ChatTemplate]) -> None:
    template = loaded["chatml"]
    assert reason_of(template, user("a"), learn(" \n")) == "empty_output"
    assert reason_of(template, user("a"), context(" \n"), user(""), learn("b")) is None
    assert reason_of(template, user("a"), context("b")) == "nothing_supervised"


def test_the_input_of_an_alpaca_row_follows_its_instruction(loaded: dict[str, ChatTemplate]) -> None:
    text = loaded["chatml"].render([Turn("user", "Add.", "1 2"), learn("3")]).texts[0]
    assert text == "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"


def test_the_templates_own_bos_is_cut_only_where_encoding_adds_one(tmp_path: Path) -> None:
    with_bos = load_chat_template("chat", tokenizer_with_template(tmp_path / "a", MISTRAL))
    without = load_chat_template("chat", tokenizer_with_template(tmp_path / "b", MISTRAL, starts_with_bos=False))
    assert with_bos.render(TALK[:2]).texts == ("[INST] Add 1 & 2. [/INST]3</s>",)
    assert without.render(TALK[:2]).texts == ("<s>[INST] Add 1 & 2. [/INST]3</s>",)
    assert with_bos.render(TALK[:2]).responses() == without.render(TALK[:2]).responses() == ["3</s>"]


def test_the_tokenizers_own_template(tmp_path: Path) -> None:
    """From tokenizer_config.json, alone or as the default among several, and from chat_template.jinja."""
    named = [{"name": "rag", "template": LLAMA2}, {"name": "default", "template": CHATML}]
    assert load_chat_template("chat", tokenizer_with_template(tmp_path / "one", CHATML)).text == CHATML
    assert load_chat_template("chat", tokenizer_with_template(tmp_path / "named", named)).text == CHATML
    tokenizer_with_template(tmp_path / "file")
    (tmp_path / "file" / "chat_template.jinja").write_text(CHATML)
    assert load_chat_template("chat", load_tokenizer(tmp_path / "file")).text == CHATML
    for folder, template in [("none", None), ("other", named[:1])]:
        with pytest.raises(UserError, match="has no chat template.*alpaca"):
            load_chat_template("chat", tokenizer_with_template(tmp_path / folder, template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for message in messages %}\n{{ message. }}{% endfor %}", ["does not compile", "line 2"]),
        ("{% break %}", ["does not compile", "outside loop"]),
        ("{{ messages | random }}", ["does not compile", "random"]),
        (CHATML.replace("message['content']", "(message['content'] + strftime_now('%d'))"), ["date", "strftime_now"]),
        (CHATML + "{{ lipsum() }}", ["cannot render", "lipsum"]),
        (MISTRAL.replace("(loop.index0 % 2 == 0)", "false"), ["cannot render", "must alternate"]),
        ("{{ messages[0].content + 1 }}", ["cannot render"]),
        (CHATML.replace("<|im_end|>", "<end>"), ["without a special token", "<end>"]),
        (CHATML.replace("message['content']", "'x'"), ['"Seven."', "each message's content"]),
        (MISTRAL.replace("message['content'] + eos_token", "message['content'] + '.' + eos_token"), ["Seven..</s>"]),
        (CHATML.replace("if add_generation_prompt", "if false"), ["add_generation_prompt"]),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"), ["add_generation_prompt"]),
    ],
)
def test_a_template_that_cannot_be_used(template: str, words: list[str], load) -> None:
    with pytest.raises(UserError) as caught:
        load(template, "faulty")
    message = str(caught.value)
    assert message.startswith("chat template ")
    assert "faulty.jinja: " in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_date_in_a_part_that_the_probe_does_not_reach(load) -> None:
    template = load(CHATML + "{% if messages[0].role == 'system' %}{{ strftime_now('%d') }}{% endif %}")
    assert reason_of(template, user("a"), learn("b")) is None
    with pytest.raises(UserError, match="strftime_now"):
        template.render([Turn("system", "s"), user("a"), learn("b")])


def test_a_template_file_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"template .*none\.jinja: cannot be read: No such file"):
        load_chat_template(str(tmp_path / "none.jinja"), tokenizer)
    (tmp_path / "bytes.jinja").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="is not UTF-8 at byte 3"):
        load_chat_template(str(tmp_path / "bytes.jinja"), tokenizer)


PIECES = st.lists(
    st.sampled_from([*"ab {}<>|/é你\n\t\x00", "</s", "im_end|>", "<think>", "[/INS", "\u2028"]), max_size=8
)
ANSWERS = PIECES.map("".join).filter(str.strip)
TURNS = st.one_of(
    st.builds(lambda text: user("".join(text)), PIECES),
    st.builds(learn, ANSWERS),
    st.builds(context, ANSWERS),
    st.builds(lambda text: Turn("system", "".join(text)), PIECES),
)
EXCHANGES = st.builds(lambda text, answer: [user("".join(text)), answer], PIECES, st.builds(learn, ANSWERS))
TALKS = st.lists(EXCHANGES | EXCHANGES | TURNS.map(lambda turn: [turn]), min_size=1, max_size=4).map(
    lambda parts: sum(parts, [])
)


@settings(max_examples=150, deadline=None)
@given(turns=TALKS, name=st.sampled_from(sorted(TEMPLATES)))
def test_spans_hold_exactly_the_supervised_turns(turns, name, loaded) -> None:
    """For every conversation that is not rejected, in order, with nothing but white space around."""
    reason = reason_of(loaded[name], *turns)
    if reason is not None:
        assert reason in MEANING
        return
    example = loaded[name].render(turns)
    stop = STOPS[name]
    expected = [turn.text.strip() for turn in turns if turn.supervised]
    assert [response.removesuffix(stop).strip() for response in example.responses()] == expected
    assert all(response.endswith(stop) for response in example.responses())
    (spans,) = example.spans
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    full = loaded[name].rendered(messages(turns), prompt=False)
    assert example.texts[0] == full.removeprefix("<s>")


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=4))
def test_no_alternating_conversation_is_lost_to_chatml(pairs, loaded) -> None:
    """Except for those whose own text holds a special token."""
    assume(not any(special in text for pair in pairs for text in pair for special in [*SPECIAL, "</s>"]))
    turns = [turn for question, answer in pairs for turn in (user(question), learn(answer))]
    assert loaded["chatml"].render(turns).responses() == [f"{answer}<|im_end|>" for _, answer in pairs]
