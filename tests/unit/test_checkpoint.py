"""What a checkpoint folder holds, without any ranks: files, completeness, damage, slices.

Run: pytest tests/unit/test_checkpoint.py
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sft.checkpoint import (
    CONSTANT,
    Piece,
    Pieces,
    check_identity,
    check_shapes,
    check_undamaged,
    damage,
    digests,
    is_complete,
    newest_complete,
    publish,
    read_meta,
    set_aside,
    write_pieces,
)
from sft.errors import UserError
from tests import saved

FILES = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "meta.json", "COMPLETE"]


def is_found_out(checkpoint):
    """Whether anything that looks at a checkpoint refuses this one; all of them must agree."""
    if not is_complete(checkpoint):
        with pytest.raises(UserError, match="not complete"):
            read_meta(checkpoint)
        with pytest.raises(UserError, match="not complete"):
            check_undamaged(checkpoint)
        return True
    lines = damage(checkpoint, digests(checkpoint))
    if lines:
        with pytest.raises(UserError, match="it is damaged, use another"):
            check_undamaged(checkpoint)
    return bool(lines)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def places(size):
    """Bits of the length field, the header, the middle and the end of a file."""
    return [0, 8 * 7 + 7, 8 * 8, 8 * 40 + 3, 8 * (size // 2) + 5, 8 * size - 1]


def part(checkpoint, names):
    """Digests of some files."""
    return {name: digests(checkpoint)[name] for name in names}


def test_an_untouched_one_is_complete_and_holds_everything(tmp_path):
    checkpoint = saved.save(tmp_path, 1)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
    assert list(digests(checkpoint)) == ["meta.json", *FILES[:2]]
    assert not is_found_out(checkpoint)
    saved.assert_holds(checkpoint, 1)


def test_a_copy_elsewhere_is_as_good(tmp_path):
    copy = shutil.copytree(saved.save(tmp_path / "run", 1), tmp_path / "elsewhere" / "backup")
    assert not is_found_out(copy)
    saved.assert_holds(copy, 1)


@pytest.mark.parametrize("name", FILES[:3])
def test_one_flipped_bit_is_found(tmp_path, name):
    checkpoint = saved.save(tmp_path, 1)
    file = checkpoint / name
    for bit in places(file.stat().st_size):
        flip(file, bit)
        assert is_found_out(checkpoint), bit
        flip(file, bit)
    assert not is_found_out(checkpoint), "control: the same bits flipped back"


def test_no_bit_of_the_marker_can_be_flipped_unseen(tmp_path):
    checkpoint = saved.save(tmp_path, 1)
    marker = checkpoint / "COMPLETE"
    whole = marker.read_bytes()
    unseen = []
    for bit in range(8 * len(whole)):
        flip(marker, bit)
        unseen += [bit] if is_complete(checkpoint) else []
        marker.write_bytes(whole)
    assert unseen == []
    assert is_complete(checkpoint), "control"


CHANGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-2]),  # the last of JSON is a newline
    "longer by one": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_found(tmp_path, name, change):
    checkpoint = saved.save(tmp_path, 1)
    CHANGES[change](checkpoint / name)
    assert is_found_out(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"meta.json": {}}', '{"meta.json": 7}', "\udcff"])
def test_a_marker_that_says_something_else_is_found(tmp_path, content):
    checkpoint = saved.save(tmp_path, 1)
    (checkpoint / "COMPLETE").write_bytes(content.encode(errors="surrogateescape"))
    assert is_found_out(checkpoint)


def test_swapped_rank_files_are_found(tmp_path):
    checkpoint = saved.save(tmp_path, 1)
    first, second = (checkpoint / name for name in FILES[:2])
    first.rename(checkpoint / "held")
    second.rename(first)
    (checkpoint / "held").rename(second)
    assert is_found_out(checkpoint)


def test_a_file_of_another_step_is_found(tmp_path):
    """Equal names and sizes; only the digest differs."""
    checkpoint, other = saved.save(tmp_path, 1), saved.save(tmp_path, 2)
    shutil.copyfile(other / FILES[0], checkpoint / FILES[0])
    assert is_complete(checkpoint)
    assert damage(checkpoint, part(checkpoint, FILES[1:2])) == [], "control: the other rank's file"
    assert len(damage(checkpoint, part(checkpoint, FILES[:2]))) == 1
    assert is_found_out(checkpoint)


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    checkpoint = saved.save(tmp_path, 1)

    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("sft.checkpoint._digest", fail)
    assert damage(checkpoint, part(checkpoint, FILES[:1])) == [f"{FILES[0]} cannot be read (Input/output error)"]


def test_files_that_are_not_listed_are_not_read(tmp_path):
    checkpoint = saved.save(tmp_path, 1)
    shutil.copyfile(saved.save(tmp_path, 2) / FILES[0], checkpoint / "rank-00000-of-00001.safetensors")
    saved.assert_holds(checkpoint, 1)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.checkpoint.FORMAT_VERSION", 3)
    checkpoint = saved.save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 3, and this version reads 2"):
        read_meta(checkpoint)


def test_newest_is_chosen_by_completeness_not_by_name(tmp_path):
    first, second = saved.save(tmp_path, 1), saved.save(tmp_path, 2)
    assert newest_complete(tmp_path) == second
    (second / "COMPLETE").unlink()
    assert newest_complete(tmp_path) == first
    assert newest_complete(tmp_path / "none") is None


def test_one_that_was_set_aside_is_never_found_again(tmp_path):
    first, second = saved.save(tmp_path, 1), saved.save(tmp_path, 2)
    aside = set_aside(second)
    assert aside.name == "step-00000002.damaged"
    assert newest_complete(tmp_path) == first
    set_aside(saved.save(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002.damaged"]


# Contents


@pytest.mark.parametrize(("start", "numel"), [(0, 10), (0, 6), (4, 4), (6, 4), (9, 1)])
def test_slices_are_read_across_rank_files(tmp_path, start, numel):
    read = Pieces(saved.save(tmp_path, 1))
    assert torch.equal(read.read("w", "exp_avg", start, numel), saved.values(1, "w", "exp_avg")[start : start + numel])


def test_elements_that_no_rank_wrote_are_an_error(tmp_path):
    read = Pieces(saved.save(tmp_path, 1))
    with pytest.raises(UserError, match="does not hold elements 8 to 12 of w"):
        read.read("w", "fp32", 8, 4)
    with pytest.raises(UserError, match="does not hold elements 0 to 1 of other"):
        read.read("other", "fp32", 0, 1)


ODD = {
    "three flags|constant": torch.tensor([True, False, True]),
    "bytes|constant": torch.tensor([0, 255, 7], dtype=torch.uint8),
    "signed|constant": torch.tensor([-128, 127, 1], dtype=torch.int8),
    "shorts|constant": torch.tensor([-5, 300, 1], dtype=torch.int16),
    "halves|constant": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "fp16|constant": torch.tensor([6e-8], dtype=torch.float16),
    "counts|constant": torch.tensor([2**40, -1], dtype=torch.int64),
    "ints|constant": torch.tensor([2**30], dtype=torch.int32),
    "doubles|constant": torch.tensor([0.1], dtype=torch.float64),
    "nothing|fp32": torch.empty(0),
    "no flags|constant": torch.empty(0, dtype=torch.bool),
    "weights|fp32": torch.arange(5.0),
}


@pytest.mark.parametrize("order", [list(ODD), list(reversed(ODD))], ids=["odd sizes first", "odd sizes last"])
def test_every_dtype_is_readable_by_the_library(tmp_path, order):
    pieces = [Piece(*name.split("|"), start=7, tensor=ODD[name]) for name in order]
    entry = write_pieces(tmp_path / "file", pieces)
    assert entry["bytes"] == (tmp_path / "file").stat().st_size
    found = load_file(tmp_path / "file")
    assert found.keys() == ODD.keys()
    for name, tensor in ODD.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_dtype_that_the_format_lacks_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_pieces(tmp_path / "file", [Piece("x", CONSTANT, 0, torch.zeros(2, dtype=torch.complex64))])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_many_chunks_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.checkpoint.CHUNK_BYTES", 64)
    tensor = torch.arange(1001.0)
    write_pieces(tmp_path / "file", [Piece("x", "fp32", 0, tensor), Piece("y", CONSTANT, 0, tensor[:77].bfloat16())])
    found = load_file(tmp_path / "file")
    assert torch.equal(found["x|fp32"], tensor)
    assert torch.equal(found["y|constant"], tensor[:77].bfloat16())


def test_a_rank_without_any_piece_has_a_file_all_the_same(tmp_path):
    folder = tmp_path / "step-00000001.partial"
    folder.mkdir()
    tensor = torch.arange(4.0)
    parts = [[Piece("w", "fp32", 0, tensor)], [], [Piece("empty", "fp32", 0, torch.empty(0))]]
    files = {name: write_pieces(folder / name, part) for name, part in zip("abc", parts, strict=True)}
    assert load_file(folder / "b") == {}
    read = Pieces(publish(tmp_path, 1, {"files": files}))
    assert torch.equal(read.weights("w", [2, 2]), tensor.reshape(2, 2))
    assert read.weights("empty", [0]).shape == (0,)


# Whose it is


def test_identity_names_every_difference(tmp_path):
    meta = {"identity": saved.IDENTITY}
    check_identity(tmp_path, meta, dict(saved.IDENTITY))
    with pytest.raises(UserError, match=r"data_key: was k, now other; rows_per_step: was 8, now 4"):
        check_identity(tmp_path, meta, {"data_key": "other", "rows_per_step": 4, "data_seed": 0})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"shape of a is \[2\] there, \[3\] here"):
        check_shapes(tmp_path, {"a": [2]}, {"a": [3]})
    with pytest.raises(UserError, match="shape of b is None there"):
        check_shapes(tmp_path, {"a": [2]}, {"a": [2], "b": [1]})
    check_shapes(tmp_path, {"a": [2]}, {"a": [2]})


def test_meta_lists_every_rank_file(tmp_path):
    listed = json.loads((saved.save(tmp_path, 1) / "meta.json").read_text())["files"]
    assert set(listed) == set(FILES[:2])
