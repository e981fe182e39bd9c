"""Copies on a host's own disk: of what, equal, refused where they would not be.

Run: pytest tests/unit/test_stage.py
"""

import errno
import fnmatch
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sft import staging
from sft.config import RunConfig
from sft.errors import UserError, run_command
from sft.inputs import identity, open_inputs
from sft.settings import load
from sft.stage import main
from sft.staging import BESIDE_WEIGHTS, RECORD
from sft.tokenizer import TOKENIZER_FILES
from tests.stage_support import assert_equal, make_world, staged, touched

HOST = os.uname().nodename
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user or to mount")


@pytest.fixture
def world(tmp_path, prepared):
    return make_world(tmp_path, prepared)


# What is copied


def test_the_line_makes_a_run_the_same_run(base_model, prepared, tmp_path, capsys):
    flags = ["--model.path", str(base_model), "--data.train", str(prepared / "train"), "--out", str(tmp_path / "run")]
    flags += ["--data.heldout", str(prepared / "heldout"), "--batch.rows_per_step", "4", "--model.precision", "fp32"]
    to = tmp_path / "it's a $place"
    main([*flags, "--to", str(to)])
    line = capsys.readouterr().out
    code = f'set -- {line.strip()}; printf "%s\\n" "$@"'
    words = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[::2] == ["--model.path", "--data.train", "--data.heldout"]
    assert all(Path(path).parent == to for path in words[1::2])
    before, after = (load(RunConfig, argv, prog="sft train") for argv in (flags, [*flags, *words]))
    assert after.model.path == words[1]
    identities = [identity(config, open_inputs(config, 1)) for config in (before, after)]
    assert identities[0] == identities[1]
    (Path(words[1]) / "config.json").write_text((base_model / "config.json").read_text().replace("512", "513"))
    assert identity(after, open_inputs(after, 1)) != identities[0], "control: another model has another identity"


def test_only_what_training_reads_is_copied(world, tmp_path, capsys):
    copies, _ = staged(world, tmp_path / "to", capsys)
    model = copies["--model.path"]
    assert {path.name for path in model.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "staged.json",
        "model.safetensors.index.json", "model-0-of-2.safetensors", "model-1-of-2.safetensors",
    }  # fmt: skip
    assert_equal(tmp_path / "model", model)
    assert_equal(tmp_path / "prep" / "train", copies["--data.train"])
    for name in TOKENIZER_FILES:
        assert any(fnmatch.fnmatch(name, kind) for kind in BESIDE_WEIGHTS), name


def test_content_is_copied_and_not_links(world, tmp_path, capsys):
    """The hub's cache: a snapshot is a folder of links to blobs."""
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(list(model.iterdir())):
        if path.is_file():
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
            (blobs / str(number)).chmod(0o400)
    copies, _ = staged(world, tmp_path / "to", capsys)
    copy = copies["--model.path"]
    shutil.rmtree(blobs)
    assert not any(path.is_symlink() for path in copy.iterdir())
    assert all(path.stat().st_mode & 0o600 == 0o600 for path in copy.iterdir())
    assert (copy / "config.json").read_text() == '{"model_type": "llama"}'


def test_staging_what_is_staged_finds_it(world, tmp_path, capsys):
    to = tmp_path / "to"
    first, _ = staged(world, to, capsys)
    flags = [word for option, path in first.items() for word in (option, str(path))]
    second, said = staged([*flags, "--out", "runs/x"], to, capsys)
    assert second == first
    assert "copying" not in said


# A source that changes


def rewritten_behind_its_time(path: Path) -> None:
    status = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, rewritten_behind_its_time])
@pytest.mark.parametrize("small_bytes", [9000, staging.SMALL_BYTES])
def test_a_changed_model_gets_another_folder(world, tmp_path, capsys, monkeypatch, change, small_bytes):
    """Also where only samples are read: the last bytes are among them."""
    monkeypatch.setattr("sft.staging.SMALL_BYTES", small_bytes)
    monkeypatch.setattr("sft.staging.SAMPLE_BYTES", 64)
    before, _ = staged(world, tmp_path / "to", capsys)
    same, _ = staged(world, tmp_path / "to", capsys)
    assert same == before, "control"
    change(tmp_path / "model" / "model-1-of-2.safetensors")
    after, said = staged(world, tmp_path / "to", capsys)
    assert after["--model.path"] != before["--model.path"]
    assert after["--data.train"] == before["--data.train"]
    assert_equal(tmp_path / "model", after["--model.path"])
    assert f"also holds {before['--model.path'].name}: remove" in said
    assert before["--model.path"].exists()


def test_other_shards_get_another_folder(world, tmp_path, prepared, capsys):
    before, _ = staged(world, tmp_path / "to", capsys)
    after, _ = staged([*world, "--data.train", str(prepared / "heldout")], tmp_path / "to", capsys)
    assert after["--data.train"] != before["--data.train"]
    assert after["--model.path"] == before["--model.path"]


def test_a_source_that_changes_meanwhile_is_refused(world, tmp_path, monkeypatch):
    model, to = tmp_path / "model", tmp_path / "to"
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        (model / "config.json").write_text('{"model_type": "other"}')

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"config.json: changed meanwhile"):
        main([*world, "--to", str(to)])
    assert [path.name for path in to.iterdir()] == [staging.LOCK]


# Damage


def test_a_damaged_source_shard_is_refused_by_name(world, tmp_path):
    shard = tmp_path / "prep" / "train" / "data-00000-of-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"data.train {shard}: its sha256 is not the manifest's"):
        main([*world, "--to", str(tmp_path / "to")])
    assert not list((tmp_path / "to").glob("train-*"))


def test_a_cut_shard_is_refused_before_anything_is_copied(world, tmp_path):
    shard = tmp_path / "prep" / "train" / "data-00000-of-00001.arrow"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=f"data.train {shard}: is missing or has not the"):
        main([*world, "--to", str(tmp_path / "to")])
    assert not (tmp_path / "to").exists()


def test_a_cut_weights_file_is_refused_before_anything_is_copied(world, tmp_path):
    weights = tmp_path / "model" / "model-1-of-2.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(UserError, match=f"model.path {weights}: is no whole safetensors file"):
        main([*world, "--to", str(tmp_path / "to")])
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/w.safetensors", 1])
def test_an_index_reaches_no_other_folder(world, tmp_path, name):
    for folder in (tmp_path, tmp_path / "model" / "sub"):
        folder.mkdir(exist_ok=True)
        save_file({"w": np.zeros(3)}, folder / "other.safetensors")
        save_file({"w": np.zeros(3)}, folder / "w.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="not directly in it|no whole safetensors file|no index of safetensors"):
        main([*world, "--to", str(tmp_path / "to")])


def flip_a_byte_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk holds of files called so is not what was written to it."""
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".partial-{HOST}/{name}"):
            os.pwrite(descriptor, b"\xff", 1000)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_disk_that_gives_back_other_bytes_is_noticed(world, tmp_path, monkeypatch):
    flip_a_byte_of("model-1-of-2.safetensors", monkeypatch)
    with pytest.raises(UserError, match=f"model-1-of-2.safetensors: reads back different .*{HOST}"):
        main([*world, "--to", str(tmp_path / "to")])
    assert not list((tmp_path / "to").glob("model-*"))


def test_control_without_reading_back_it_would_not_be(world, tmp_path, monkeypatch, capsys):
    flip_a_byte_of("model-1-of-2.safetensors", monkeypatch)
    real = staging._sha256

    def of_the_source(path, stop):
        return real((tmp_path / "model" if path.parent.name.startswith("model") else path.parent) / path.name, stop)

    monkeypatch.setattr(staging, "_sha256", of_the_source)
    copies, _ = staged(world, tmp_path / "to", capsys)
    with pytest.raises(AssertionError, match="'model-1-of-2.safetensors'. differ"):
        assert_equal(tmp_path / "model", copies["--model.path"])


def lose(copy: Path) -> None:
    (copy / "config.json").unlink()


def cut(copy: Path) -> None:
    os.truncate(copy / "model-0-of-2.safetensors", 5000)


def overwrite(copy: Path) -> None:
    with (copy / "model-0-of-2.safetensors").open("r+b") as file:
        file.write(b"\xff")


def overwrite_behind_its_time(copy: Path) -> None:
    rewritten_behind_its_time(copy / "tokenizer.json")


def lose_record(copy: Path) -> None:
    (copy / RECORD).unlink()


def garble_record(copy: Path) -> None:
    (copy / RECORD).write_text('{"files": [1]}')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lose, "config.json is gone"),
        (cut, "model-0-of-2.safetensors has changed since"),
        (overwrite, "model-0-of-2.safetensors has changed since"),
        (overwrite_behind_its_time, "tokenizer.json has another sha256 now"),
        (lose_record, "cannot be checked"),
        (garble_record, "cannot be checked"),
    ],
)
def test_a_damaged_copy_is_made_again(world, tmp_path, capsys, harm, said):
    to = tmp_path / "to"
    first, _ = staged(world, to, capsys)
    copy = first["--model.path"]
    made = copy.stat().st_ino, (copy / RECORD).stat().st_mtime_ns
    _, quiet = staged(world, to, capsys)
    assert "copying" not in quiet, "control"
    assert (copy.stat().st_ino, (copy / RECORD).stat().st_mtime_ns) == made
    harm(copy)
    again, loud = staged(world, to, capsys)
    assert again == first
    assert f"model.path: {copy}: {said}" in loud
    assert loud.count("copying") == 1, "the shards' copy is not touched"
    assert_equal(tmp_path / "model", copy)


# The place


def test_a_folder_within_a_source_is_refused(world, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for to in ("model", "model/original/new", "link/new", str(tmp_path / "prep" / "train")):
        with pytest.raises(UserError, match="--to .*: lies in (model.path|data.train)"):
            main([*world, "--to", to])
    with pytest.raises(UserError, match="config.json: is a file"):
        main([*world, "--to", "model/config.json"])


def test_a_relative_place_is_printed_whole(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copies, _ = staged(world, "to", capsys)
    assert copies["--model.path"].parent == tmp_path / "to"


def test_no_room_is_told_before(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging, "GIB", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000))
    with pytest.raises(UserError, match=r"model.path, data.train need \d+\.\d\d GiB there, but 30.00 GiB are free"):
        main([*world, "--to", str(tmp_path / "to")])
    assert [path.name for path in (tmp_path / "to").iterdir()] == [staging.LOCK]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    main([*world, "--to", str(tmp_path / "to")])  # control


@root_only
def test_a_disk_that_fills_up_meanwhile_is_one_line(world, tmp_path, monkeypatch, capsys):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        arguments = [*world, "--to", str(small / "to")]
        assert run_command(main, arguments) == 2
        assert "GiB are free" in capsys.readouterr().err
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert run_command(main, arguments) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.splitlines()[-1][:24]) == ("", f"error: {os.strerror(errno.ENOSPC)[:17]}")
        assert [path.name for path in (small / "to").iterdir()] == [staging.LOCK]
    finally:
        subprocess.run(["umount", str(small)], check=True)


@root_only
def test_another_users_place_is_refused(world, tmp_path, capsys):
    to = tmp_path / "to"
    copies, _ = staged(world, to, capsys)
    nobody = 65534
    os.chown(copies["--data.train"], nobody, -1)
    with pytest.raises(UserError, match=f"{copies['--data.train'].name} in it belongs to user nobody; choose a folder"):
        main([*world, "--to", str(to)])
    os.chown(to / staging.LOCK, nobody, -1)
    with pytest.raises(UserError, match=f"{staging.LOCK} in it belongs to user nobody"):
        main([*world, "--to", str(to)])


@root_only
def test_a_stranger_is_told_whose_place_it_is(world):
    """The first one is root; the second one is nobody, to whom the lock cannot be opened."""
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o777)  # noqa: S103
        os.close(os.open(f"{shared}/{staging.LOCK}", os.O_CREAT, 0o600))
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            try:
                staging.stage([], Path(shared), lambda line: None)
            except UserError as error:
                os.write(tell, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(tell)
        assert f"{staging.LOCK} in it belongs to user root; choose a folder" in os.read(told, 500).decode()
