"""Chat templates: a conversation as the model's own template writes it, with the supervised spans derived and checked.

The template is rendered once for the whole conversation and once per supervised turn, up to the place where
inference would ask the model for that turn. What stands between that place and the stop token must be the turn.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.example import Example, Rejected, Turn
from data_prep.filters import (
    EMPTY_OUTPUT,
    NOTHING_SUPERVISED,
    SPECIAL_TOKEN_IN_TEXT,
    TEMPLATE_CHANGES_HISTORY,
    TEMPLATE_CHANGES_TEXT,
    TEMPLATE_REFUSES_ROW,
)
from data_prep.specials import encode_with_specials
from sft.errors import UserError
from sft.tokenizer import Tokenizer

_QUESTION = Turn("user", "How many?")
PROBES = (
    (_QUESTION, Turn("assistant", "Seven.", "", True)),
    (_QUESTION, Turn("assistant", "<think>\nDays of a week.\n</think>\n\nSeven.", "", True)),
)
"""What each template is tried out on: an answer without and with a reasoning model's thought."""

TRY_OUT_S = 20
"""A template renders a conversation in less than a thousandth of this."""

RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template's expressions may raise on data that its author did not think of."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the special tokens of the tokenizer it writes for. Cannot be pickled: load it
    where it is used."""

    text: str
    """The Jinja source."""
    where: str
    """The tokenizer folder or file it came from, for messages."""
    compiled: jinja2.Template
    variables: Mapping[str, str | None]
    """What every rendering may name: bos_token, eos_token and the like."""
    special: re.Pattern[str]
    """Matches the text of any special token."""
    special_starts: tuple[str, ...]
    """First characters of special tokens: a text without them needs no search."""
    bos: str
    """Text of the BOS that encoding adds by itself, so that the template's own is cut off; else empty."""
    stop: str
    """Text of the special token that ends an assistant's turn."""

    def render(self, turns: Sequence[Turn]) -> Example:
        """The conversation as one stretch of text, the spans of its supervised turns each up to the stop token.

        A span begins where the prompt that inference would give ends (`add_generation_prompt`), so it also holds
        white space that the template writes around the text. A template that strips the text is accepted.

        Raises:
            Rejected: special_token_in_text, empty_output, nothing_supervised, or one of the template_* reasons.
            UserError: the template asks for the date.
        """
        if self._holds_special("\0".join([turn.text + turn.input for turn in turns])):
            raise Rejected(SPECIAL_TOKEN_IN_TEXT)
        messages = _messages(turns)
        full = self.rendered(messages, prompt=False)
        cut = len(self.bos) if self.bos and full.startswith(self.bos) else 0
        spans: list[tuple[int, int]] = []
        last_end = cut
        for index, turn in enumerate(turns):
            if turn.supervised:
                if not turn.text.strip():
                    raise Rejected(EMPTY_OUTPUT)
                start, end = self._span(full, messages[:index], turn.text)
                if start < last_end:
                    raise Rejected(TEMPLATE_CHANGES_HISTORY)
                spans.append((start - cut, end - cut))
                last_end = end
        if not spans:
            raise Rejected(NOTHING_SUPERVISED)
        return Example((full[cut:],), (tuple(spans),), False)

    def _span(self, full: str, before: Sequence[Mapping[str, str]], text: str) -> tuple[int, int]:
        """[start, end) of a turn in `full`: from the end of its prompt to the end of its stop token."""
        reason = TEMPLATE_CHANGES_HISTORY
        # Templates of reasoning models put an empty thought before a text without one, and so does their prompt
        # with enable_thinking: false, which others ignore.
        for thinking in (True, False):
            prompt = self.rendered(before, True, thinking)
            if full.startswith(prompt):
                start = len(prompt)
                stop = self.special.search(full, start)
                if stop and stop.group() == self.stop and full[start : stop.start()].strip() == text.strip():
                    return start, stop.end()
                reason = TEMPLATE_CHANGES_TEXT
        raise Rejected(reason)

    def _holds_special(self, text: str) -> bool:
        for start in self.special_starts:
            if start in text:
                return self.special.search(text) is not None
        return False

    def rendered(self, messages: Sequence[Mapping[str, str]], prompt: bool, thinking: bool = True) -> str:
        """The text of `messages` ({role, content}), with `prompt` up to where the assistant would go on.

        Raises:
            Rejected: template_refuses_row, with the template's own error as its cause.
            UserError: the template asks for the date.
        """
        variables = {**self.variables, "messages": messages, "add_generation_prompt": prompt}
        if not thinking:
            variables["enable_thinking"] = False
        try:
            return self.compiled.render(variables)
        except RENDER_ERRORS as error:
            if "'strftime_now' is undefined" in str(error):
                raise UserError(
                    f"chat template {self.where}: writes the date of the day (strftime_now), so the same rows would "
                    "give other tokens tomorrow; put a fixed date in its place"
                ) from None
            raise Rejected(TEMPLATE_REFUSES_ROW) from error


def load_chat_template(setting: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own chat template (`setting` "chat") or that of a .jinja file, compiled and tried out.

    Raises:
        UserError: there is no such template; else as `compile_chat_template`.
    """
    return compile_chat_template(*_read(setting, tokenizer), tokenizer)


def question_ids(template: ChatTemplate, tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
    """Ids of what a model is shown that shall answer this: a conversation of one question, up to where the answer of a
    training row with the same question begins. Where the template has thoughts, the answer begins with one.

    Raises:
        UserError: the template refuses the question, or asks for the date.
    """
    try:
        text = template.rendered(_messages([Turn("user", instruction, input)]), prompt=True)
    except Rejected as error:
        reason = " ".join(str(error.__cause__).split())[:200]
        raise UserError(f"chat template {template.where}: cannot render this question: {reason}; change it") from None
    return [*tokenizer.bos, *encode_with_specials(tokenizer, text.removeprefix(template.bos))]


def compile_chat_template(text: str, where: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A chat template for this tokenizer, compiled and tried out; `where` it came from, for messages.

    Jinja is set up as transformers does (`apply_chat_template`), except that nothing depends on the day or on chance:
    there is no strftime_now, lipsum or random.

    Raises:
        UserError: it does not compile, it cannot render a question with its answer within
            TRY_OUT_S, it writes no special token after the answer, or its prompt is not how its conversations go on.
    """
    special = {tokenizer.token(special_id) for special_id in tokenizer.special_ids}
    if not special:
        raise UserError(f"tokenizer {tokenizer.path}: has no special tokens, so no chat template can end a turn")
    unstopped = ChatTemplate(
        text=text,
        where=where,
        compiled=_compile(text, where),
        variables={**tokenizer.hf.special_tokens_map, "tools": None, "documents": None},
        special=re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))),
        special_starts=tuple(sorted({token[0] for token in special})),
        bos="".join(map(tokenizer.token, tokenizer.bos)),
        stop="",
    )
    with _tried_out(where):
        template = replace(unstopped, stop=_stop_token(unstopped))
        _check_prompt(template)
    return template


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    # One line break between an Alpaca row's instruction and its input, as LLaMA-Factory and axolotl have it.
    return [{"role": turn.role, "content": f"{turn.text}\n{turn.input}" if turn.input else turn.text} for turn in turns]


def _read(setting: str, tokenizer: Tokenizer) -> tuple[str, str]:
    if setting != "chat":
        try:
            return Path(setting).read_text(encoding="utf-8-sig"), setting
        except OSError as error:
            raise UserError(f"template {setting}: cannot be read: {error.strerror}; check the path") from None
        except UnicodeDecodeError as error:
            raise UserError(f"template {setting}: is not UTF-8 at byte {error.start}; convert it") from None
    text = tokenizer.hf.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not isinstance(text, str):
        raise UserError(
            f"tokenizer {tokenizer.path}: has no chat template (or several, and none named default); put "
            "chat_template.jinja beside it, or set template to a .jinja file or to alpaca"
        )
    return text, str(tokenizer.path)


class _Generation(Extension):
    """{% generation %} marks the assistant's text for other trainers; here spans are derived, so it only groups."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile(text: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    del environment.globals["lipsum"], environment.filters["random"]
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    # What Jinja lets through to Python: a break outside of a loop, nesting without end.
    except (SyntaxError, RecursionError) as error:
        problem = str(error)
    raise UserError(f"chat template {where}: does not compile: {' '.join(problem.split())[:200]}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@contextmanager
def _tried_out(where: str) -> Iterator[None]:
    """Refuse a template that loops without end or fills the memory; signals reach the main thread only."""
    told = f"chat template {where}: cannot render a question with its answer"

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise UserError(f"{told} within {TRY_OUT_S} s; take the endless loop out of it")

    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, TRY_OUT_S)
        yield
    except MemoryError:
        raise UserError(f"{told}: it fills the memory; make its texts smaller") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _stop_token(template: ChatTemplate) -> str:
    """The special token that the template writes after an answer."""
    answer = PROBES[0][-1].text
    try:
        full = template.rendered(_messages(PROBES[0]), prompt=False)
    except Rejected as error:
        reason = " ".join(str(error.__cause__).split())[:200]
        raise UserError(
            f"chat template {template.where}: cannot render a question with its answer: {reason}; correct it, or set "
            "template to a .jinja file"
        ) from None
    _, found, after = full.rpartition(answer)
    if not found:
        raise UserError(
            f"chat template {template.where}: renders the answer {json.dumps(answer)} as {json.dumps(full[-40:])}; it "
            "must write each message's content as it is"
        )
    stop = template.special.match(after.lstrip())
    if not stop:
        raise UserError(
            f"chat template {template.where}: writes {json.dumps(full[-40:])} at the end of a conversation, without a "
            "special token of the tokenizer right after the answer, so the model could not learn to stop; write "
            "eos_token there"
        )
    return stop.group()


def _check_prompt(template: ChatTemplate) -> None:
    """Refuse a template of which every row would be dropped."""
    for turns in PROBES:
        with suppress(Rejected):
            template.render(turns)
            return
    raise UserError(
        f"chat template {template.where}: its prompt (add_generation_prompt) does not lead to the answers it renders, "
        "so no turn could be learned as the model will be asked for it; end the prompt where the answer begins"
    )
