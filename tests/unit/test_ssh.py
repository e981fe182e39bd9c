"""Hostfiles, and hosts that do not answer, with a stand-in for ssh; real ones: tests/launch."""

import sys
from pathlib import Path

import pytest

from sft import ssh
from sft.errors import UserError


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """An `ssh` that runs the last argument with bash here, but fails for the host `down`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    path = commands / "ssh"
    path.write_text(
        '#!/usr/bin/env bash\nhost=${*: -2:1}\necho "$*" >>"${0%/*}/calls"\n'
        'if [[ $host == down ]]; then echo "ssh: connect to host down: No route to host" >&2; exit 255; fi\n'
        'exec bash -c "${*: -1}"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return commands / "calls"


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# cluster\n\nn1 slots=8\nuser@n2   slots=4  # half\n")
    assert ssh.read_hostfile(path) == {"n1": 8, "user@n2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1\n", r"line 1: 'n1' is not `name slots=8`"),
        ("n1 slots=8\nn2 slots=x\n", r"line 2: 'n2 slots=x' is not"),
        ("n1 slots = 8\n", r"line 1: 'n1 slots = 8' is not"),  # DeepSpeed takes no spaces there
        ("n1 slots=0\n", r"line 1: 'n1 slots=0' is not"),
        ("n1 slots=8\nn1 slots=8\n", r"line 2: n1 stands there twice"),
        ("# nothing\n", r"names no host"),
    ],
)
def test_wrong_hostfile(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        ssh.read_hostfile(path)


def test_a_command_runs_in_this_folder_with_these_modules(tmp_path, fake_ssh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "with space:b")
    answers = ssh.on_hosts(["n1", "down"], ["bash", "-c", "echo $PWD; echo $PYTHONPATH"], limit_s=20)
    assert answers["n1"] == (0, f"{tmp_path}\nwith space:b\n")
    assert answers["down"][0] == 255
    assert "BatchMode=yes" in fake_ssh.read_text()


def test_every_host_that_does_not_answer_is_named(tmp_path, fake_ssh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ssh.check_hosts({"n1": 1}, Path("hosts"))
    with pytest.raises(UserError, match="hostfile hosts: down: ssh: connect to host down: No route to host"):
        ssh.check_hosts({"n1": 1, "down": 1}, Path("hosts"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"2 hosts\n  n1: no .*/python\n  n2: no"):
        ssh.check_hosts({"n1": 1, "n2": 1}, Path("hosts"))


def test_a_host_that_hangs_is_given_up(fake_ssh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ssh.on_hosts(["n1"], ["sleep", "30"], limit_s=0.5) == {"n1": (255, "no answer in 0 s")}


def test_the_users_own_options_come_first(monkeypatch):
    """ssh takes the first value of an option."""
    monkeypatch.setenv(ssh.PDSH_OPTIONS, "-p 2222 -o ConnectTimeout=60")
    assert ssh.ssh_options().startswith("-p 2222 -o ConnectTimeout=60 -o BatchMode=yes")
