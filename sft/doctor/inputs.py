"""Check of what a run reads: the same whole files on every host, and a model that can be saved again."""

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from data_prep.shards import file_sha256, open_shards, read_manifest
from sft.config import RunConfig
from sft.doctor.differences import by_value, figures, halves, odd_ones, place, same_host, show_bytes, tell
from sft.doctor.finding import Finding, Report, one_per_host
from sft.doctor.options import DoctorSection
from sft.engine import read_strategy
from sft.errors import UserError
from sft.hf_folder import prove_export
from sft.inputs import find_resume, identity, open_inputs
from sft.model import context_length, read_model_config
from sft.model_shards import open_model_shards
from sft.probe_items import open_probe
from sft.retention import num_parameters
from sft.sample_prompts import open_samples
from sft.tokenizer import TOKENIZER_FILES, load_tokenizer
from sft.weight_files import weight_files

GIB = 2**30
BY_START = {"track.": "trackers", "--out ": "disk"}
"""Checks that a line of sft.inputs belongs to, by how it begins."""
SAMPLE_BYTES = 60 * GIB
"""Read on each host where digests are sampled: a minute at 1 GiB/s. Shards and weights have half of it each."""
SAMPLE_S = 60.0
"""After this time a sample ends, whatever it lacks: hosts may share one slow file system."""
SMALL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)

Value = TypeVar("Value")


def collect(config: RunConfig, options: DoctorSection, local_rank: int) -> dict[str, Any]:
    """What this host sees of the run's inputs. Its ranks share the reading of bytes; the first one does the rest.

    Returns:
        problems: [check, line] of all that would refuse the run, of the host's first rank; saved: whether the save
        path was tried; keys: content_key by option; small: sha256 of the model's small files; sizes: bytes of its
        weights; digests: by path, what this rank read: sha256, or error; unread: files for which a sample's time did
        not last; read_bytes, read_s; wandb.
    """
    is_first = local_rank == 0
    facts: dict[str, Any] = {"problems": [], "saved": False, "keys": {}, "small": {}, "sizes": {}, "wandb": None}
    if is_first:
        facts |= _open_everything(config) | _model_folder(Path(config.model.path))
        facts["wandb"] = {"mode": config.track.wandb, "installed": importlib.util.find_spec("wandb") is not None}
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    own = choose_files(config, options.digests)[local_rank % local_size :: local_size]
    digests: dict[str, dict[str, Any]] = {}
    start_s = time.monotonic()
    for path, wanted in own:
        if digests and options.digests == "sample" and time.monotonic() - start_s > SAMPLE_S:
            break
        digests[str(path)] = {"wanted": wanted, **_digest(path)}
    facts |= {"digests": digests, "unread": len(own) - len(digests), "read_s": time.monotonic() - start_s}
    facts["read_bytes"] = sum(entry["bytes"] for entry in facts["digests"].values())
    return facts


def judge(reports: list[Report]) -> list[Finding]:
    """Everything that would refuse the run, then differences between hosts, then how wandb is set."""
    problems = _judge_problems(reports)
    failed = {finding.check for finding in problems}
    fine = {"run file": "strategy, batch and folders go together", "model folder": "complete"}
    return [
        *problems,
        *(Finding(check, "pass", "all ranks", found) for check, found in fine.items() if check not in failed),
        *_judge_saved(reports, failed),
        *_judge_equal(reports),
        *_judge_digests(reports),
        *_judge_wandb(reports, failed),
    ]


def pick(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of the files to read: all, or as many as fit, evenly spread, the first and the last among them.

    Args:
        sizes: bytes of each file.
        budget: bytes; the first and the last are read in any case.
    """
    if sum(sizes) <= budget:
        return list(range(len(sizes)))
    last = len(sizes) - 1
    number = min(max(2, len(sizes) * budget // sum(sizes)), len(sizes))
    if number == 1 or last == 0:
        return [0]
    return sorted({round(index * last / (number - 1)) for index in range(number)})


def choose_files(config: RunConfig, digests: str) -> list[tuple[Path, str | None]]:
    """Files that each host reads, and the sha256 that the manifest names; the same on every host with these inputs.

    Shards and weights take turns, so that there are some of both in what is read of them.
    """
    shards: list[tuple[Path, str | None, int]] = []
    for folder in filter(None, (config.data.train, config.data.heldout)):
        manifest: dict[str, Any] = _tried(partial(read_manifest, Path(folder)), {"shards": []})
        shards += [(Path(folder) / entry["file"], entry["sha256"], entry["bytes"]) for entry in manifest["shards"]]
    weights = [(path, None, size) for path, size in _weights(Path(config.model.path)).items()]
    chosen: list[list[tuple[Path, str | None]]] = []
    for files in (shards, weights):
        sizes = [size for _, _, size in files]
        budget = SAMPLE_BYTES // 2 if digests == "sample" else sum(sizes)
        chosen.append([files[index][:2] for index in pick(sizes, budget)])
    return [file for turn in zip_longest(*chosen) for file in turn if file is not None]


class _Problems:
    """Lines that would refuse the run, each once, with the check that they belong to."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def attempt(self, check: str, step: Callable[[], Value]) -> Value | None:
        """What `step` returns; None where it fails, which is noted."""
        try:
            return step()
        except UserError as error:
            line = " ".join(str(error).split())
            named = next((name for start, name in BY_START.items() if line.startswith(start)), check)
            self.lines.setdefault(line, named)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            line = f"{name}{error.strerror or error}; check the path, its permissions and the disk"
            self.lines.setdefault(line, check)
        return None


def _open_everything(config: RunConfig) -> dict[str, Any]:
    """Open all that training opens, each on its own, so that every problem shows and not only the first."""
    problems, folder = _Problems(), config.model.path
    problems.attempt("run file", partial(read_strategy, config.deepspeed))
    model = problems.attempt("model folder", partial(read_model_config, folder))
    tokenizer = problems.attempt("model folder", partial(load_tokenizer, folder))
    problems.attempt("model folder", partial(num_parameters, Path(folder)))
    keys, longest, trained = {}, 0, None
    for option, path in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if path is None:
            continue
        step = partial(open_shards, path)
        if model is not None and tokenizer is not None:
            step = partial(open_model_shards, option, path, tokenizer, model, folder)
        shards = problems.attempt("shards", step)
        if shards is not None:
            keys[option], longest = shards.manifest["content_key"], shards.manifest["seq_len"]
            trained = trained or shards.manifest
    if model is not None and tokenizer is not None and trained is not None:
        limit = context_length(model)
        problems.attempt("probe", partial(open_probe, config.eval.probe, tokenizer, limit or longest))
        problems.attempt("samples", partial(open_samples, config.eval.samples, tokenizer, trained, limit))
    saved = _start(config, problems)
    lines = [[check, line] for line, check in problems.lines.items() if check != "disk"]  # sft.doctor.disk tells
    return {"problems": lines, "keys": keys, "saved": saved}


def _start(config: RunConfig, problems: _Problems) -> bool:
    """The rest of what training does before its first step; returns whether the save path was tried and works."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    inputs = problems.attempt("run file", partial(open_inputs, config, world_size))
    if inputs is None:  # of ranks that share one pack any batch divides: what comes after that is looked at as well
        inputs = problems.attempt("run file", partial(open_inputs, config, config.batch.sequence_parallel))
    if inputs is None:
        return False
    problems.attempt("run file", partial(find_resume, config, inputs))
    before = len(problems.lines)
    problems.attempt("save path", partial(prove_export, Path(config.model.path), identity(config, inputs)))
    return len(problems.lines) == before


def _model_folder(folder: Path) -> dict[str, Any]:
    """sha256 of its small files, bytes of its weights: what must be equal on all hosts."""
    small = {name: _digest(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    return {
        "small": {name: entry.get("sha256") or entry["error"] for name, entry in small.items()},
        "sizes": {path.name: size for path, size in _weights(folder).items()},
    }


def _weights(folder: Path) -> dict[Path, int]:
    """Bytes of those that training reads and that are there; the check of the model folder tells of the others."""
    paths: list[Path] = _tried(partial(weight_files, folder), [])
    return {path: _tried(partial(os.path.getsize, path), 0) for path in paths if path.is_file()}


def _digest(path: Path) -> dict[str, Any]:
    try:
        return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    except OSError as error:
        return {"error": error.strerror or str(error), "bytes": 0}


def _tried(step: Callable[[], Value], otherwise: Value) -> Value:
    """For what another check tells of."""
    try:
        return step()
    except (UserError, OSError):
        return otherwise


def _first_ranks(reports: list[Report]) -> list[Report]:
    """Of each host that which looked at the inputs; where its check broke off, nothing is known of the host."""
    return [report for report in one_per_host(reports) if report.local_rank == 0]


def _judge_problems(reports: list[Report]) -> list[Finding]:
    """One finding for each line, with all hosts that have it."""
    having: dict[tuple[str, str], list[Report]] = {}
    for host in _first_ranks(reports):
        for check, line in host.facts["problems"]:
            having.setdefault((check, line), []).extend(same_host(host, reports))
    return [
        Finding(check, "fail", place(concerned, reports), *halves(line)) for (check, line), concerned in having.items()
    ]


def _judge_saved(reports: list[Report], failed: set[str]) -> list[Finding]:
    if "save path" in failed:
        return []
    if untried := [host for host in _first_ranks(reports) if not host.facts["saved"]]:
        where = place([report for host in untried for report in same_host(host, reports)], reports)
        return [Finding("save path", "skip", where, "not tried: the run's inputs could not be opened, see above")]
    return [Finding("save path", "pass", "all ranks", "config, generation config and tokenizer load back as saved")]


def _judge_equal(reports: list[Report]) -> list[Finding]:
    """The same shards and the same model on all hosts: each reads its own copy, if they have copies."""
    hosts = _first_ranks(reports)
    findings = []
    for option in dict.fromkeys(option for host in hosts for option in host.facts["keys"]):
        having = [host for host in hosts if option in host.facts["keys"]]  # the others have a problem that is told
        groups = by_value(having, lambda host, option=option: host.facts["keys"][option][:16])  # type: ignore[misc]
        if len(groups) > 1:
            found = f"{option}: hosts have different data: content_key {tell(groups, hosts)}"
            remedy = "copy one preparation to every host, or read it from a folder that all share"
            findings.append(
                Finding("shards", "fail", place(odd_ones(groups), hosts), found, remedy, dict(groups=figures(groups)))
            )
    for part, unit in (("small", "sha256"), ("sizes", "bytes")):
        for name in sorted({name for host in hosts for name in host.facts[part]}):
            groups = by_value(hosts, lambda host, part=part, name=name: host.facts[part].get(name))  # type: ignore[misc]
            if len(groups) > 1:
                told = [(value[:12] if isinstance(value, str) else value, having) for value, having in groups]
                found = f"{name} of the model folder differs: {unit} {tell(told, hosts)}"
                remedy = "copy the model folder again to the odd host, or read it from a folder that all share"
                findings.append(
                    Finding(
                        "model folder",
                        "fail",
                        place(odd_ones(groups), hosts),
                        found,
                        remedy,
                        dict(groups=figures(groups)),
                    )
                )
    return findings


def _judge_digests(reports: list[Report]) -> list[Finding]:
    """Bytes: readable, as the manifest says, and equal on all hosts."""
    findings = []
    read = [(report, path, entry) for report in reports for path, entry in report.facts["digests"].items()]
    for report, path, entry in read:
        if error := entry.get("error"):
            remedy = f"check the file and its permissions on {report.host}, and that host's disk (dmesg); copy it again"
            findings.append(
                Finding("files", "fail", f"host {report.host}", f"{path} cannot be read: {error}", remedy, entry)
            )
        elif entry["wanted"] not in (None, entry["sha256"]):
            found = f"{path} is not what was prepared: its sha256 is not the manifest's"
            remedy = f"copy it again to {report.host}, or prepare again"
            findings.append(Finding("files", "fail", f"host {report.host}", found, remedy, entry))
    by_path: dict[str, list[tuple[Report, str]]] = {}
    for report, path, entry in read:
        if entry["wanted"] is None and "sha256" in entry:
            by_path.setdefault(path, []).append((report, entry["sha256"]))
    for path, digests in by_path.items():
        of = {report.rank: digest for report, digest in digests}
        groups = by_value([report for report, _ in digests], lambda report, of=of: of[report.rank])  # type: ignore[misc]
        if len(groups) > 1:
            told = ", ".join(f"{digest[:12]} on host {having[0].host}" for digest, having in groups)
            where = ", ".join(f"host {report.host}" for report in odd_ones(groups))
            remedy = "copy the file again from where it was published: ranks would begin with different weights"
            findings.append(
                Finding("files", "fail", where, f"{path} differs: sha256 {told}", remedy, dict(groups=figures(groups)))
            )
    if findings:
        return findings
    hosts = [same_host(host, reports) for host in one_per_host(reports)]
    bytes_read = sum(report.facts["read_bytes"] for report in hosts[0])
    rates = [sum(r.facts["read_bytes"] for r in here) / max(*(r.facts["read_s"] for r in here), 1e-3) for here in hosts]
    read_files = min(sum(len(report.facts["digests"]) for report in here) for here in hosts)
    files = sum(len(report.facts["digests"]) + report.facts["unread"] for report in hosts[0])
    count = f"{files} files" if read_files == files else f"at least {read_files} of {files} files (in {SAMPLE_S:.0f} s)"
    found = f"{count}, {show_bytes(bytes_read)}, read on each host at {show_bytes(min(rates))}/s or more: equal"
    figures_read = {"files": files, "read_files": read_files, "bytes": bytes_read, "bytes_per_s": rates}
    return [Finding("files", "pass", "all ranks", found, figures=figures_read)]


def _judge_wandb(reports: list[Report], failed: set[str]) -> list[Finding]:
    """Of rank 0, which alone writes to it. A missing key is a problem of sft.inputs, on every host."""
    first = reports[0]
    wandb = first.facts["wandb"]
    if wandb is None or "trackers" in failed:
        return []
    if wandb["mode"] != "off" and not wandb["installed"]:
        found, remedy = (
            f"track.wandb {wandb['mode']}: wandb is not installed",
            "pip install wandb, or --track.wandb off",
        )
        return [Finding("wandb", "fail", first.who, found, remedy)]
    told = {
        "off": "off",
        "offline": "offline: wandb sync <out>/wandb sends it later",
        "online": f"online, with a key; whether {first.host} reaches the server was not tried",
    }
    return [Finding("wandb", "pass", "all ranks", told[wandb["mode"]], figures=wandb)]
