"""`engine: ray`, on real Ray processes of this host: the same bytes, and one line for each way it fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.prep_jobs import children, content, state, wait_until
from tests.prep_support import alpaca_rows, flags, write_json
from tests.tiny import REPO, make_tokenizer, python_path

pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
pytestmark = pytest.mark.e2e

SMALL_BLOCKS = """
import sys
from data_prep import build, readers
from sft.errors import run_command
readers.BLOCK_BYTES = 4000
sys.exit(run_command(build.main))
"""
"""Many blocks of few rows, where the blocks are made: in the driver."""
SLOW = SMALL_BLOCKS.replace(
    "readers.BLOCK",
    """
import time
read = build._raw_blocks


def slowly(inputs):
    for block in read(inputs):
        time.sleep(0.3)
        yield block


build._raw_blocks = slowly
readers.BLOCK""",
)
"""The same, at a pace that leaves time to kill something."""
SRUN = """#!/usr/bin/env bash
# a task per node, both on this host
for word; do [[ $word == --output=* ]] && exec >"${word#*=}" 2>&1; done
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill "${tasks[@]}"; wait; exit 143' TERM
code=0
wait -n || code=$?
kill "${tasks[@]}" 2>/dev/null
wait
exit "$code"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a job of some thirty small blocks, and its output by local workers in `local`."""
    folder = tmp_path_factory.mktemp("job")
    options = {
        "sources": write_json(folder / "rows.json", alpaca_rows(700)),
        "tokenizer": make_tokenizer(folder / "tokenizer"),
        "seq_len": 1024,
        "heldout": 0.1,
        "local": folder / "local",
    }
    run_locally(folder, **options)
    return options


def run_locally(home: Path, local: Path, **options: object) -> None:
    """The job by a worker of its own process, into `local`."""
    command = [sys.executable, "-c", SMALL_BLOCKS, *flags(**options, workers=1, out=local)]
    subprocess.run(command, check=True, capture_output=True, env=environment(home))


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Ray writes its token into the home folder, and its logs below RAY_TMPDIR: both are the test's own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(REPO), **variables}


@pytest.fixture
def start(tmp_path: Path, job: dict[str, object]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the job with Ray; what is left of it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str = SMALL_BLOCKS, **changes: object) -> subprocess.Popen[str]:
        options = {**{name: value for name, value in job.items() if name != "local"}, "workers": 2, **changes}
        command = [sys.executable, "-c", script, *flags(**options, engine="ray", out=tmp_path / "out")]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=environment(tmp_path),
                cwd=tmp_path,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [pid for child in found for pid in descendants(child)]


def workers_of(pid: int) -> list[int]:
    """Actors: Ray names its processes after what they run."""
    named = []
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            if b"ray::_Worker" in Path(f"/proc/{process}/cmdline").read_bytes():
                named.append(process)
    return named


def ended(process: subprocess.Popen[str], timeout_s: float = 100) -> tuple[int, str]:
    """(exit code, stderr)."""
    _, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stderr


def test_same_bytes_as_local_workers_and_nothing_left_behind(start, job, tmp_path) -> None:
    process = start(workers=3)
    code, stderr = ended(process)
    assert (code, stderr) == (0, stderr if code == 0 else "")
    assert "Token" not in stderr
    assert content(tmp_path / "out") == content(job["local"])
    run_locally(tmp_path, **{**job, "seq_len": 1023, "local": tmp_path / "other"})
    assert content(tmp_path / "other") != content(job["local"]), "control: the comparison notices another job"
    wait_until(lambda: not left_behind(process.pid))


def left_behind(*sessions: int) -> list[int]:
    """Processes of these sessions: Ray's own stay in that of the driver, or in one of a child's."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    mine = []
    for pid in found:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] != "Z":
                mine.append(pid)
    return mine


def test_a_lost_worker_is_one_line_and_the_next_run_uses_the_finished_blocks(start, job, tmp_path) -> None:
    process = start(SLOW)
    finished = tmp_path / "out.work" / "blocks"
    wait_until(lambda: finished.is_dir() and len(list(finished.glob("*.safetensors"))) >= 3)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, stderr = ended(process)
    assert code == 2, stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "a worker was lost" in line
    assert "Traceback" not in stderr
    code, stderr = ended(start())
    assert code == 0, stderr
    assert "finished blocks of an earlier run" in stderr
    assert content(tmp_path / "out") == content(job["local"])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_ray_and_keeps_the_blocks(start, tmp_path, number, expected) -> None:
    process = start(SLOW)
    finished = tmp_path / "out.work" / "blocks"
    wait_until(lambda: finished.is_dir() and len(list(finished.glob("*.safetensors"))) >= 1)
    assert workers_of(process.pid)
    ray = descendants(process.pid)
    os.kill(process.pid, number)
    code, stderr = ended(process)
    assert code == expected, stderr
    assert "Traceback" not in stderr
    wait_until(lambda: all(state(pid)[0] == "Z" for pid in ray))
    assert len(list(finished.glob("*.safetensors"))) >= 1
    assert not (tmp_path / "out").exists()


def test_no_cluster_at_the_address_is_one_line(job, tmp_path) -> None:
    options = {name: value for name, value in job.items() if name != "local"}
    run = subprocess.run(
        [sys.executable, "-m", "data_prep", *flags(**options, engine="ray", out=tmp_path / "out")],
        env=environment(tmp_path, RAY_ADDRESS="127.0.0.1:1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert (run.returncode, len(lines)) == (2, 1), run.stderr
    assert "RAY_ADDRESS 127.0.0.1:1: no answer" in lines[0]
    assert "Traceback" not in lines[0]


# launch/prep.slurm, with stand-ins for scontrol and srun: two Ray nodes, both on this host


@pytest.fixture
def submit(tmp_path: Path, job: dict[str, object]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run the script as Slurm would on the first of two nodes; what is left of it is killed at the end."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\nprintf 'localhost\\nlocalhost\\n'\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    options = {name: str(value) for name, value in job.items() if name not in ("local", "sources")}
    config = {"sources": [str(job["sources"])], **options, "out": "out"}
    (tmp_path / "prep.yaml").write_text(json.dumps(config))
    started: list[subprocess.Popen[str]] = []

    def submit(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        settings = {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_ON_NODE": "1",
            "TMPDIR": tempfile.gettempdir(),  # not pytest's: the names of sockets must be short
            **variables,
        }
        started.append(
            subprocess.Popen(
                ["bash", str(REPO / "launch" / "prep.slurm"), "prep.yaml", *arguments],
                cwd=tmp_path,
                env=environment(tmp_path, **settings),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield submit
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_slurm_job_prepares_on_two_nodes_and_cleans_up(submit, job, tmp_path) -> None:
    process = submit()
    code, stderr = ended(process)
    assert code == 0, stderr
    local = subprocess.run(
        [sys.executable, "-m", "data_prep", "--config", "prep.yaml", "--out", "local", "--workers", "1"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        check=True,
    )
    assert local.returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert (tmp_path / f"sft-prep-{os.getpid()}-ray.log").read_text().count("Ray runtime started") == 2
    assert not Path(tempfile.gettempdir(), f"ray-{os.getpid()}").exists()
    assert left_behind(process.pid) == []


def test_slurm_job_passes_the_exit_code_on_and_names_a_missing_tokenizer(submit, tmp_path) -> None:
    code, stderr = ended(submit("--tokenizer", "missing"))
    assert code == 2, stderr
    assert [line for line in stderr.splitlines() if line.startswith("error: tokenizer missing")]


def test_slurm_job_does_not_wait_for_ever_for_a_node(submit, tmp_path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/usr/bin/env bash\nexec sleep 60\n")
    start_s = time.monotonic()
    code, stderr = ended(submit(WAIT_S="3"))
    assert time.monotonic() - start_s < 30
    assert (code, stderr.count("0 of 2 nodes have joined Ray")) == (1, 1), stderr


def test_slurm_job_ends_when_a_node_does(submit, tmp_path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/usr/bin/env bash\nexit 7\n")
    code, stderr = ended(submit(WAIT_S="30"))
    assert (code, stderr.count("Ray ended on a node")) == (1, 1), stderr
