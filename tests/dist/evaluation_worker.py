"""Started by test_evaluation.py on real ranks: commands one after the other, each with a group of its own."""

import json
import os
import sys
from pathlib import Path

from sft import errors
from sft.eval import drift, evaluate, score

COMMANDS = {"eval": evaluate.main, "drift": drift.main}


def main(folder: str) -> None:
    """Run what <folder>/plan.json holds; each rank notes exit codes and how often it called the model idly."""
    errors.OTHER_RANKS_WAIT_S = 0
    called = 0
    idle = score.idle

    def counted(*given: object) -> None:
        nonlocal called
        called += 1
        idle(*given)

    score.idle = counted
    ends = {}
    for step in json.loads((Path(folder) / "plan.json").read_text()):
        called = 0
        os.environ["MASTER_PORT"] = step["port"]
        code = errors.run_command(COMMANDS[step["command"]], step["flags"])
        ends[step["name"]] = {"code": code, "idle": called}
    (Path(folder) / f"ends-{os.environ['RANK']}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
