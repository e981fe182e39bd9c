"""Plans of training runs for tests.dist.run_worker, and what came of them."""

import json
from pathlib import Path
from typing import Any

import torch

from data_prep.shards import open_shards
from sft.checkpoint import Pieces, read_meta, step_folder
from sft.zero_state import STATES
from tests import tiny
from tests.dist import forked
from tests.dist.training import metrics


class Runs:
    """What a plan came to."""

    def __init__(self, folder: Path, plan: list[list[dict[str, Any]]], timeout_s: int = 400) -> None:
        self.folder = folder
        text = folder / "plan.json"
        text.write_text(json.dumps(plan, default=str))
        done = forked.run("tests.dist.run_worker", str(text), str(folder), timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        self.ends: dict[str, list[int]] = {}
        for line in tiny.read_jsonl(folder / "ends.jsonl"):
            self.ends.setdefault(line["run"], []).append(line["code"])

    def ended_with(self, name: str, code: int) -> None:
        """Assert that every rank of a run left with `code`."""
        assert set(self.ends[name]) == {code}, self.said(name)

    def said(self, name: str) -> str:
        """Everything that all ranks of a run wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.[0-9].*")))

    def events(self, out: str, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, without their time."""
        found = tiny.read_jsonl(self.folder / out / "events.jsonl")
        return [{key: event[key] for key in event if key != "time"} for event in found if event["event"] == kind]

    def column(self, out: str, key: str) -> list[Any]:
        """One value of every line of metrics.jsonl."""
        return [line[key] for line in metrics(self.folder / out)]

    def saved(self, out: str, step: int) -> dict[str, torch.Tensor]:
        """Every parameter and moment of a checkpoint, flattened, by "<name>|<state>"."""
        return read_states(step_folder(self.folder / out / "checkpoints", step))

    def packs_read(self, name: str) -> dict[int, list[int]]:
        """The packs of each step in the order of forward, rank, and place in the micro-batch."""
        found: dict[int, list[int]] = {}
        lines = tiny.read_jsonl(self.folder / f"{name}.packs")
        for line in sorted(lines, key=lambda line: (line["step"], line["forward"], line["rank"])):
            found.setdefault(line["step"], []).extend(line["packs"])
        return found


def read_states(folder: Path) -> dict[str, torch.Tensor]:
    """Every trained parameter and moment of a checkpoint, flattened, by "<name>|<state>"."""
    meta, pieces = read_meta(folder), Pieces(folder)
    numel = {name: torch.Size(shape).numel() for name, shape in meta["shapes"].items()}
    return {f"{name}|{state}": pieces.read(name, state, 0, numel[name]) for name in numel for state in STATES}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 difference over tensors."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / other[key].norm()) for key in one)


def rollback_note(data: Path, rows_per_step: int, spike: int, passed_over: list[int], seed: int = 0) -> dict:
    """An entry of rollbacks.json of a run over these shards."""
    of = {"data_key": open_shards(data).manifest["content_key"], "data_seed": seed, "rows_per_step": rows_per_step}
    return {"spike": spike, "to": "", "passed_over": passed_over, "of": of}
