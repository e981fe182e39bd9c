"""Started by test_gain.py on real ranks: held-out loss and answers, the model on each rank and spread over both."""

import json
import sys
from pathlib import Path

import torch

from sft.eval.answers import Prompt, answer
from sft.eval.gain import heldout_loss
from sft.eval.options import AnswersSection
from sft.eval.ranks import Ranks, join_ranks
from sft.eval.weights import open_model
from sft.tokenizer import load_tokenizer

PROMPTS = [Prompt(f"Say item {number}", "x" * (7 * number % 23)) for number in range(19)]
SECTION = AnswersSection(max_new_tokens=12)


def measure(folder: str, shards: str, placement: str, ranks: Ranks) -> dict[str, object]:
    """Loss in one batch, in more of them than ranks divide, and answers."""
    tokenizer = load_tokenizer(folder)
    spread = placement == "zero3"
    with open_model(folder, torch.float32, placement, ranks) as model:
        losses = [
            heldout_loss(model, shards, ranks, tokenizer, tokens_per_batch=tokens, lockstep=spread)
            for tokens in (100_000, 300)
        ]
        return {"losses": losses, "answers": answer(model, tokenizer, PROMPTS, SECTION, ranks, lockstep=spread)}


def main(folder: str, shards: str, out: str) -> None:
    """Writes <out>/<placement>-<rank>.json."""
    with join_ranks() as ranks:
        for placement in ("replicas", "zero3"):
            found = measure(folder, shards, placement, ranks)
            (Path(out) / f"{placement}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
