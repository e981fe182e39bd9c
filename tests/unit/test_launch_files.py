"""Launch scripts: they parse, they name what exists, and signals reach the ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.dist import stand_in

ROOT = Path(__file__).parent.parent.parent
SLURM_SCRIPTS = [ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "prep.slurm"]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *SLURM_SCRIPTS, ROOT / ".ci" / "run"]
VENV = Path(sys.executable).parent
RUN_FILE = "model: {path: m}\ndata: {train: d}\nout: o\n"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def make_command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


# Scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_script_is_valid_shell(script):
    assert os.access(script, os.X_OK) or script in SLURM_SCRIPTS
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_scripts_pass_shellcheck(tmp_path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    run = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    careless = tmp_path / "careless.sh"
    careless.write_text("#!/usr/bin/env bash\nrm -r $1/x\n")
    assert subprocess.run([shellcheck, careless], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("single_node.sh", []),
        ("single_node.sh", ["missing.yaml"]),
        ("single_node.sh", ["--optim.lr", "1"]),
        ("multi_node.sh", []),
        ("multi_node.sh", ["hosts"]),
        ("multi_node.sh", ["hosts", "missing.yaml"]),
        ("multi_node.sh", ["missing", "run.yaml"]),
        ("slurm.sbatch", []),
        ("slurm.sbatch", ["missing.yaml"]),
        ("prep.slurm", []),
        ("prep.slurm", ["missing.yaml"]),
        ("prep.slurm", ["--workers", "1"]),
        ("prep.slurm", ["prep-%a.yaml"]),
    ],
)
def test_wrong_arguments_show_the_usage(tmp_path, script, arguments):
    (tmp_path / "hosts").write_text("a slots=8\n")
    (tmp_path / "run.yaml").write_text("out: o\n")
    run = subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


@pytest.fixture
def recorded(tmp_path) -> Callable[..., list[list[str]]]:
    """Run a launch script with a `deepspeed` that writes down its arguments; returns those of every call."""
    commands = tmp_path / "bin"
    commands.mkdir()
    make_command(
        commands,
        "deepspeed",
        f'printf "%s\\n" "$@" >"{tmp_path}/call-${{SLURM_NODEID:-0}}"; echo 0 >"$SFT_EXIT_CODES/0"',
    )
    make_command(commands, "scontrol", '[[ "$*" == "show hostnames node[1-2]" ]] && printf "node1\\nnode2\\n"')
    # one task per node, as srun starts them; the hostfile is read while it exists
    make_command(
        commands,
        "srun",
        "all=$*; while [[ $1 == --* ]]; do shift; done\n"
        f'if [[ $1 == sft ]]; then echo "$@" >"{tmp_path}/staging"; echo "$STAGED"; echo "$STAGED"; exit; fi\n'
        f'echo "$all" >"{tmp_path}/srun"; cp hostfile-* "{tmp_path}/hosts"; echo "$SFT_HOSTS" >"{tmp_path}/by-rank"\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    )
    (tmp_path / "run.yaml").write_text(RUN_FILE)

    def run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
        environment = {**os.environ, "PATH": f"{commands}:{VENV}:{os.environ['PATH']}", **variables}
        subprocess.run(["bash", ROOT / "launch" / script, *arguments], cwd=tmp_path, env=environment, check=True)
        return [path.read_text().splitlines() for path in sorted(tmp_path.glob("call-*"))]

    return run


def test_single_node_command(recorded):
    overrides = ["--optim.lr", "1e-5", "--out", "with a space"]
    expected = ["--master_port", "29501", "--module", "sft.train", "--config", "run.yaml", *overrides]
    assert recorded("single_node.sh", "run.yaml", *overrides, MASTER_PORT="29501") == [expected]


SLURM_JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    ("variables", "ranks", "module"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": ""}, 8, "sft.train"),
        ({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "3"}, 3, "sft.train"),
        ({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "", "JOB": "doctor"}, 8, "sft.doctor"),
    ],
)
def test_slurm_starts_one_launcher_per_node(recorded, tmp_path, variables, ranks, module):
    calls = recorded("slurm.sbatch", "run.yaml", "--out", "a b", **SLURM_JOB, **variables)
    hostfile = str(tmp_path / "hostfile-77")
    assert calls == [
        ["--log_level", "error", "--node_rank", node, "--hostfile", hostfile, "--no_ssh", "--master_addr", "node1",
         "--master_port", "20077", "--module", module, "--config", "run.yaml", "--out", "a b"]
        for node in ("0", "1")
    ]  # fmt: skip
    assert (tmp_path / "hosts").read_text() == f"node1 slots={ranks}\nnode2 slots={ranks}\n"
    assert (tmp_path / "by-rank").read_text() == f"node1:{ranks},node2:{ranks}\n"
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in (tmp_path / "srun").read_text()
    assert not Path(hostfile).exists()


def test_slurm_trains_on_what_it_has_staged(recorded, tmp_path):
    staged = "--model.path '/local/my model' --data.train /local/train"
    calls = recorded("slurm.sbatch", "run.yaml", **SLURM_JOB, SLURM_GPUS_ON_NODE="1", STAGE="/local/a b", STAGED=staged)
    assert (tmp_path / "staging").read_text() == "sft stage --config run.yaml --to /local/a b\n"
    assert [call[-4:] for call in calls] == [["--model.path", "/local/my model", "--data.train", "/local/train"]] * 2


def test_slurm_job_without_gpus_says_what_to_ask_for(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "LOCAL_SIZE")}
    script = ["bash", ROOT / "launch" / "slurm.sbatch", "run.yaml"]
    run = subprocess.run(
        script, cwd=tmp_path, env={**environment, **SLURM_JOB}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: this job has no GPUs: add --gpus-per-node=N")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SLURM_SCRIPTS, ids=relative)
def test_sbatch_reads_all_directives(script):
    """sbatch stops reading at the first command, and a misspelt option stops the submission."""
    lines = script.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert [line for line in lines[first_command:] if line.startswith("#SBATCH")] == []
    options = [line.split()[1].split("=")[0] for line in lines[:first_command] if line.startswith("#SBATCH")]
    known = {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--exclusive", "--time", "--output",
             "--signal", "--mem", "--requeue", "--open-mode"}  # fmt: skip
    assert {"--job-name", "--nodes", "--ntasks-per-node", "--time", "--output"} <= set(options) <= known
    assert len(options) == len(set(options))


@pytest.fixture
def prep_job(tmp_path) -> Callable[..., tuple[int, dict[str, str], list[str], list[str]]]:
    """Run prep.slurm with stand-ins; returns (exit code, environment of the nodes, srun's words, the driver's)."""
    commands = tmp_path / "bin"
    commands.mkdir()
    make_command(commands, "scontrol", 'printf "node1\\nnode2\\n"')
    make_command(commands, "srun", f'printf "%s\\n" "$@" >"{tmp_path}/srun"; env >"{tmp_path}/env"; exec sleep 60')
    make_command(
        commands,
        "python",
        f'printf "%s\\n" "$@" >"{tmp_path}/driver"; until [[ -s "{tmp_path}/env" ]]; do sleep 0.1; done; exit 5',
    )
    (tmp_path / "prep.yaml").write_text("out: o\n")

    def run(
        arguments: Sequence[str] = ("prep.yaml", "--out", "a b"), **variables: str
    ) -> tuple[int, dict[str, str], list[str], list[str]]:
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "64"}
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", **slurm, **variables}
        script = ROOT / "launch" / "prep.slurm"
        start_s = time.monotonic()
        ended = subprocess.run(["bash", script, *arguments], cwd=tmp_path, env=environment, check=False, timeout=60)
        assert time.monotonic() - start_s < 30, "srun is stopped when the driver has ended"
        seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
        srun, driver = ((tmp_path / name).read_text().splitlines() for name in ("srun", "driver"))
        (tmp_path / "env").unlink()
        return ended.returncode, seen, srun, driver

    return run


def test_prep_job_starts_ray_on_each_node_and_passes_the_exit_code_on(prep_job):
    code, environment, srun, driver = prep_job()
    assert code == 5
    assert srun[:4] == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--kill-on-bad-exit=1"]
    assert driver[-9:] == ["2", "sft", "prep", "--config", "prep.yaml", "--engine", "ray", "--out", "a b"]
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    assert (environment["HEAD"], environment["CPUS"]) == ("node1", "64")
    assert "--cpus-per-task=8" in prep_job(SLURM_CPUS_PER_TASK="8")[2]


def test_task_of_an_array_prepares_its_own_part(prep_job, tmp_path):
    (tmp_path / "prep-3.yaml").write_text("out: o\n")
    _, _, _, driver = prep_job(["prep-%a.yaml", "--out", "runs/part-%a/of %a"], SLURM_ARRAY_TASK_ID="3")
    assert driver[-7:] == ["prep", "--config", "prep-3.yaml", "--engine", "ray", "--out", "runs/part-3/of 3"]
    assert prep_job(["prep.yaml", "--out", "part-%a"])[3][-1] == "part-%a", "without an array nothing is replaced"


def test_prep_jobs_of_one_user_share_nothing(prep_job):
    one, other = prep_job()[1], prep_job(SLURM_JOB_ID="78")[1]
    ports = {int(job["PORT"]) + offset for job in (one, other) for offset in range(3)}
    assert len(ports) == 6
    assert all(1024 < port < 32768 for port in ports), "below the ports that Linux hands out"
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN"):
        assert one[name] != other[name]


# The real launcher, with a stand-in for sft.train


@pytest.mark.dist
def test_single_node_hands_arguments_and_signals_to_the_ranks_and_their_exit_code_back(tmp_path):
    folder = stand_in.make_workplace(tmp_path / "work")
    script = [ROOT / "launch" / "single_node.sh", "run.yaml", "--out", "a b"]
    command = subprocess.Popen(script, cwd=folder, env=stand_in.environment('{"save_s": [1, 1]}'))
    stand_in.wait_until(lambda: stand_in.have_begun(folder))
    for rank in (0, 1):
        arguments = (folder / f"rank{rank}.args").read_text().splitlines()
        assert arguments == [f"--local_rank={rank}", "--config", "run.yaml", "--out", "a b"]
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 75
    assert len(list(folder.glob("rank*.saved"))) == 2
    assert stand_in.processes_in(folder) == []


SRUN = """
import os, signal, subprocess, sys

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [os.killpg(task.pid, number) for task in tasks])
for node in "01":
    environment = {**os.environ, "SLURM_NODEID": node, "SLURM_STEP_NUM_NODES": "2"}
    tasks.append(subprocess.Popen(words, env=environment, start_new_session=True))
sys.exit(max(task.wait() for task in tasks))
"""
"""As the real one: one task per node, signals go to every process of each, the highest exit code comes back."""


@pytest.mark.dist
def test_slurm_hands_its_signal_to_the_ranks_of_every_node(tmp_path):
    """Two "nodes" on this host: a launcher each, with one rank."""
    folder = stand_in.make_workplace(tmp_path / "work")
    commands = tmp_path / "bin"
    commands.mkdir()
    make_command(commands, "scontrol", 'printf "localhost\\n127.0.0.1\\n"')
    make_command(commands, "squeue", "echo RUNNING")
    (commands / "srun").write_text(f"#!{sys.executable}{SRUN}")
    (commands / "srun").chmod(0o755)
    slurm = {**SLURM_JOB, "SLURM_GPUS_ON_NODE": "1"}
    environment = stand_in.environment('{"save_s": [1, 3]}', LOCAL_SIZE="1", **slurm)
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    script = ["bash", ROOT / "launch" / "slurm.sbatch", "run.yaml"]
    job = subprocess.Popen(script, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    stand_in.wait_until(lambda: stand_in.have_begun(folder))
    job.send_signal(signal.SIGUSR1)  # to the script alone: --signal=B:USR1@300
    said = job.communicate(timeout=90)[1]
    assert job.returncode == 75, said
    assert said.count("SIGUSR1: saving, then stopping") == 2
    assert len(list(folder.glob("rank*.saved"))) == 2
    assert stand_in.processes_in(folder) == []
    assert not (folder / "hostfile-77").exists()


@pytest.mark.parametrize(
    ("code", "state", "before", "saved", "told"),
    [
        (75, "RUNNING", None, 2, "job 77 goes back into the queue, and on from step-00000002"),
        (75, "RUNNING", 2, 12, "job 77 goes back into the queue, and on from step-00000012"),
        (75, "RUNNING", 2, None, "job 77 is not put back into the queue: this start has saved no step"),
        (75, "RUNNING", None, None, "job 77 is not put back into the queue: this start has saved no step"),
        (75, "COMPLETING", 2, 12, "job 77 is COMPLETING and is not put back into the queue"),
        (1, "RUNNING", 2, 12, None),
        (0, "RUNNING", 2, 12, None),
    ],
)
def test_slurm_goes_back_into_the_queue_only_to_go_on(tmp_path, code, state, before, saved, told):
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "run.yaml").write_text(RUN_FILE)

    def marker(step: int) -> Path:
        folder = tmp_path / "o" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        return folder / "COMPLETE"

    if before:
        marker(before).touch()
    save = f"touch {marker(saved)}" if saved else "true"
    make_command(commands, "scontrol", 'if [[ $1 == show ]]; then echo node1; else echo "$*" >requeued; fi')
    make_command(commands, "squeue", f"echo {state}")
    make_command(commands, "srun", f"{save}; exit {code}")
    environment = {**os.environ, "PATH": f"{commands}:{VENV}:{os.environ['PATH']}", **SLURM_JOB}
    script = ["bash", ROOT / "launch" / "slurm.sbatch", "run.yaml"]
    job = subprocess.run(
        script,
        cwd=tmp_path,
        env={**environment, "SLURM_GPUS_ON_NODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == code
    assert job.stderr == (f"{told}\n" if told else "")
    assert (tmp_path / "requeued").exists() == ("goes back" in (told or ""))


# Recipes
