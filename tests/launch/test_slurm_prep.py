"""launch/prep.slurm under a real Slurm: an array of two jobs side by side on one node.

Run: pytest tests/launch/test_slurm_prep.py
"""

import json
import tempfile
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.launch.hosts import two_hosts, why_not
from tests.launch.slurm import TOOLS, cluster

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

SCRIPT = tiny.REPO / "launch" / "prep.slurm"
TASKS = ("0", "1")


def content_key(prepared: Path) -> str:
    return str(json.loads((prepared / "train" / "manifest.json").read_text())["content_key"])


def test_array_prepares_two_data_sets_at_once_on_one_node(tmp_path, base_model):
    pytest.importorskip("ray")
    if reason := why_not(*TOOLS):
        pytest.skip(reason)
    from data_prep.build import main

    work = tmp_path / "work"
    work.mkdir()
    for task in TASKS:
        rows = tiny.make_alpaca(work / f"rows-{task}.json", seed=int(task))
        options = {"sources": [str(rows)], "tokenizer": str(base_model), "seq_len": 512, "heldout": 6}
        (work / f"prep-{task}.yaml").write_text(yaml.safe_dump({**options, "out": "nowhere"}))
    sharing = ["--nodes=1", "--nodelist=hosta", "--oversubscribe", "--cpus-per-task=2"]
    with (
        tempfile.TemporaryDirectory() as local,  # not pytest's: the names of sockets must be short
        two_hosts(tmp_path / "hosts") as hosts,
        cluster(tmp_path / "slurm", hosts) as slurm,
    ):
        words = ["--array=0-1", *sharing, SCRIPT, "prep-%a.yaml", "--out", "part-%a"]
        array = slurm.submit(work, *words, TMPDIR=local)
        ends = [slurm.wait(f"{array}_{task}") for task in TASKS]
        left = [*slurm.left(), *Path(local).iterdir()]
    logs = "\n".join(path.read_text() for path in sorted(work.glob("*.log")))
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 2, logs
    assert [end["NodeList"] for end in ends] == ["hosta"] * 2
    assert max(end["StartTime"] for end in ends) < min(end["EndTime"] for end in ends), "side by side"
    assert left == []
    for task in TASKS:
        main(["--config", str(work / f"prep-{task}.yaml"), "--workers", "1", "--out", str(work / f"alone-{task}")])
    keys = [content_key(work / f"part-{task}") for task in TASKS]
    assert keys == [content_key(work / f"alone-{task}") for task in TASKS]
    assert keys[0] != keys[1], "control: they had different work"
