"""What the ranks of other hosts get: through DeepSpeed's own command line for pdsh, and a shell in ssh's place."""

import argparse
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.launch_env import ENV_FILE, SECRETS_FILE, for_pdsh, hand_on, is_secret, take_secrets

ODD = [
    "plain",
    "a b",
    "",
    "$HOME",
    "a $HOME b",
    'say "hi"',
    "it's",
    "100%",
    "%n %h %u",
    "a\\b c",
    "a\\b",
    "`id`",
    "(x);y&z",
]
ODD += ["x=1,2:3", "*", "[1, 2]", '{"path": "a b"}', "é ü"]


def remote_shell(command: list[str]) -> str:
    """What pdsh hands to ssh, and ssh to the other host's shell: the words joined, %% for a per cent sign."""
    words = command[command.index("-w") + 2 :]
    text = " ".join(words)
    assert not [sign for sign in ("%n", "%h", "%u") if sign in text.replace("%%", "").replace("--node_rank=%n", "")]
    done = subprocess.run(
        ["bash", "-c", text.replace("--node_rank=%n", "--node_rank=0").replace("%%", "%")],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    return done.stdout


def through_deepspeed(tmp_path: Path, environment: dict[str, str], options: list[str]) -> dict:
    """Environment and arguments of a rank that DeepSpeed's pdsh runner starts on another host."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    show = tmp_path / "show.py"
    show.write_text("import json, os, sys; print(json.dumps({'argv': sys.argv[1:], 'environ': dict(os.environ)}))")
    given = hand_on(environment, tmp_path)
    args = argparse.Namespace(
        user_args=[for_pdsh(option) for option in options], user_script=str(show), launcher_args="", master_addr="a",
        master_port=1, no_python=False, module=False, no_local_rank=False, save_pid=False, enable_each_rank_log=None,
        ssh_port=None, venv_script=None,
    )  # fmt: skip
    runner = PDSHRunner(args, "world")
    for line in Path(given[ENV_FILE]).read_text().splitlines():  # as deepspeed.launcher.runner reads it
        runner.add_export(*line.split("=", maxsplit=1))
    command, _, _ = runner.get_cmd({}, {"hosta": [0], "hostb": [0]})
    launch = command.index("deepspeed.launcher.launch")
    script = command.index(str(show))
    return json.loads(remote_shell([*command[: launch - 2], *command[script:]]))


def test_options_and_variables_arrive_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environment = {f"NCCL_ODD_{number}": text.strip() for number, text in enumerate(ODD)}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "UNRELATED": "x", "CUDA_VISIBLE_DEVICES": "3"}
    rank = through_deepspeed(tmp_path, {**environment, "PATH": os.environ["PATH"]}, ODD)
    assert rank["argv"] == ODD
    assert {name: rank["environ"].get(name) for name in environment} == {
        **environment, "UNRELATED": None, "CUDA_VISIBLE_DEVICES": None
    }  # fmt: skip
    assert rank["environ"]["PYTHONPATH"].split(":")[0] == str(tmp_path)


def test_control_what_deepspeed_alone_makes_of_them(tmp_path):
    """If this fails, `for_pdsh` can go."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    args = argparse.Namespace(user_args=["$HOME"], user_script="x")
    assert PDSHRunner(args, "world").parse_user_args() == ["$HOME"], "which the other host's shell replaces"


def test_secrets_stand_in_a_file_that_the_user_alone_may_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("HF_TOKEN=from-file\n")
    environment = {"WANDB_API_KEY": "very-secret", "WANDB_PROJECT": "p", "MLFLOW_TRACKING_PASSWORD": "hidden"}
    given = hand_on(environment, tmp_path)
    listed = Path(given[ENV_FILE]).read_text()
    assert "WANDB_PROJECT=p" in listed
    for value in ("very-secret", "hidden", "from-file"):
        assert value not in listed
        assert value not in given.values(), "DeepSpeed exports some of its own environment by itself"
    path = tmp_path / "secrets.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv(SECRETS_FILE, str(path))
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    take_secrets()
    assert os.environ["WANDB_API_KEY"] == "very-secret"
    assert os.environ["HF_TOKEN"] == "from-file"
    monkeypatch.setenv(SECRETS_FILE, str(tmp_path / "elsewhere.json"))
    with pytest.raises(UserError, match="does not see what the launcher wrote there"):
        take_secrets()


def test_without_secrets_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    hand_on({"WANDB_PROJECT": "p"}, tmp_path)
    assert not (tmp_path / "secrets.json").exists()
    monkeypatch.delenv(SECRETS_FILE, raising=False)
    take_secrets()


@pytest.mark.parametrize(
    ("name", "secret"),
    [("WANDB_API_KEY", True), ("HF_TOKEN", True), ("X_SECRET", True), ("DB_PASSWORD", True), ("NCCL_IB_PKEY", False),
     ("TOKENIZERS_PARALLELISM", False), ("WANDB_PROJECT", False)],
)  # fmt: skip
def test_secrets_are_known_by_their_names(name, secret):
    assert is_secret(name) is secret


def test_the_users_own_file(tmp_path, monkeypatch):
    """As DeepSpeed reads it, but with blank lines, comments and quotes."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nNCCL_IB_HCA=mlx5\n")
    (here / ".deepspeed_env").write_text('# ours\n\nexport NCCL_DEBUG=INFO\nMY_TEXT="a b"\n')
    lines = Path(hand_on({"NCCL_DEBUG": "TRACE"}, tmp_path)[ENV_FILE]).read_text().splitlines()
    assert "NCCL_DEBUG=INFO" in lines
    assert "NCCL_IB_HCA=mlx5" in lines
    assert "MY_TEXT=a b" in lines
    (here / ".deepspeed_env").write_text("A=1\nsource secret-file\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 2: is no NAME=value") as caught:
        hand_on({}, tmp_path)
    assert "secret-file" not in str(caught.value)


def test_this_python_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = Path(hand_on({"PATH": str(Path(sys.executable).parent)}, tmp_path)[ENV_FILE]).read_text().splitlines()
    assert f"PATH={Path(sys.executable).parent}" in lines
