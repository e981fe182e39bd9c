"""What `sft doctor` shows, and how it leaves. Run: pytest tests/unit/test_doctor_report.py"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from sft.cli import dispatch
from sft.doctor import report
from sft.doctor.finding import Finding
from sft.doctor.options import DoctorConfig, HostConfig
from sft.doctor.run import STDOUT, Outcome, main, read_options, take_json
from sft.errors import UserError
from tests import tiny

SHARD = "/data/prepared/alpaca-chat/train/shard-00002-of-00064.arrow"
FINDINGS = [
    Finding("versions", "pass", "all ranks", "python 3.11.2, torch 2.13.0+cpu, transformers 5.23.0"),
    Finding("bandwidth between hosts", "warn", "host worker-long-name-12.cluster.local", "0.9 GB/s", "use ib0"),
    Finding("shards", "fail", "rank 9 on n2", f"{SHARD}: not the manifest's [/red]", "copy it again", {"bytes": 9}),
    Finding("overlap", "skip", "all ranks", "one rank"),
]  # fmt: skip
RUN = ["--model.path", "m", "--data.train", "d", "--out", "o"]


def shown(findings, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(report.to_table(findings))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_loses_no_word_at_any_width(width):
    text = shown(FINDINGS, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    lines = text.splitlines()
    found = lines[0].index("found")
    sentences = "".join(line[found:].strip() for line in lines[1:]).replace(" ", "")
    assert sentences == "".join(f"{f.found}{'→' * bool(f.remedy)}{f.remedy}" for f in FINDINGS).replace(" ", "")
    places = "".join(line[lines[0].index("where") : found].strip() for line in lines[1:])
    assert places.replace(" ", "") == "".join(finding.where for finding in FINDINGS).replace(" ", ""), (
        "a long host name is folded, not cut"
    )
    assert "[/red]" in text, "what comes from outside is no markup"


def test_every_finding_starts_with_its_status_and_a_remedy_stands_on_a_line_of_its_own():
    header, *lines = shown(FINDINGS, 120).splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["pass", "warn", "fail", "skip"]
    remedies = [line[header.index("found") :].strip() for line in lines if "→" in line]
    assert remedies == ["→ use ib0", "→ copy it again"]


def test_the_summary_counts_each_status():
    assert report.summarize(FINDINGS, 16, 2) == "1 fail, 1 warn, 1 pass, 1 skip on 16 ranks of 2 hosts"
    assert report.summarize(FINDINGS[:1], 1, 1) == "0 fail, 1 pass on 1 rank of 1 host"


def test_only_a_fail_is_an_exit_code():
    assert report.exit_code(FINDINGS) == 2
    assert report.exit_code([finding for finding in FINDINGS if finding.status != "fail"]) == 0


def test_the_dictionary_holds_every_finding_and_who_was_asked():
    content = json.loads(
        json.dumps(report.to_dict(FINDINGS, world_size=16, hosts=["n1", "n2"], out="runs/x", stopped=None))
    )
    assert content["schema"] == 1
    assert [Finding(**finding) for finding in content["findings"]] == FINDINGS
    header = content["header"]
    assert (header["hosts"], header["world_size"], header["out"]) == (["n1", "n2"], 16, "runs/x")
    assert set(header["versions"]) == {"sft", "python", "torch", "deepspeed", "transformers"}
    assert (content["complete"], content["stopped"], content["exit_code"]) == (True, None, 2)
    assert report.to_dict([], world_size=1, hosts=["n1"], out=None, stopped="rank 3 is gone")["complete"] is False


@pytest.mark.parametrize(
    ("argv", "target", "rest"),
    [
        (["--config", "c"], None, ["--config", "c"]),
        (["--json"], STDOUT, []),
        (["--json", "--config", "c"], STDOUT, ["--config", "c"]),
        (["--out", "o", "--json", "x.json", "--config", "c"], "x.json", ["--out", "o", "--config", "c"]),
        (["--json=x.json", "--config", "c"], "x.json", ["--config", "c"]),
    ],
)
def test_json_is_taken_out_of_the_options(argv, target, rest):
    assert take_json(argv) == (target, rest)


@pytest.mark.parametrize("argv", [["--json="], ["--json", "/no/such/folder/x.json"], ["--json", os.getcwd()]])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(argv):
    with pytest.raises(UserError, match="--json"):
        take_json(argv)


def test_any_option_of_a_run_means_that_a_run_is_checked():
    assert isinstance(read_options([]), HostConfig)
    assert isinstance(read_options(["--doctor.network_mib", "1", "--local_rank=0"]), HostConfig)
    assert isinstance(read_options([*RUN, "--local_rank=0"]), DoctorConfig)
    for incomplete in (RUN[:2], ["--data.heldout", "h"], ["--batch.micro-batch=2"]):
        with pytest.raises(UserError, match="--out is missing"):
            read_options(incomplete)


def test_the_outcome_is_shown_once_whoever_shows_it_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    outcome = Outcome(str(tmp_path / "found.json"), read_options(RUN))
    outcome.findings += FINDINGS[:2]
    outcome.stop(FINDINGS[2])
    outcome.stop(FINDINGS[2])
    assert outcome.agree() == 0, "the code of what it holds itself; the process leaves by the error that stopped it"
    assert capsys.readouterr().out.count("on 1 rank of 1 host") == 1
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["stopped"] == FINDINGS[2].found
    assert content["findings"][2] == dataclasses.asdict(FINDINGS[2])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_other_ranks_show_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    outcome = Outcome(str(tmp_path / "found.json"), HostConfig())
    outcome.say("software")
    outcome.stop(FINDINGS[2])
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_help_tells_of_the_launchers_option_the_json_and_the_runs_options(capsys):
    with pytest.raises(SystemExit) as left:
        dispatch(["doctor", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for word in ("--ranks N", "--json [FILE]", "--doctor.digests", "--model.path", "Exit code 2"):
        assert word in text


def test_a_rank_that_never_comes_is_an_exit_code_and_a_report_of_its_own(tmp_path):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**tiny.rank_environment(), **place, "MASTER_PORT": tiny.free_port(), "SFT_HOSTS": "n1:1,n2:1"}
    command = [sys.executable, "-m", "sft.doctor", *RUN, "--guard.arrive_after_s", "1", "--json", "found.json"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "rank 1 on n2 did not come within 1 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1 fail on 2 ranks" in done.stdout
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["complete"] is False
    assert "rank 1 on n2" in content["stopped"]


def test_a_wrong_option_is_one_line(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="did you mean"):
        main(["--doctor.digest", "full"])
