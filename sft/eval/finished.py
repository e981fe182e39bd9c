"""What an interrupted run had finished: answers by bin, one line each, that the next start does not compute again."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sft.errors import UserError
from sft.eval.forward import Answers
from sft.eval.results import write_atomically
from sft.eval.tree import Bin

FOLDER = "unfinished"
IDENTITY = "identity.json"
LARGEST_LL = 1e-3
"""A log-likelihood is at most 0, and a little more by rounding."""


def open_unfinished(out: Path, identity: dict[str, Any]) -> bool:
    """Make <out>/unfinished/ for scores that depend on `identity`; whether it holds some already.

    Raises:
        UserError: it holds scores that depend on something else.
    """
    folder = out / FOLDER
    file = folder / IDENTITY
    if file.is_file():
        check_same(read_identity(file), identity, f"--out {out} holds an interrupted run")
        return any(folder.glob("*.jsonl"))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(file, json.dumps(identity, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    return False


def close_unfinished(out: Path) -> None:
    """Forget them: the results are complete."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def read_identity(file: Path) -> dict[str, Any]:
    """What earlier scores depend on.

    Raises:
        UserError: the file is not what this program wrote.
    """
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(identity, dict):
            return identity
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{file}: cannot be read; remove the folder {file.parent}, or choose another --out")


def check_same(earlier: dict[str, Any], now: dict[str, Any], what: str, within: str = "") -> None:
    """Refuse to go on with scores that were made otherwise.

    Args:
        earlier: identity of the scores at hand.
        now: identity of those that are wanted.
        what: beginning of the message.
        within: where in the identity both are, "" or "tasks.".

    Raises:
        UserError: naming the first setting that differs, and both values. What a user can set comes before the
            digests that follow from it.
    """

    def rank(key: str) -> tuple[bool, bool, str]:
        return isinstance(now.get(key), dict), key.endswith("_sha256"), key

    for key in sorted(earlier.keys() | now.keys(), key=rank):
        before, after = earlier.get(key), now.get(key)
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                check_same(before, after, what, f"{within}{key}.")
            raise UserError(
                f"{what} with other settings: {within}{key} was {_show(before)}, is {_show(after)}; "
                "choose another --out, or remove that folder"
            )


class Kept:
    """The finished bins of one task: read by the first rank, written by each to a file of its own.

    With `out` None nothing is kept.
    """

    def __init__(self, out: Path | None, task: str, rank: int) -> None:
        self.folder = out / FOLDER if out else None
        self.task = task
        self.rank = rank
        self.stream: TextIO | None = None

    def read(self, bins: Sequence[Bin]) -> dict[int, list[Answers]]:
        """Answers by the bin's index. A torn or foreign line is passed over: its bin is computed again."""
        found: dict[int, list[Answers]] = {}
        if self.folder is None:
            return found
        for file in sorted(self.folder.glob(f"{self.task}-*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    index, requests, lls, greedy = row["bin"], row["requests"], row["lls"], row["greedy"]
                    scores = np.array(lls, dtype=np.float64)
                    is_own = type(index) is int and index >= 0 and requests == bins[index].requests
                    fits = scores.shape == (len(requests),) == (len(greedy),) and bool((scores < LARGEST_LL).all())
                    if is_own and fits:
                        flags = np.array([flag is True for flag in greedy])
                        found[index] = [Answers(np.array(bins[index].requests), scores, flags)]
                except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                    continue
        return found

    def write(self, index: int, answers: Sequence[Answers]) -> None:
        """Keep a finished bin."""
        if self.folder is None:
            return
        if self.stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)  # another host may not share the first rank's folder
            self.stream = (self.folder / f"{self.task}-{self.rank}.jsonl").open("a", encoding="utf-8")
            self.stream.write("\n")  # behind what may be a torn line
        row = {
            "bin": index,
            "requests": [int(number) for part in answers for number in part.requests],
            "lls": [float(ll) for part in answers for ll in part.lls],
            "greedy": [bool(flag) for part in answers for flag in part.greedy],
        }
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End writing."""
        if self.stream is not None:
            self.stream.close()


def _show(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return "not given" if value is None else "given"
    return str(value)[:60]
