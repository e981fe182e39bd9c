"""Reasons for which a row is left out: pure functions that name the reason, or None where the row stays."""

from collections.abc import Sequence

from data_prep.formats import Example

EMPTY_OUTPUT = "empty_output"
INVALID_UNICODE = "invalid_unicode"
SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
SPAN_UNPROVED = "span_unproved"
OVERLONG = "overlong"
OVERLONG_PROMPT = "overlong_prompt"
NOT_SAMPLED = "not_sampled"
DUPLICATE = "duplicate"
NOTHING_SUPERVISED = "nothing_supervised"
TEMPLATE_REFUSES_ROW = "template_refuses_row"
TEMPLATE_CHANGES_HISTORY = "template_changes_history"
TEMPLATE_CHANGES_TEXT = "template_changes_text"

MEANING = {
    EMPTY_OUTPUT: "the supervised text is empty or only spaces",
    INVALID_UNICODE: "the text holds half of a surrogate pair, which no tokenizer can encode",
    SPECIAL_TOKEN_IN_TEXT: "the text itself encodes to a special token",
    SPAN_UNPROVED: "prompt and response tokens do not decode to the prompt followed by the response",
    OVERLONG: "longer than seq_len",
    OVERLONG_PROMPT: "the prompt leaves no room for a response within seq_len",
    NOT_SAMPLED: "not in the sample that the source's weight asks for",
    DUPLICATE: "equal prompt and response as an earlier row",
    NOTHING_SUPERVISED: "every turn that would be supervised is excluded by weight: 0 or train: false",
    TEMPLATE_REFUSES_ROW: "the template has no place for these turns: roles must alternate, or no tool turns",
    TEMPLATE_CHANGES_HISTORY: "the prompt that inference gives the model is not how the rendered conversation begins",
    TEMPLATE_CHANGES_TEXT: "the template does not render a supervised turn as its text and the stop token",
}


def text_reason(example: Example) -> str | None:
    """Reasons that need no tokenizer: `empty_output`, `invalid_unicode`."""
    if not example.response.strip():
        return EMPTY_OUTPUT
    try:
        (example.prompt + example.response).encode("utf-8")
    except UnicodeEncodeError:
        return INVALID_UNICODE
    return None


def special_token_reason(text_ids: Sequence[int], special_ids: frozenset[int]) -> str | None:
    """`special_token_in_text` where ids that came from the row's text are special: a row could end a document early."""
    return None if special_ids.isdisjoint(text_ids) else SPECIAL_TOKEN_IN_TEXT
