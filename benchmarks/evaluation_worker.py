"""One whole scoring command, run in a process of its own by benchmarks/evaluation.py, which gives the facts as JSON.

Neither command is changed: one hook notes the time of the first forward and takes itself away, and of lm_eval the ids
that it gives its model are counted.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


def main() -> None:
    """Run the command; write its seconds until the first forward, and of lm_eval the tokens it computed."""
    facts = json.loads(sys.argv[1])
    found: dict[str, float] = {}

    def note_time(*_: Any) -> None:
        found["start_s"] = time.time() - facts["started_s"]
        hook.remove()

    hook = register_module_forward_pre_hook(note_time)
    os.chdir(facts["folder"])
    sys.argv = facts["command"]
    try:
        run_ours() if facts["side"] == "ours" else run_lm_eval(found)
    finally:  # both commands may leave by SystemExit
        Path(facts["result"]).write_text(json.dumps(found), encoding="utf-8")


def run_ours() -> None:
    """What the `sft` script does."""
    from sft.cli import main as command

    command()


def run_lm_eval(found: dict[str, float]) -> None:
    """What the `lm_eval` script does, with a count of ids in front of each forward."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    call = HFLM._model_call
    found |= {"tokens": 0, "padded_tokens": 0}

    def counting_call(self: HFLM, inps: Any, *arguments: Any, **options: Any) -> Any:
        behind = (inps.flip(1) != 0).int().argmax(1)  # rows are padded with id 0 on the right
        found["padded_tokens"] += inps.numel()
        found["tokens"] += inps.numel() - int(behind.sum())
        return call(self, inps, *arguments, **options)

    HFLM._model_call = counting_call
    cli_evaluate()


if __name__ == "__main__":
    main()
