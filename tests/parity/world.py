"""A folder with invented data and tiny models, and lm_eval's answers about them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.parity.invented import SUBJECTS, write_hub
from tests.parity.jobs import Job
from tests.parity.models import CHATML, REFUSES_SYSTEM, write_model, write_tokenizer

TEMPLATES = {"chat": CHATML, "chat-refuses": REFUSES_SYSTEM}


def make_world(folder: Path, jobs: Sequence[Job]) -> Path:
    """hub/ with two subjects, hub57/ with all, and the model folders that the jobs name."""
    from sft.eval.tasks.mmlu import CATEGORIES

    write_hub(folder / "hub", SUBJECTS, num_test=12)
    write_hub(folder / "hub57", sorted(name for names in CATEGORIES.values() for name in names), num_test=2)
    for name in sorted({job.model for job in jobs}):
        write_tokenizer(folder / name, adds_bos=name != "nobos", byte_level=name == "bytes")
        write_model(folder / name, max_length=100 if name == "short" else 2048)
        if name in TEMPLATES:
            (folder / name / "chat_template.jinja").write_text(TEMPLATES[name])
    return folder


def ask_lm_eval(world: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """Answers of all jobs by name; see reference.py."""
    asked = [asdict(job) | {"model": str(world / job.model), "hub": str(world / job.hub)} for job in jobs]
    (world / "jobs.json").write_text(json.dumps(asked))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(world / "hf"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("reference.py")
    outcome = subprocess.run(
        [sys.executable, str(script), str(world / "jobs.json"), str(world / "answers.json")],
        cwd=world,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return dict(json.loads((world / "answers.json").read_text()))
