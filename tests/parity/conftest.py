import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parity.jobs import JOBS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub/ with the data, and one model folder per variant."""
    from tests.parity.invented import write_hub
    from tests.parity.models import write_model, write_tokenizer

    folder = tmp_path_factory.mktemp("parity")
    write_hub(folder / "hub")
    for name in ("bos", "nobos", "short", "bytes"):
        write_tokenizer(folder / name, adds_bos=name != "nobos", byte_level=name == "bytes")
        write_model(folder / name, max_length=100 if name == "short" else 2048)
    return folder


@pytest.fixture(scope="session")
def reference(world: Path) -> dict[str, Any]:
    """What lm_eval answers to every job; one process, no network."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install .[dev])")
    jobs = [
        {"name": name, "model": str(world / model), "tasks": tasks, "shots": shots}
        for name, model, tasks, shots in JOBS
    ]
    (world / "jobs.json").write_text(json.dumps(jobs))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(world / "hf"), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, str(HERE / "reference.py"), str(world / "jobs.json"), str(world / "answers.json")],
        cwd=world / "hub",
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads((world / "answers.json").read_text())
