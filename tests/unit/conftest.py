"""An invented evaluation, shared by the tests of its commands."""

import json
from pathlib import Path

import pytest

from sft.eval import drift, examine, weights
from tests import tiny
from tests.eval_flags import drift_flags


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data in the hub's layout, and two models."""
    folder = tmp_path_factory.mktemp("commands")
    for subject, num in (("anatomy", 7), ("island_trade", 13)):
        target = folder / "data" / "cais" / "mmlu" / subject
        target.mkdir(parents=True)
        rows = [
            {
                "question": f"What is {number} in {subject}?",
                "choices": [f"it {number}", "no", "so", "None"],
                "answer": number % 4,
            }
            for number in range(num)
        ]
        for split, part in (("dev", rows[:5]), ("test", rows)):
            (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    rows = [
        {"ind": number, "activity_label": "Fishing", "ctx_a": f"They cast net {number}.", "ctx_b": "then",
         "endings": ["fish", f"sleep {number}", "all go home", "eat it"],
         "source_id": f"v~{number // 2}", "label": number % 4}
        for number in range(30)
    ]  # fmt: skip
    for split in ("train", "val"):
        (folder / "data" / f"hellaswag_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("base", "tuned", "other")):
        tiny.make_model(folder / name, seed=seed, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="module")
def reported(world, prepared, tmp_path_factory):
    """One report of all there is: two tuned models, held-out loss, answers, noise floor."""
    out = tmp_path_factory.mktemp("reported")
    (world / "prompts.txt").write_text("Say item 3\nName a river\n")
    more = ["--answers.prompts", str(world / "prompts.txt"), "--answers.max_new_tokens", "5"]
    more += ["--heldout", str(prepared / "heldout"), "--noise_items", "4"]
    flags = drift_flags(world, out, *more, tuned="tuned,other")
    drift.main(flags)
    return out, flags


@pytest.fixture
def loaded(monkeypatch):
    """Folders of the models that were loaded."""
    folders = []
    right = weights.open_model

    def noted(folder, *given):
        folders.append(Path(folder).name)
        return right(folder, *given)

    for module in (weights, examine):
        monkeypatch.setattr(module, "open_model", noted)
    return folders
