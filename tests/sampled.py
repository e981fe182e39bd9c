"""What tests of the samples ask, of which model, and what transformers answers."""

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_prep.template import alpaca_prompt
from sft.tokenizer import load_tokenizer
from tests import tiny

LONGEST = 12
ROWS = [
    {"instruction": "Say item 1"},
    {"instruction": "Say item 2", "input": "twice"},
    {"instruction": "Name a colour, and no other word"},
    {"instruction": "Count", "input": "from one to three"},
    {"instruction": "Stop at once"},
]
"""Five for two ranks; three do not fit into the tokens of one forward."""


def make_readable_model(folder, **overrides):
    """A random model that writes ASCII, so that no two ids decode to the same text, and likes to stop."""
    tiny.make_model(folder, **overrides)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tiny.FIRST_BYTE + 128 :] = 0
    weights["lm_head.weight"][tiny.EOS] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_answers(model_path, before=(tiny.BOS,)):
    """[(answer, finished, tokens)]: transformers' greedy generation, each prompt alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), load_tokenizer(model_path)
    found = []
    for row in ROWS:
        ids = [*before, *tokenizer.encode(alpaca_prompt(**row))]
        output = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=LONGEST, eos_token_id=tiny.EOS, pad_token_id=0
        )
        new = output[0, len(ids) :].tolist()
        kept = new[:-1] if new[-1] == tiny.EOS else new
        found.append((tokenizer.decode(kept), new[-1] == tiny.EOS, len(kept)))
    return found


def answers(out, step):
    """Lines of samples.jsonl of a step, as `plain_answers`."""
    found = tiny.read_jsonl(out / "samples.jsonl")
    return [(line["answer"], line["finished"], line["tokens"]) for line in found if line["step"] == step]
