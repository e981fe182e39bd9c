"""What a tokenizer does to a few texts: recorded in the manifest, and compared between libraries in every build."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from data_prep.fast import FastTokens, count_equal, load_fast
from data_prep.specials import encode_with_specials
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_sentencepiece

PROBE_TEXTS = (
    "Below is an instruction that describes a task.\n\n### Response:\n",
    "def f(x):\n    return  x  # two  spaces\n\n\n\tdone",
    "naïve café, 你好世界, Привет, 🙂👩‍💻",
    "1234567890 + 0.5 = ?  \n  <b>AT&T</b>",
)
HARD_TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "\r\n\tmixed\r\n \n  white\u00a0space\u3000here",
    "don't I'll we'RE THEY'VE",
    "e\u0301 \u00e9 \ufb01 \u212b ①Ⅷ",
    "한국어 日本語 ไทย العربية עברית हिन्दी",
    "🏳️‍🌈🇩🇪👨‍👩‍👧‍👦\u200b\u200d\ufeff",
    "\U00020000\U0001f600\u4dff",
    "x" * 300 + " " * 90 + "=" * 130,
    "a1b22c333 3.14159e-10 0x7fff ١٢٣",
    "{'key': [1, 2, {\"a\": null}]}\\n\\t\\u0041",
    "\u2581\u2581low line\u2581 ▁▁▁",
    "SELECT * FROM t WHERE a>=1; -- ok\n/* c */",
    "https://example.org/a_b-c?d=e&f=%20#g",
)


def probe_ids(tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Ids of a few fixed texts: training compares them with the ids of the tokenizer beside the model."""
    return [
        {"text": text, "ids": ids} for text, ids in zip(PROBE_TEXTS, tokenizer.encode_batch(PROBE_TEXTS), strict=True)
    ]


def check_vocabulary(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids for which the model beside it has no embedding: training would refuse its shards.

    Raises:
        UserError: an id is not below vocab_size of the folder's config.json, where there is one.
    """
    file = tokenizer.path / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        raise UserError(f"tokenizer {file}: not valid JSON; copy it from the model again") from None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        token = tokenizer.token(tokenizer.vocab_size - 1)
        raise UserError(
            f"tokenizer {tokenizer.path}: ids reach {tokenizer.vocab_size - 1} ({json.dumps(token)}), but config.json "
            f"gives the model {rows} embedding rows (vocab_size); use the model's own tokenizer, and a token that it "
            "has as eos_token"
        )


def compare_encoders(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[FastTokens | None, dict[str, Any]]:
    """(gigatoken where it gives the reference's ids on every text, else None; the comparison for the manifest).

    The reference is sentencepiece for a bare tokenizer.model and transformers (by its `tokenizers` backend) otherwise.
    """
    reference = "transformers" if tokenizer.sentencepiece is None else "sentencepiece"
    compared = [*PROBE_TEXTS, *HARD_TEXTS, *texts]
    fast = load_fast(tokenizer)
    equal = count_equal(fast, tokenizer, compared) if fast else 0
    proved = fast if equal == len(compared) else None
    return proved, {
        "used": f"gigatoken {version('gigatoken')}" if proved else reference,
        "reference": reference,
        "supported_by_gigatoken": fast is not None,
        "texts": len(compared),
        "equal": equal,
    }


def compare_conversion(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any] | None:
    """Where the folder has a tokenizer.model: on how many texts transformers and sentencepiece give equal ids.

    None where the folder has only a tokenizer.json (or GPT-2's files): transformers itself is the reference then.
    """
    model = tokenizer.path / "tokenizer.model"
    if not model.is_file():
        return None
    by_pieces = replace(tokenizer, sentencepiece=load_sentencepiece(model))
    reference = [encode_with_specials(by_pieces, text) for text in texts]
    converted = [
        encoding.ids for encoding in tokenizer.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    ]
    equal = sum(ours == theirs for ours, theirs in zip(converted, reference, strict=True))
    used = "sentencepiece" if tokenizer.sentencepiece is not None else "transformers"
    return {"used": used, "compared": "transformers with sentencepiece", "texts": len(texts), "equal": equal}
