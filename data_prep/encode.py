"""Example to token ids and the number of unsupervised leading tokens, with the proof that the split is right.

A document is `bos + prompt ids + response ids + [eos]`; response ids and eos are supervised. A response that was
cut ends without eos: the model must not learn to stop in the middle of a sentence. The prompt ids are exactly
those of the prompt alone, so what the model reads at inference is a prefix of what it was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.formats import Example
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_sentencepiece

PROBE_TEXTS = (
    "Below is an instruction that describes a task.\n\n### Response:\n",
    "def f(x):\n    return  x  # two  spaces\n\n\n\tdone",
    "naïve café, 你好世界, Привет, 🙂👩‍💻",
    "1234567890 + 0.5 = ?  \n  <b>AT&T</b>",
)


@dataclass(frozen=True)
class Document:
    ids: list[int]
    num_prefix: int
    """Leading tokens that are not supervised: BOS and the prompt."""
    truncated: bool = False


def eos_of(tokenizer: Tokenizer) -> int:
    """The id that ends every document.

    Raises:
        UserError: the tokenizer has none; a model trained without it never learns to stop.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            f"tokenizer {tokenizer.path}: has no EOS token, so the model could not learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_id


def text_forbidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Special ids that the text of a row must not encode to.

    The unknown token is left to the span proof, unless the tokenizer uses it as BOS or EOS too (GPT-2).
    """
    unknown = {tokenizer.hf.unk_token_id} - {tokenizer.eos_id, *tokenizer.bos}
    return tokenizer.special_ids - unknown


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Document]:
    """Encode each example; response ids are those of the joint text wherever its ids start with the prompt's."""
    eos = eos_of(tokenizer)
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    wholes = tokenizer.encode_batch([example.prompt + example.response for example in examples])
    documents = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        joint = whole[: len(prompt)] == prompt
        response = whole[len(prompt) :] if joint else tokenizer.encode(example.response)
        documents.append(Document([*tokenizer.bos, *prompt, *response, eos], len(tokenizer.bos) + len(prompt)))
    return documents


def span_is_proved(tokenizer: Tokenizer, example: Example, document: Document) -> bool:
    """True where the supervised tokens are the response's, all of it and nothing else, and eos ends them once.

    Decoded in context, `prompt ids + response ids` must read `decoded prompt + response`: decoding the response
    alone would lose a leading space with SentencePiece and Metaspace tokenizers. The prompt ids must be those of
    the prompt alone. No other special token stands anywhere, and BOS in front where the tokenizer starts texts
    with one. For a truncated document the decoded response must be a non-empty beginning of the response, without eos.
    """
    num_bos = len(tokenizer.bos)
    prompt_ids = document.ids[num_bos : document.num_prefix]
    ending = [] if document.truncated else [eos_of(tokenizer)]
    end = len(document.ids) - len(ending)
    response_ids = document.ids[document.num_prefix : end]
    if tuple(document.ids[:num_bos]) != tokenizer.bos or document.ids[end:] != ending:
        return False
    # sentencepiece decodes control tokens to nothing, so the text alone would not show one that slipped in.
    if not response_ids or not tokenizer.special_ids.isdisjoint(prompt_ids + response_ids):
        return False
    if prompt_ids != tokenizer.encode(example.prompt):
        return False
    prompt = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode(prompt_ids + response_ids)
    if document.truncated:
        return len(whole) > len(prompt) and (prompt + example.response).startswith(whole)
    return whole == prompt + example.response


def truncate(tokenizer: Tokenizer, example: Example, document: Document, seq_len: int) -> Document | None:
    """Cut the response so that the document has at most `seq_len` tokens, and leave out eos.

    The cut moves back to where the tokens end with a whole character. None where no response token is left.
    """
    for end in range(min(seq_len, len(document.ids) - 1), document.num_prefix, -1):
        cut = Document(document.ids[:end], document.num_prefix, truncated=True)
        if span_is_proved(tokenizer, example, cut):
            return cut
    return None


def probe_ids(tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Ids of a few fixed texts: training compares them with the ids of the tokenizer beside the model."""
    return [
        {"text": text, "ids": ids} for text, ids in zip(PROBE_TEXTS, tokenizer.encode_batch(PROBE_TEXTS), strict=True)
    ]


def compare_with_reference(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, object] | None:
    """Where the folder has a tokenizer.model: on how many texts transformers and sentencepiece give equal ids.

    None where the folder has only a tokenizer.json (or GPT-2's files): transformers itself is the reference then.
    """
    model = tokenizer.path / "tokenizer.model"
    if not model.is_file():
        return None
    reference = load_sentencepiece(model).encode(list(texts))
    transformers_ids = tokenizer.hf(list(texts), add_special_tokens=False)["input_ids"]
    equal = sum(ours == theirs for ours, theirs in zip(transformers_ids, reference, strict=True))
    used = "sentencepiece" if tokenizer.sentencepiece is not None else "transformers"
    return {"used": used, "compared": "transformers with sentencepiece", "texts": len(texts), "equal": equal}
