"""Record the golden trajectory anew: `python -m tests.golden.regenerate`, in a tree where all else is committed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sft.errors import UserError, run_command
from tests import tiny
from tests.dist.training import Trained
from tests.golden import trajectory


def main(argv: Sequence[str]) -> None:
    """Train, write trajectory.json, and say by how much it changed.

    Raises:
        UserError: arguments, or a tree that differs from its commit: the file could not be traced to its code.
    """
    if argv:
        raise UserError(f"{argv[0]}: takes no arguments; run python -m tests.golden.regenerate")
    refuse_dirty(tiny.REPO)
    with tempfile.TemporaryDirectory() as folder:
        trained = trajectory.train(Path(folder), {})["golden"]
    print(write(trained, trajectory.FILE))


def refuse_dirty(repo: Path) -> None:
    """Raises UserError where a file other than the golden one is changed, added, deleted or untracked."""
    asked = ["git", "-C", str(repo), "status", "--porcelain", "--untracked-files=all"]
    status = subprocess.run(asked, capture_output=True, text=True, check=False)
    if status.returncode != 0:
        raise UserError(f"{repo}: git status says: {status.stderr.strip()}; regenerate in a git checkout")
    golden = trajectory.FILE.relative_to(tiny.REPO).as_posix()
    dirty = [path for path in (line[3:] for line in status.stdout.splitlines()) if path != golden]
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
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(trajectory.record(trained), indent=1) + "\n")
    os.replace(temporary, file)
    return f"{file.name}: {said}"


if __name__ == "__main__":
    sys.exit(run_command(main))
