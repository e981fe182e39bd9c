"""`sft prep verify`: does a folder of packed shards still hold, byte by byte and token by token, what it promises?"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.accounts import (
    Made,
    Report,
    Tally,
    add_up,
    check_copies,
    check_cut,
    check_documents_told,
    check_report,
    check_splits,
    check_totals,
    contract_of,
)
from data_prep.console import Output
from data_prep.contracts import Contract, Counted, Problem, arrow_type, check_batch
from data_prep.report import escape_unprintable
from data_prep.shards import COLUMNS, MANIFEST, read_manifest
from sft.errors import UserError, run_command
from sft.prep_options import VerifyConfig
from sft.settings import load
from sft.tokenizer import load_tokenizer

MOST_LINES = 40
"""Problems told; the rest are counted."""
CHECKS = {
    "manifest": "whole, of a known schema",
    "files": "sha256, bytes, columns; no file too many",
    "packs": "1 to seq_len tokens; seq_lens sum to them",
    "labels": "-100 or the input id; num_labels; some target",
    "stop tokens": "end every supervised run that was not cut",
    "BOS": "once, at the start of every document",
    "vocabulary": "holds every id",
    "sources": "known; documents are rows of theirs",
    "document ids": "as often as their source's weight says",
    "totals": "packs, documents, tokens, labels, fill",
    "splits": "of one build; no document in two",
    "report": "rows in = rows out + reasons; totals",
    "tokenizer": "recorded digest, special ids and probe",
}


@dataclass
class Findings:
    """Problems so far, and the checks that could not be made, with the reason."""

    problems: list[Problem] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)

    def clean(self, *checks: str) -> bool:
        """Whether none of these checks has a problem: others build on what they established."""
        return not any(problem.check in checks for problem in self.problems)


def main(argv: Sequence[str]) -> None:
    """Entry of `sft prep verify` and `python -m data_prep.verify`.

    Raises:
        UserError: bad options, no prepared folder, or what is wrong with it.
    """
    config = load(VerifyConfig, argv, prog="sft prep verify", positional="shards")
    escape_unprintable(sys.stdout)
    folder = Path(config.shards)
    findings, tallies = verify(folder, config.tokenizer)
    Output().print(_table(findings, tallies))
    for check, reason in findings.unchecked.items():
        print(f"not checked: {check}: {reason}")
    if findings.problems:
        texts = [problem.text for problem in findings.problems]
        rest = [f"and {len(texts) - MOST_LINES} problems more"] if len(texts) > MOST_LINES else []
        lines = [f"shards {folder}: {_count(len(texts), 'problem')}; prepare again, or copy again", *texts[:MOST_LINES]]
        raise UserError("\n  ".join(lines + rest))
    print(f"{folder} holds what it promises")


def verify(folder: Path, tokenizer: str | None) -> tuple[Findings, list[Tally]]:
    """Check one split's folder, or a folder that `sft prep` wrote with all its splits.

    Raises:
        UserError: there is no shard folder.
    """
    findings = Findings()
    whole = not (folder / MANIFEST).exists() and any((folder / name).is_dir() for name in ("train", "heldout"))
    if not whole and not (folder / MANIFEST).is_file():
        read_manifest(folder)
    report = _read_report(folder if whole else folder.parent, findings, required=whole)
    names = ["train", *(["heldout"] if (folder / "heldout").exists() or "heldout" in _splits_of(report) else [])]
    paths = [folder / name for name in names] if whole else [folder]
    manifests = {path: found for path in paths if (found := _read_made(path, findings))}
    tallies = _check_shards(manifests, findings)
    for tally in tallies:
        findings.problems += check_totals(tally)
        if findings.clean("sources"):
            findings.problems += check_copies(tally)
        else:
            findings.unchecked["document ids"] = "not in full, because weights belong to sources"
    if len(tallies) > 1:
        findings.problems += check_splits(tallies)
    if report is not None:
        _check_report(report, tallies, findings, whole)
    if manifests:
        _check_tokenizer(next(iter(manifests.values()))[0], tokenizer, findings)
    if len(manifests) < len(paths):
        findings.unchecked["files"] = "not in full, because of what could not be read"
    _name_unchecked(findings, tallies, len(paths), whole)
    return findings, tallies


def _read_made(path: Path, findings: Findings) -> tuple[dict[str, Any], Made] | None:
    try:
        manifest = read_manifest(path)
        return manifest, Made.model_validate(manifest)
    except UserError as error:
        findings.problems.append(Problem("manifest", str(error).removesuffix("; prepare again")))
    except ValidationError as error:
        findings.problems.append(Problem("manifest", f"shards {path}: {MANIFEST}: {_first(error)}"))
    return None


def _read_report(folder: Path, findings: Findings, *, required: bool) -> Report | None:
    path = folder / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        findings.unchecked["report"] = f"there is no {path}"
        if required:
            findings.problems.append(Problem("report", f"{path}: missing; sft prep writes it"))
    except ValidationError as error:
        findings.problems.append(Problem("report", f"{path}: {_first(error)}"))
    return None


def _splits_of(report: Report | None) -> list[str]:
    return list(report.splits) if report else []


def _check_shards(manifests: dict[Path, tuple[dict[str, Any], Made]], findings: Findings) -> list[Tally]:
    """Check files and arrays of every split; those of which all shards could be read are returned with their counts."""
    tallies = []
    console = Console(stderr=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(max_workers=1) as hasher,
    ):
        sizes = [entry["bytes"] for manifest, _ in manifests.values() for entry in manifest["shards"]]
        task = bar.add_task("", total=sum(sizes))
        for path, (manifest, made) in manifests.items():
            findings.problems += _check_listing(path, manifest)
            counted: list[Counted] = []
            first_pack, readable = 0, True
            for entry in manifest["shards"]:
                digest = hasher.submit(_sha256, path / entry["file"])
                found, problems = _check_shard(path, entry, contract_of(manifest, made), first_pack)
                findings.problems += problems
                findings.problems += _check_digest(path / entry["file"], entry, digest.result())
                readable &= found is not None
                counted += found or []
                first_pack += entry["packs"]
                bar.advance(task, entry["bytes"])
            if readable:
                tallies.append(add_up(manifest, made, counted))
    return tallies


def _check_listing(path: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    """The folder holds the manifest's shards and no other, and the files of `datasets` say the same."""
    names = [entry["file"] for entry in manifest["shards"]]
    for foreign in sorted({file.name for file in path.glob("*.arrow")} - set(names)):
        yield Problem("files", f"{path / foreign}: no shard of the manifest; datasets may read it")
    try:
        state = json.loads((path / "state.json").read_bytes())
        if [item["filename"] for item in state["_data_files"]] != names:
            yield Problem("files", f"{path / 'state.json'}: lists other files than the manifest")
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield Problem("files", f"{path / 'state.json'}: datasets cannot read it: {_short(error)}")
    try:
        info = json.loads((path / "dataset_info.json").read_bytes())
        if tuple(info["features"]) != COLUMNS:
            yield Problem("files", f"{path / 'dataset_info.json'}: lists other columns than {', '.join(COLUMNS)}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield Problem("files", f"{path / 'dataset_info.json'}: datasets cannot read it: {_short(error)}")


def _check_shard(
    path: Path, entry: dict[str, Any], contract: Contract, first_pack: int
) -> tuple[list[Counted] | None, list[Problem]]:
    """Counts of one shard's batches (None where it cannot be read) and what is wrong with its arrays."""
    file = path / entry["file"]
    where = f"{path.name}/{entry['file']}"
    counted: list[Counted] = []
    problems: list[Problem] = []
    readable = True
    packs = 0
    try:
        with pa.memory_map(os.fsencode(file)) as source, pa.ipc.open_stream(source) as reader:
            if not reader.schema.equals(pa.schema([(name, arrow_type(name)) for name in COLUMNS])):
                return None, [
                    Problem("files", f"{where}: columns {reader.schema.names} are not those of packed shards")
                ]
            for batch in reader:
                found, told = check_batch(batch, contract, first_pack + packs, where)
                packs += batch.num_rows
                problems += told
                readable &= found is not None
                counted += [found] if found is not None else []
    except FileNotFoundError:
        return None, problems
    except (pa.ArrowException, OSError) as error:
        return None, [*problems, Problem("files", f"{where}: not a readable Arrow file: {_short(error)}")]
    if packs != entry["packs"]:
        problems.append(Problem("totals", f"{where}: holds {packs} packs, the manifest says {entry['packs']}"))
    return counted if readable else None, problems


def _check_digest(file: Path, entry: dict[str, Any], found: tuple[str, int] | None) -> Iterator[Problem]:
    if found is None:
        yield Problem("files", f"{file}: missing, the manifest lists it")
        return
    digest, size = found
    if size != entry["bytes"]:
        yield Problem("files", f"{file}: {size} bytes, the manifest says {entry['bytes']}")
    elif digest != entry["sha256"]:
        yield Problem("files", f"{file}: its sha256 is not the manifest's")


def _check_report(report: Report, tallies: list[Tally], findings: Findings, whole: bool) -> None:
    if not whole and any(tally.manifest["content_key"] != report.content_key for tally in tallies):
        findings.unchecked["report"] = "the report.json beside the folder is of another build"
        return
    findings.problems += check_report(report, tallies)
    if findings.clean("sources", "document ids"):
        for tally in tallies:
            findings.problems += check_documents_told(report, tally)
    if tallies:
        findings.problems += check_cut(report, tallies)


def _check_tokenizer(manifest: dict[str, Any], folder: str | None, findings: Findings) -> None:
    made = manifest["tokenizer"]
    path = folder or made["path"]
    if folder is None and not Path(path).is_dir():
        findings.unchecked["tokenizer"] = f"{path} is not here; give --tokenizer"
        return

    def tell(text: str) -> None:
        findings.problems.append(Problem("tokenizer", f"tokenizer {path}: {text}"))

    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        findings.problems.append(Problem("tokenizer", str(error)))
        return
    if tokenizer.digest != made["digest"]:
        tell("its files are not those that the shards were made with: another digest")
    now = {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos[0] if tokenizer.bos else None,
        "eos_id": tokenizer.eos_id,
    }
    for name, value in now.items():
        if made[name] != value:
            tell(f"its {name} is {value}, the manifest says {made[name]}")
    if sorted(tokenizer.special_ids) != manifest["special_ids"]:
        tell("its special ids are not the manifest's")
    texts = [probe["text"] for probe in made["probe"]]
    for probe, ids in zip(made["probe"], tokenizer.encode_batch(texts), strict=True):
        if probe["ids"] != list(ids):
            tell(f"gives other ids than the shards hold for the text {probe['text']!r}")


def _name_unchecked(findings: Findings, tallies: list[Tally], num_splits: int, whole: bool) -> None:
    """What cannot be told must not look as if it were in order."""
    if num_splits == 1:
        findings.unchecked["splits"] = "there is one split" if whole else "one split was given"
    if tallies and all(tally.manifest["tokenizer"]["bos_id"] is None for tally in tallies):
        findings.unchecked["BOS"] = "the tokenizer starts texts with none"
    if len(tallies) < num_splits:
        for check in CHECKS:
            if findings.clean(check) and check not in ("manifest", "files", "tokenizer"):
                findings.unchecked[check] = "not in full, because of what could not be read"
    if not tallies and findings.clean("tokenizer"):
        findings.unchecked.setdefault("tokenizer", "not in full, because of what could not be read")


def _table(findings: Findings, tallies: Sequence[Tally]) -> Table:
    found = Counter(problem.check for problem in findings.problems)
    packs, tokens = sum(tally.packs for tally in tallies), sum(tally.tokens for tally in tallies)
    title = f"{', '.join(tally.name for tally in tallies) or 'nothing readable'}: {packs:,} packs, {tokens:,} tokens"
    table = Table("check", "holds", "result", title=title)
    for check, meaning in CHECKS.items():
        result = "not checked" if check in findings.unchecked else "ok"
        table.add_row(check, meaning, _count(found[check], "problem") if found[check] else result)
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"'{where}': {first['msg'][:1].lower()}{first['msg'][1:]}" if where else first["msg"]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _sha256(path: Path) -> tuple[str, int] | None:
    """(sha256, bytes read) of a file, or None where there is none."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest(), size


if __name__ == "__main__":
    raise SystemExit(run_command(main))
