"""A run's folder: one run at a time, seen by all. Run: pytest tests/unit/test_run_folder.py"""

import os
import signal

import pytest

from sft import run_folder
from sft.config import DataSection, ModelSection, RunConfig
from sft.errors import UserError
from sft.run_folder import await_config, lock, write_config


def config(out):
    return RunConfig(model=ModelSection(path="m"), data=DataSection(train="d"), out=str(out))


def test_a_second_run_is_refused_and_told_whose_it_is(tmp_path):
    """The first one is another process, which holds the lock until it ends."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock(tmp_path / "run")
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"a run is at work there .process {pid} on {os.uname().nodename}"):
        lock(tmp_path / "run")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock(tmp_path / "run")  # control: a killed run holds nothing


def test_a_folder_with_nothing_but_a_lock_is_new(tmp_path):
    (tmp_path / "lock").write_text("")
    assert run_folder.run_folder(config(tmp_path)) == tmp_path
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is no run folder"):
        run_folder.run_folder(config(tmp_path))


def test_a_folder_that_cannot_be_made_is_refused_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--out .*file/run: {tmp_path}/file is no folder that can be written to"):
        run_folder.run_folder(config(tmp_path / "file" / "run"))
    new = tmp_path / "a" / "b"
    assert run_folder.run_folder(config(new)) == new
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(UserError, match=f"--out .*a/b: {tmp_path} is no folder that can be written to"):
        run_folder.run_folder(config(new))


def test_options_are_written_whole(tmp_path):
    write_config(config(tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    await_config(tmp_path)


def test_a_host_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "VISIBLE_AFTER_S", 0.0)
    with pytest.raises(UserError, match=f"{os.uname().nodename} does not see what rank 0 wrote"):
        await_config(tmp_path / "run")
