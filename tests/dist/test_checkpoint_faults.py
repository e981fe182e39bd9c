"""Real runs whose checkpoints cannot be written, or are damaged, and what is left of them.

Run: pytest tests/dist/test_checkpoint_faults.py
"""

import shutil

import pytest

from sft import checkpoint
from tests import tiny
from tests.dist import forked
from tests.dist.training import SETTINGS, largest_difference, weights

pytestmark = pytest.mark.dist

OPTIONS = {"train__max_steps": 4, "checkpoint__every": 1}


def train_alone(out, model, data, strategy, largest_file=None, **options):
    """One rank without a launcher, whose files may not be larger than `largest_file` bytes: as on a full disk."""
    settings = {**SETTINGS, "model.path": model, "data.train": data / "train", "deepspeed": strategy, "out": out}
    settings |= {name.replace("__", "."): value for name, value in {**OPTIONS, **options}.items()}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return forked.run("sft.train", *flags, largest_file=largest_file)


def events(out, kind):
    return [event for event in tiny.read_jsonl(out / "events.jsonl") if event["event"] == kind]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def half(tmp_path_factory, base_model, prepared, strategy):
    """A run of four steps that was stopped after two."""
    out = tmp_path_factory.mktemp("half") / "run"
    done = train_alone(out, base_model, prepared, strategy, train__stop_after=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory, base_model, prepared, strategy):
    out = shutil.copytree(half, tmp_path_factory.mktemp("whole") / "run")
    assert train_alone(out, base_model, prepared, strategy).returncode == 0
    return out


def test_a_save_that_cannot_be_written_ends_the_run_and_nothing_else(
    half, whole, tmp_path, base_model, prepared, strategy
):
    out = shutil.copytree(half, tmp_path / "run")
    before = contents(out / "checkpoints")
    largest = max(map(len, before.values()))
    done = train_alone(out, base_model, prepared, strategy, largest_file=largest // 2)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "checkpoint of step 3: rank 0 on" in lines[0]
    assert "could not write it: File too large" in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert contents(out / "checkpoints") == before, "the earlier ones are untouched, and nothing half written is left"
    assert "could not write" in events(out, "error")[-1]["reason"]
    assert not (out / "export").exists()

    done = train_alone(out, base_model, prepared, strategy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in events(out, "resume")] == [2, 2], "the run that failed, and this one"
    assert largest_difference(weights(out), weights(whole)) < 1e-6


def test_a_flipped_bit_in_the_newest_is_told_of_and_the_one_before_is_used(
    half, whole, tmp_path, base_model, prepared, strategy
):
    out = shutil.copytree(half, tmp_path / "run")
    newest = out / "checkpoints" / "step-00000002"
    file = newest / checkpoint.rank_file(0, 1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    done = train_alone(out, base_model, prepared, strategy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is damaged and will not be used" in done.stdout
    told = events(out, "damaged")
    assert len(told) == 1
    assert "step-00000002" in told[0]["reason"]
    assert [event["step"] for event in events(out, "resume")] == [1]
    aside = newest.with_name("step-00000002.damaged")
    assert (aside / file.name).read_bytes() == content, "kept, for whoever wants to look"
    assert largest_difference(weights(out), weights(whole)) < 1e-6
