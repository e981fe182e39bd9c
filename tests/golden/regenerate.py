"""Record golden files anew: `python -m tests.golden.regenerate [trajectory] [evaluation]`, without a name all of them.

In a tree where all else is committed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.errors import UserError, run_command
from tests import tiny
from tests.dist.training import Trained
from tests.golden import evaluation, trajectory
from tests.parity.world import make_world

GOLDEN = ("trajectory", "evaluation")


def main(argv: Sequence[str]) -> None:
    """Train, ask lm_eval, write the files, and say by how much they changed.

    Raises:
        UserError: arguments, or a tree that differs from its commit: the file could not be traced to its code.
    """
    if unknown := [name for name in argv if name not in GOLDEN]:
        raise UserError(f"{unknown[0]}: no golden file; there are {' and '.join(GOLDEN)}")
    refuse_dirty(tiny.REPO)
    with tempfile.TemporaryDirectory() as folder:
        if "trajectory" in (argv or GOLDEN):
            trained = trajectory.train(Path(folder), {})["golden"]
            print(write(trained, trajectory.FILE))
        if "evaluation" in (argv or GOLDEN):
            world = make_world(Path(folder) / "world", evaluation.JOBS)
            print(write_evaluation(evaluation.record(world), evaluation.FILE))


def refuse_dirty(repo: Path) -> None:
    """Raises UserError where a file other than the golden ones is changed, added, deleted or untracked."""
    asked = ["git", "-C", str(repo), "status", "--porcelain", "--untracked-files=all"]
    status = subprocess.run(asked, capture_output=True, text=True, check=False)
    if status.returncode != 0:
        raise UserError(f"{repo}: git status says: {status.stderr.strip()}; regenerate in a git checkout")
    golden = {f"tests/golden/{name}.json" for name in GOLDEN}
    dirty = [path for path in (line[3:] for line in status.stdout.splitlines()) if path not in golden]
    if dirty:
        more = f" and {len(dirty) - 1} more" if len(dirty) > 1 else ""
        raise UserError(f"{repo}: {dirty[0]}{more} not committed; commit first, so that the file belongs to a commit")


def write(trained: Trained, file: Path) -> str:
    """Replace `file` whole; returns what changed by how much."""
    said = "first recording"
    if file.exists():
        golden = json.loads(file.read_text())
        largest, mean = trajectory.differences(trained, golden)
        environment = trajectory.stamp_changes(golden["stamp"]) or "the same environment"
        said = f"largest relative difference {largest:.1e}, mean {mean:.1e}; {environment}"
    _replace(file, json.dumps(trajectory.record(trained), indent=1) + "\n")
    return f"{file.name}: {said}"


def write_evaluation(recorded: dict[str, Any], file: Path) -> str:
    """Replace `file` whole, a line for every document; returns how many differ from those before."""
    said = "first recording"
    if file.exists():
        before = json.loads(file.read_text())["jobs"]
        changed = sum(
            len({line.partition(":")[0] for line in evaluation.differences(samples, before.get(name, {}))})
            for name, samples in recorded["jobs"].items()
        )
        said = f"{changed} documents differ"
    jobs = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(sample)}" for key, sample in samples.items())
        + "\n}"
        for name, samples in recorded["jobs"].items()
    ]
    text = f'{{"stamp": {json.dumps(recorded["stamp"])},\n"jobs": {{\n' + ",\n".join(jobs) + "\n}}\n"
    _replace(file, text)
    return f"{file.name}: {said}"


def _replace(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


if __name__ == "__main__":
    sys.exit(run_command(main))
