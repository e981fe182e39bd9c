"""Reasons for which a row is left out: pure functions that name the reason, or None where the row stays."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import garbled
from data_prep.example import Example
from data_prep.words import words
from sft.errors import UserError
from sft.prep_options import FilterSection

MALFORMED = "malformed"
EMPTY_OUTPUT = "empty_output"
INVALID_UNICODE = "invalid_unicode"
GARBLED = "garbled"
REFUSAL = "refusal"
REPETITIVE = "repetitive"
SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
SPAN_UNPROVED = "span_unproved"
TOO_SHORT = "too_short"
TOO_LONG = "too_long"
OVERLONG = "overlong"
OVERLONG_PROMPT = "overlong_prompt"
NOT_SAMPLED = "not_sampled"
NOT_BALANCED = "not_balanced"
REPLAY_NOT_NEEDED = "replay_not_needed"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"
CONTAMINATED = "contaminated"
NOTHING_SUPERVISED = "nothing_supervised"
TEMPLATE_REFUSES_ROW = "template_refuses_row"
TEMPLATE_CHANGES_HISTORY = "template_changes_history"
TEMPLATE_CHANGES_TEXT = "template_changes_text"

MEANING = {
    MALFORMED: "not a row of the source's format (on_error: drop)",
    EMPTY_OUTPUT: "the supervised text is empty or only spaces",
    INVALID_UNICODE: "the text holds half of a surrogate pair, which no tokenizer can encode",
    GARBLED: "the text holds U+FFFD or control characters, or was decoded with the wrong encoding",
    REFUSAL: "the response is a refusal or boiler-plate",
    REPETITIVE: "too large a share of the response repeats earlier parts of it",
    SPECIAL_TOKEN_IN_TEXT: "the text itself encodes to a special token",
    SPAN_UNPROVED: "prompt and response tokens do not decode to the prompt followed by the response",
    TOO_SHORT: "fewer supervised tokens than filters.min_response_tokens",
    TOO_LONG: "more supervised tokens than filters.max_response_tokens",
    OVERLONG: "longer than seq_len",
    OVERLONG_PROMPT: "the prompt leaves no room for a response within seq_len",
    NOT_SAMPLED: "not in the sample that the source's weight asks for",
    NOT_BALANCED: "its value of balance_by is more frequent than the rarest one",
    REPLAY_NOT_NEEDED: "the replay source's ratio is reached without it",
    DUPLICATE: "equal prompt and response as an earlier row",
    NEAR_DUPLICATE: "similar to an earlier row",
    CONTAMINATED: "overlaps with an evaluation item",
    NOTHING_SUPERVISED: "every turn that would be supervised is excluded by weight: 0 or train: false",
    TEMPLATE_REFUSES_ROW: "the template has no place for these turns: roles must alternate, or no tool turns",
    TEMPLATE_CHANGES_HISTORY: "the prompt that inference gives the model is not how the rendered conversation begins",
    TEMPLATE_CHANGES_TEXT: "the template does not render a supervised turn as its text and the stop token",
}

BUILT_IN_REFUSALS = Path(__file__).with_name("refusals.txt")
REPETITION_NGRAM = 4
LONGEST_WORD = 40
"""Characters; what is longer is no word but a run of characters, and is compared character by character."""


@dataclass(frozen=True)
class TextFilter:
    """The reasons that need no tokenizer, as one picklable function of an example; see `make_text_filter`."""

    drop_garbled: bool
    refusals: tuple[re.Pattern[str], ...]
    max_repetition: float | None

    def __call__(self, example: Example) -> str | None:
        """`empty_output`, `invalid_unicode`, `garbled`, `refusal`, `repetitive`, or None where the row stays."""
        for text in example.texts:
            try:
                data = text.encode()
            except UnicodeEncodeError:
                return INVALID_UNICODE
            if self.drop_garbled and garbled.is_garbled(text, data):
                return GARBLED
        if not _has_response(example):
            return EMPTY_OUTPUT
        if self.refusals or self.max_repetition is not None:
            return self._response_reason(example.responses())
        return None

    def _response_reason(self, responses: Sequence[str]) -> str | None:
        if any(pattern.search(response) for response in responses for pattern in self.refusals):
            return REFUSAL
        if self.max_repetition is not None and any(repetition(r) > self.max_repetition for r in responses):
            return REPETITIVE
        return None


def make_text_filter(section: FilterSection) -> TextFilter:
    """The filter that the options ask for; the list of refusals is read here, once.

    Raises:
        UserError: the list cannot be read, is empty, or a line is no regular expression.
    """
    path = BUILT_IN_REFUSALS if section.refusals == "default" else Path(section.refusals)
    refusals = () if section.refusals == "none" else load_refusals(path)
    return TextFilter(section.garbled, refusals, section.max_repetition)


def load_refusals(path: Path) -> tuple[re.Pattern[str], ...]:
    """Regular expressions, one per line, that are searched for anywhere in a response, whatever the case.

    Empty lines and lines that begin with # are passed over. ^ and $ mean the whole response's edges.

    Raises:
        UserError: the file cannot be read, holds no expression, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"filters.refusals {path}: not UTF-8 at byte {error.start}; convert the file") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"filters.refusals {path}: {why}; give none, default, or a text file of expressions") from None
    patterns = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            try:
                patterns.append(re.compile(line, re.IGNORECASE))
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(f"filters.refusals {path} line {number}: {line[:60]!r}: {error}; correct it") from None
    if not patterns:
        raise UserError(f"filters.refusals {path}: holds no expression; write one per line, or give none")
    return tuple(patterns)


def repetition(text: str) -> float:
    """Share of a text's word 4-grams that occurred before in it: 1 - distinct / all, in [0, 1).

    seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319), on words; Han characters and kana are words, and so is each
    character of a run longer than 40, so that one endless word counts too. Punctuation does not count: tables and
    rulers are made of it.
    """
    units: list[str] = []
    for word in words(text):
        if len(word) > LONGEST_WORD:
            units.extend(word)
        else:
            units.append(word)
    count = len(units) - REPETITION_NGRAM + 1
    if count < 1:
        return 0.0
    return 1 - len(set(zip(*(units[start:] for start in range(REPETITION_NGRAM)), strict=False))) / count


def _has_response(example: Example) -> bool:
    """Whether any supervised text is more than white space."""
    for text, spans in zip(example.texts, example.spans, strict=True):
        for start, end in spans:
            if not text[start:end].isspace():
                return True
    return False
