"""Rows per second of data preparation beside TRL's own path, in one run, and the memory of a large input.

    python benchmarks/prep.py --rows alpaca.json --tokenizer path/to/model --count 20000
    python benchmarks/prep.py --rows alpaca.json --tokenizer path/to/model --count 200000
    python benchmarks/prep.py --rows alpaca.json --tokenizer path/to/model --memory-gb 5

The rows are real Alpaca rows; where --count asks for more than there are, instructions are paired with the responses of
other rows, so that no two rows are equal. Each side is a whole command in a process of its own: imports and the loading
of the tokenizer count. Ours proves every row; the floor is reading, templating and tokenising alone, in one process.
The peer needs trl (pip install trl). Every figure is the median of --repeats runs, after one run that warms the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FLOOR = """
import sys, time
import orjson
from data_prep.fast import load_fast
from data_prep.template import alpaca_prompt
from sft.tokenizer import load_tokenizer
fast = load_fast(load_tokenizer(sys.argv[2]))
started_s = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    rows = [orjson.loads(line) for line in file]
for start in range(0, len(rows), 2000):
    fast.encode([alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in rows[start : start + 2000]])
print(time.perf_counter() - started_s)
"""


def main() -> None:
    """Print one table: ours, the peer's, the ratio, the floor; or the peak memory of every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="Alpaca rows: .json arrays, separated by commas")
    parser.add_argument("--tokenizer", required=True, help="folder of the model or of its tokenizer")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, help="measure memory on a JSONL file of this size instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = [row for path in options.rows.split(",") for row in json.loads(Path(path).read_text(encoding="utf-8"))]
        if options.memory_gb:
            measure_memory(real, options, folder)
        else:
            compare(real, options, folder)


def compare(real: list[dict[str, str]], options: argparse.Namespace, folder: Path) -> None:
    """Both sides on the same rows."""
    rows = folder / "rows.jsonl"
    write_rows(real, rows, count=options.count)
    print(f"{options.count:,} rows, {rows.stat().st_size / 1e6:.1f} MB, {options.workers} processes")
    ours = [run_ours(rows, options, folder) for _ in range(options.repeats + 1)][1:]
    total_s = statistics.median(seconds for seconds, _ in ours)
    report = sorted(ours, key=lambda run: run[0])[len(ours) // 2][1]
    stages = {name: value for name, value in report["timings_s"].items() if name not in ("total", "rows_per_s")}
    stages = {"start and imports": total_s - report["timings_s"]["total"], **stages}
    show("sft prep", options.count, total_s, stages, report["splits"]["train"]["fill"])
    floor_s = statistics.median(run_floor(rows, options) for _ in range(options.repeats))
    print(
        f"floor       {options.count / floor_s:>9,.0f} rows/s  {floor_s:6.2f} s: read, template, tokenise; one process"
    )
    if find_spec("trl") is None:
        print("trl is not installed: no peer to compare with")
        return
    theirs = [run_trl(rows, options, folder) for _ in range(options.repeats + 1)][1:]
    peer_s = statistics.median(seconds for seconds, _ in theirs)
    result = sorted(theirs, key=lambda run: run[0])[len(theirs) // 2][1]
    show("TRL", options.count, peer_s, result["laps_s"], result["fill"])
    work_s = total_s - stages["start and imports"]
    peer_work_s = peer_s - result["laps_s"]["imports"]
    print(f"ratio {peer_s / total_s:.1f}x for the whole command, {peer_work_s / work_s:.1f}x without start and imports")


def show(title: str, rows: int, seconds: float, stages: dict[str, float], fill: float) -> None:
    """One side's line and its stages."""
    print(f"{title:<11} {rows / seconds:>9,.0f} rows/s  {seconds:6.2f} s  fill {fill:.2%}")
    print("            " + ", ".join(f"{name} {value:.2f} s" for name, value in stages.items()), flush=True)


def write_rows(real: list[dict[str, str]], path: Path, count: int | None = None, size: int | None = None) -> None:
    """`count` rows, or as many as fill `size` bytes; round k pairs row i with the response of row i + 17 k."""
    written = number = 0
    with open(path, "wb") as file:
        while (count is not None and number < count) or (size is not None and written < size):
            turn, index = divmod(number, len(real))
            row, other = real[index], real[(index + 17 * turn) % len(real)]
            made = {"instruction": row["instruction"], "input": row.get("input", ""), "output": other["output"]}
            if turn >= len(real):
                made["output"] += f" {turn}"
            written += file.write(json.dumps(made, ensure_ascii=False).encode() + b"\n")
            number += 1


def run_ours(rows: Path, options: argparse.Namespace, folder: Path) -> tuple[float, dict]:
    """(seconds of the whole command, report.json)."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    started_s = time.perf_counter()
    run(prep_command(rows, options, folder / "ours"))
    return time.perf_counter() - started_s, json.loads((folder / "ours" / "report.json").read_text(encoding="utf-8"))


def prep_command(rows: Path, options: argparse.Namespace, out: Path) -> list[str]:
    """The command a user would give; duplicates stay, as they do with the peer."""
    flags = {
        "sources": rows, "tokenizer": options.tokenizer, "seq_len": options.seq_len, "dedup": "none",
        "workers": options.workers, "out": out,
    }  # fmt: skip
    return [
        sys.executable,
        "-m",
        "data_prep",
        *[text for key, value in flags.items() for text in (f"--{key}", str(value))],
    ]


def run_floor(rows: Path, options: argparse.Namespace) -> float:
    """Seconds of reading, templating and tokenising, without the start of the process."""
    return float(run([sys.executable, "-c", FLOOR, str(rows), options.tokenizer]))


def run_trl(rows: Path, options: argparse.Namespace, folder: Path) -> tuple[float, dict]:
    """(seconds of the whole command, its stages and fill)."""
    for name in ("cache", "theirs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    facts = {
        "rows": str(rows), "tokenizer": options.tokenizer, "seq_len": options.seq_len, "workers": options.workers,
        "cache": str(folder / "cache"), "out": str(folder / "theirs"), "result": str(folder / "trl.json"),
    }  # fmt: skip
    started_s = time.perf_counter()
    run([sys.executable, str(REPO / "benchmarks" / "prep_trl.py"), json.dumps(facts)])
    return time.perf_counter() - started_s, json.loads((folder / "trl.json").read_text(encoding="utf-8"))


def measure_memory(real: list[dict[str, str]], options: argparse.Namespace, folder: Path) -> None:
    """Peak resident memory of every process of one run over a large file."""
    rows = folder / "large.jsonl"
    write_rows(real, rows, size=int(options.memory_gb * 1e9))
    peaks: dict[int, int] = {}
    started_s = time.perf_counter()
    process = subprocess.Popen(
        prep_command(rows, options, folder / "ours"), env=environment(), stdout=subprocess.DEVNULL
    )
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    if process.wait():
        sys.exit(f"sft prep failed with {process.returncode}")
    seconds = time.perf_counter() - started_s
    watcher.join()
    report = json.loads((folder / "ours" / "report.json").read_text(encoding="utf-8"))
    read, tokens = report["sources"][0]["rows_in"], report["splits"]["train"]["tokens"]
    disk = sum(file.stat().st_size for file in (folder / "ours" / "train").iterdir())
    print(f"{rows.stat().st_size / 1e9:.2f} GB, {read:,} rows in {seconds:.0f} s ({read / seconds:,.0f} rows/s)")
    driver = peaks.pop(process.pid) / 2**30
    workers = ", ".join(f"{peak / 2**30:.2f}" for peak in peaks.values())
    print(f"peak resident memory: driver {driver:.2f} GiB, workers {workers} GiB; {disk / tokens:.3f} bytes per token")


def watch(process: subprocess.Popen[bytes], peaks: dict[int, int]) -> None:
    """Record VmHWM, in bytes, of the process and its children until it ends."""
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [process.pid, *map(int, children.read_text().split())] if children.exists() else []
        for pid in pids:
            status = Path(f"/proc/{pid}/status")
            if status.exists():
                lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
                if lines:
                    peaks[pid] = max(peaks.get(pid, 0), int(lines[0].split()[1]) * 1024)
        time.sleep(0.05)


def environment() -> dict[str, str]:
    """Of every side: this checkout first, one thread per process, no network."""
    paths = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: list[str]) -> str:
    """Output of a command; leaves with its messages where it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
