"""Shards, model folder and save path on every host. Run: pytest tests/unit/test_doctor_inputs.py"""

import copy
import json
import shutil

import pytest

from data_prep.shards import file_sha256, read_manifest
from sft.config import RunConfig
from sft.doctor import inputs
from sft.doctor.finding import Report
from sft.doctor.options import DoctorSection

OPTIONS = DoctorSection()


@pytest.fixture
def folder(tmp_path, base_model, prepared):
    """Copies that a test may damage."""
    shutil.copytree(base_model, tmp_path / "base")
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path


def config_of(folder, **more):
    data = {"train": str(folder / "data" / "train"), "heldout": str(folder / "data" / "heldout")}
    values = {"model": {"path": str(folder / "base")}, "data": data, "batch": {"rows_per_step": 4}}
    values |= {"track": {"wandb": "off"}, "out": str(folder / "run")}
    return RunConfig.model_validate({**values, **more})


def collect(config, local_rank=0):
    return json.loads(json.dumps(inputs.collect(config, OPTIONS, local_rank)))


def problems(config):
    """(check, what was found) of all failures on one host."""
    findings = inputs.judge([Report(0, "n0", 0, collect(config))])
    failures = [finding for finding in findings if finding.status == "fail"]
    assert all(finding.remedy for finding in failures)
    return [(finding.check, finding.found) for finding in failures]


def train_shard(folder):
    train = folder / "data" / "train"
    return train / read_manifest(train)["shards"][0]["file"]


# On one host


def test_a_run_that_can_start_passes_every_check(folder):
    facts = collect(config_of(folder))
    assert facts["problems"] == []
    assert facts["saved"]
    assert facts["read_bytes"] > 100_000
    findings = inputs.judge([Report(0, "n0", 0, facts)])
    assert [(finding.check, finding.status) for finding in findings] == [
        ("run file", "pass"), ("model folder", "pass"), ("save path", "pass"), ("files", "pass"), ("wandb", "pass")
    ]  # fmt: skip
    assert "3 files" in findings[3].found
    assert not (folder / "run").exists()


def test_all_problems_at_once(folder, monkeypatch):
    """Of strategy, batch, tracker key, shards and weights: none hides another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    shutil.rmtree(folder / "data" / "heldout")
    (folder / "base" / "model.safetensors").write_bytes(b"torn")
    told = problems(config_of(folder, deepspeed="zero9", track={"wandb": "online"}))
    assert sorted(check for check, _ in told) == ["model folder", "run file", "run file", "shards", "trackers"]
    text = "\n".join(found for _, found in told)
    for part in ("zero9", "no multiple of 3 ranks", "WANDB_API_KEY", "heldout", "no whole safetensors"):
        assert part in text


@pytest.mark.parametrize(("ranks", "told"), [(1, 1), (2, 0), (3, 1)])
def test_ranks_that_cannot_share_packs_are_told_once_and_hide_nothing(folder, monkeypatch, ranks, told):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    found = problems(config_of(folder, batch={"rows_per_step": 4, "sequence_parallel": 2}))
    assert [check for check, _ in found] == ["run file"] * told
    assert all(f"does not divide the {ranks} ranks" in line for _, line in found)
    assert collect(config_of(folder, batch={"rows_per_step": 4, "sequence_parallel": 2}))["saved"]


def test_prompts_of_samples_are_looked_at_beside_other_problems(folder):
    samples = {"samples": {"prompts": str(folder / "none.txt")}}
    told = problems(config_of(folder, deepspeed="zero9", eval=samples))
    assert sorted(check for check, _ in told) == ["run file", "samples"]
    assert "none.txt: no such file" in dict(told)["samples"]


def test_a_problem_is_told_once(folder):
    shutil.rmtree(folder / "data" / "train")
    told = problems(config_of(folder))
    assert [check for check, _ in told] == ["shards"]


def test_room_is_the_disks_affair(folder, monkeypatch):
    from sft.errors import UserError

    def full(*given, **more):
        raise UserError(f"--out {folder / 'run'}: too full; delete something")

    monkeypatch.setattr("sft.inputs.check_disk", full)
    assert problems(config_of(folder)) == []
    assert not collect(config_of(folder))["saved"]


def test_a_tokenizer_that_cannot_be_loaded_hides_no_shard(folder):
    (folder / "base" / "tokenizer.json").write_text("{")
    train_shard(folder).unlink()
    told = dict(problems(config_of(folder)))
    assert "tokenizer" in told["model folder"]
    assert str(train_shard(folder)) in told["shards"]


def test_a_generation_config_that_cannot_be_saved(folder):
    (folder / "base" / "generation_config.json").write_text("[]")
    ((check, found),) = problems(config_of(folder))
    assert check == "save path"
    assert str(folder / "base") in found


def test_a_run_folder_of_another_run(folder):
    (folder / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    ((check, found),) = problems(config_of(folder))
    assert check == "run file"
    assert "not complete" in found


def test_a_changed_byte_is_found_though_the_shard_opens(folder):
    shard = train_shard(folder)
    content = bytearray(shard.read_bytes())
    at = content.find(b"\x01\x00\x00\x00", len(content) // 2)
    content[at] ^= 2
    shard.write_bytes(content)
    ((check, found),) = problems(config_of(folder))
    assert (check, f"{shard} is not what was prepared" in found) == ("files", True)


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    right, shard = file_sha256, train_shard(folder)

    def broken(path):
        if path == shard:
            raise OSError(5, "Input/output error")
        return right(path)

    monkeypatch.setattr(inputs, "file_sha256", broken)
    finding = next(f for f in inputs.judge([Report(0, "n7", 0, collect(config_of(folder)))]) if f.check == "files")
    assert (finding.status, finding.where) == ("fail", "host n7")
    assert finding.found == f"{shard} cannot be read: Input/output error"
    assert "dmesg" in finding.remedy


def test_ranks_of_a_host_read_each_file_once(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    one, other = (collect(config_of(folder), local_rank) for local_rank in range(2))
    assert len(one["digests"]) + len(other["digests"]) == 3
    assert not one["digests"].keys() & other["digests"].keys()
    assert other["problems"] == []
    assert not other["small"]
    reports = [Report(0, "n0", 0, one), Report(1, "n0", 1, other)]
    assert {finding.status for finding in inputs.judge(reports)} == {"pass"}


# What is read


@pytest.mark.parametrize(
    ("sizes", "budget", "picked"),
    [
        ([10] * 5, 50, [0, 1, 2, 3, 4]),
        ([10] * 5, 49, [0, 1, 3, 4]),
        ([10] * 5, 30, [0, 2, 4]),
        ([10] * 5, 1, [0, 4]),
        ([10] * 100, 40, [0, 33, 66, 99]),
        ([10], 1, [0]),
        ([10, 10], 1, [0, 1]),
        ([], 1, []),
    ],
)
def test_a_sample_is_spread_and_has_both_ends(sizes, budget, picked):
    assert inputs.pick(sizes, budget) == picked


def test_full_reads_more_than_a_sample(folder, monkeypatch):
    train = folder / "data" / "train"
    manifest = read_manifest(train)
    manifest["shards"] = [{**manifest["shards"][0], "file": f"{index}.arrow"} for index in range(9)]
    (train / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(inputs, "SAMPLE_BYTES", 1)
    config = config_of(folder, data={"train": str(train)})
    assert [path.name for path, _ in inputs.choose_files(config, "sample")] == [
        "0.arrow",
        "model.safetensors",
        "8.arrow",
    ]
    assert len(inputs.choose_files(config, "full")) == 10


def test_a_sample_ends_in_time_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(inputs, "SAMPLE_S", -1.0)
    facts = collect(config_of(folder))
    assert (len(facts["digests"]), facts["unread"]) == (1, 2)
    finding = next(finding for finding in inputs.judge([Report(0, "n0", 0, facts)]) if finding.check == "files")
    assert finding.status == "pass"
    assert "at least 1 of 3 files" in finding.found
    full = inputs.collect(config_of(folder), DoctorSection(digests="full"), 0)
    assert (len(full["digests"]), full["unread"]) == (3, 0)


def test_weights_that_training_does_not_read_are_not_judged(folder):
    """Mistral's folders hold everything a second time."""
    (folder / "base" / "consolidated.safetensors").write_bytes(b"something else on every host")
    facts = collect(config_of(folder))
    assert list(facts["sizes"]) == ["model.safetensors"]
    assert [path for path in facts["digests"] if "consolidated" in path] == []


# Between hosts


FACTS = {
    "problems": [], "saved": True, "keys": {"data.train": "a" * 64}, "small": {"config.json": "c" * 64},
    "sizes": {"model.safetensors": 1000}, "read_s": 1.0, "read_bytes": 2000, "unread": 0,
    "wandb": {"mode": "off", "installed": True},
    "digests": {
        "/data/0.arrow": {"wanted": "5" * 64, "sha256": "5" * 64, "bytes": 1000},
        "/base/model.safetensors": {"wanted": None, "sha256": "6" * 64, "bytes": 1000},
    },
}  # fmt: skip
SECOND_RANK = {**FACTS, "keys": {}, "small": {}, "sizes": {}, "saved": False, "wandb": None, "digests": {}}


def found(change=None):
    """Findings that are no pass, of two hosts with two ranks each; `change(facts)` is applied to n1's first rank."""
    reports = [
        Report(rank, f"n{rank // 2}", rank % 2, copy.deepcopy(SECOND_RANK if rank % 2 else FACTS)) for rank in range(4)
    ]
    if change:
        change(reports[2].facts)
    return [finding for finding in inputs.judge(reports) if finding.status != "pass"]


def test_equal_hosts_pass():
    assert found() == []


@pytest.mark.parametrize(
    ("change", "check", "part"),
    [
        (lambda facts: facts["keys"].update({"data.train": "b" * 64}), "shards", "data.train: hosts have"),
        (lambda facts: facts["small"].update({"config.json": "d" * 64}), "model folder", "config.json of the"),
        (lambda facts: facts["small"].clear(), "model folder", "none on host n1"),
        (lambda facts: facts["sizes"].update({"model.safetensors": 999}), "model folder", "1000 on host n0, 999 on"),
        (
            lambda facts: facts["digests"]["/base/model.safetensors"].update(sha256="7" * 64),
            "files",
            "666666666666 on host n0, 777777777777 on host n1",
        ),
        (lambda facts: facts["digests"]["/data/0.arrow"].update(sha256="7" * 64), "files", "/data/0.arrow is not"),
        (lambda facts: facts["problems"].append(["shards", "shard /x: gone; copy it"]), "shards", "/x: gone"),
    ],
)  # fmt: skip
def test_a_host_that_differs_is_named(change, check, part):
    (finding,) = found(change)
    assert (finding.check, finding.status, finding.where) == (check, "fail", "host n1")
    assert part in finding.found
    assert finding.remedy


def test_a_first_rank_whose_check_broke_off_says_nothing_of_its_host():
    """Its report is left out; the host's second rank has looked at nothing but bytes."""
    reports = [Report(0, "n0", 0, FACTS), Report(1, "n0", 1, SECOND_RANK), Report(3, "n1", 1, SECOND_RANK)]
    assert [finding for finding in inputs.judge(reports) if finding.status != "pass"] == []
    assert {finding.status for finding in inputs.judge(reports[2:])} == {"pass"}


def test_a_problem_of_all_hosts_is_one_finding():
    reports = [Report(rank, f"n{rank}", 0, {**FACTS, "problems": [["shards", "no; do"]]}) for rank in range(3)]
    (finding,) = [finding for finding in inputs.judge(reports) if finding.status == "fail"]
    assert (finding.where, finding.found, finding.remedy) == ("all ranks", "no", "do")


def test_an_untried_save_path_is_skipped_and_named():
    (finding,) = found(lambda facts: facts.update(saved=False))
    assert (finding.check, finding.status, finding.where) == ("save path", "skip", "host n1")


@pytest.mark.parametrize("mode", ["offline", "online", "off"])
def test_wandb(mode):
    reports = [Report(0, "n0", 0, {**FACTS, "wandb": {"mode": mode, "installed": False}})]
    finding = inputs.judge(reports)[-1]
    assert finding.status == ("pass" if mode == "off" else "fail")
    assert mode == "off" or "pip install wandb" in finding.remedy
    reports[0].facts["wandb"]["installed"] = True
    finding = inputs.judge(reports)[-1]
    assert (finding.check, finding.status) == ("wandb", "pass")
    assert mode in finding.found


def test_the_key_never_shows(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "swordfish")
    facts = collect(config_of(folder, track={"wandb": "online"}))
    assert facts["problems"] == []
    assert "swordfish" not in json.dumps(facts)
