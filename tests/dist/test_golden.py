"""Twenty steps equal what was committed; recorded anew only from a clean tree. Run: pytest tests/dist/test_golden.py"""

import json
import subprocess

import pytest

from sft.errors import UserError
from tests import tiny
from tests.golden import regenerate, trajectory

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The golden run, and one with a tenth less weight decay: the smallest thing that must be noticed."""
    return trajectory.train(tmp_path_factory.mktemp("golden"), {"less_decay": {"optim.weight_decay": 0.09}})


def test_losses_and_norms_are_those_that_were_committed(trained):
    verdict = trajectory.verdict(trained["golden"], trajectory.read())
    assert verdict is None, verdict


def test_it_learns(trained):
    """A trajectory that went nowhere would hide most mistakes."""
    assert trained["golden"].losses[-1] < 0.9 * trained["golden"].losses[0]


def test_control_a_little_less_decay_is_noticed(trained):
    assert "the training changed" in trajectory.verdict(trained["less_decay"], trajectory.record(trained["golden"]))


def test_a_failure_under_other_versions_says_so(trained):
    golden = trajectory.record(trained["golden"])
    golden["stamp"]["torch"] = "1.0"
    assert "torch was 1.0, is" in trajectory.verdict(trained["less_decay"], golden)
    assert trajectory.verdict(trained["golden"], golden) is None, "other versions alone are no failure"


def test_one_loss_beyond_the_limit_is_noticed(trained):
    for factor, noticed in ((1 + 0.5 * trajectory.LARGEST, False), (1 + 2 * trajectory.LARGEST, True)):
        golden = trajectory.record(trained["golden"])
        golden["losses"] = [*golden["losses"][:-1], golden["losses"][-1] * factor]
        assert (trajectory.verdict(trained["golden"], golden) is not None) == noticed


def test_all_losses_a_little_off_are_noticed_by_their_mean(trained):
    golden = trajectory.record(trained["golden"])
    golden["losses"] = [loss * (1 + 0.9 * trajectory.LARGEST) for loss in golden["losses"]]
    assert trajectory.verdict(trained["golden"], golden) is not None


def git(repo, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(repo), *identity, *arguments], check=True, capture_output=True)


def test_a_dirty_tree_is_refused(tmp_path):
    golden = tmp_path / trajectory.FILE.relative_to(tiny.REPO)
    golden.parent.mkdir(parents=True)
    with pytest.raises(UserError, match="regenerate in a git checkout"):
        regenerate.refuse_dirty(tmp_path)
    git(tmp_path, "init", "-q")
    golden.write_text("{}")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    regenerate.refuse_dirty(tmp_path)
    golden.write_text("{ }")
    regenerate.refuse_dirty(tmp_path)
    (tmp_path / "new.py").write_text("1")
    with pytest.raises(UserError, match=r"new\.py not committed"):
        regenerate.refuse_dirty(tmp_path)
    (tmp_path / "code.py").write_text("2")
    with pytest.raises(UserError, match=r"code\.py and 1 more not committed"):
        regenerate.refuse_dirty(tmp_path)


def test_the_command_itself_refuses_and_trains_nothing(monkeypatch, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "new.py").write_text("1")
    monkeypatch.setattr(tiny, "REPO", tmp_path)
    monkeypatch.setattr(trajectory, "FILE", tmp_path / "tests" / "golden" / "trajectory.json")
    monkeypatch.setattr(trajectory, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"new\.py not committed"):
        regenerate.main([])
    assert not trajectory.FILE.exists()


def test_recording_says_by_how_much_it_changed(trained, tmp_path):
    file = tmp_path / "trajectory.json"
    assert regenerate.write(trained["less_decay"], file) == "trajectory.json: first recording"
    assert json.loads(file.read_text())["losses"] == trained["less_decay"].losses
    said = regenerate.write(trained["golden"], file)
    assert "largest relative difference" in said
    assert "0.0e+00" not in said
    assert "largest relative difference 0.0e+00, mean 0.0e+00; the same environment" in regenerate.write(
        trained["golden"], file
    )
